"""Sharded tensors on disk, through torch's distributed checkpoint: each process writes its parts, as safetensors.

They come back under any number of processes, sharded or whole: a file says of each part where in its tensor it lies.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor, distribute_tensor

from moetrain.atomic_io import file_hash, sync
from moetrain.distributed.mesh import ParallelLayout
from moetrain.fault_injection import fault_point


def is_sharded(state: Mapping[str, torch.Tensor]) -> bool:
    """Whether processes hold parts of it."""
    return any(isinstance(value, DTensor) for value in state.values())


def save_shards(folder: Path, state: Mapping[str, torch.Tensor], layout: ParallelLayout) -> dict[str, str]:
    """Write a sharded state into an empty folder, all processes together; returns all files' hashes by name.

    Raises:
        OSError: on every process, if one of them could not write.
    """
    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    hashes: dict[str, str] = {}
    problem = ""
    try:
        dcp.save(_apart(state), storage_writer=writer)
        for path in folder.glob(f"shard-{layout.rank + 1:05d}-*"):
            fault_point(f"write {folder.name}/{path.name}")
            sync(path)
            hashes[path.name] = file_hash(path)
    except CheckpointException as error:
        problem = "; ".join(f"process {rank}: {_first_line(cause)}" for rank, (cause, _) in error.failures.items())
    except OSError as error:
        problem = f"process {layout.rank}: {error}"
    found = layout.all_gather_objects((hashes, problem))
    if problems := [told for _, told in found if told]:
        raise OSError(f"{folder.name} could not be written: {problems[0]}")
    return {name: digest for part, _ in found for name, digest in part.items()}


def _apart(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state with memory of its own for each tensor: two names of one (tied embeddings) are each written."""
    kept: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, value in state.items():
        here = value.to_local() if isinstance(value, DTensor) else value
        kept[name] = value.clone() if here.data_ptr() in seen else value
        seen.add(here.data_ptr())
    return kept


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def shard_names(folder: Path) -> set[str]:
    """Names of the tensors in a folder that `save_shards` wrote."""
    return set(dcp.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata)


def fill_from_shards(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy what `save_shards` wrote into tensors, whole or sharded in whatever way, in place."""
    together = dist.is_available() and dist.is_initialized()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # which is what is meant
        dcp.load(dict(tensors), storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=not together)


def read_shards(folder: Path) -> dict[str, torch.Tensor]:
    """All that `save_shards` wrote, whole, on the CPU; one process alone may ask for it."""
    described = dcp.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(told.size, dtype=told.properties.dtype)
        for name, told in described.items()
        if isinstance(told, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=True)
    return tensors


def fill(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Copy a whole value into a tensor, or this process's part of it."""
    if isinstance(tensor, DTensor):
        on_device = value.to(tensor.device)
        value = distribute_tensor(on_device, tensor.device_mesh, tensor.placements, src_data_rank=None)
    tensor.copy_(value)
