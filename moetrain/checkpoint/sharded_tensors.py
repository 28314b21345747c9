"""Sharded tensors on disk, through torch's distributed checkpoint: each rank writes its shards, as safetensors.

Each file says where in its tensor a shard lies, so any number of ranks can load them, sharded or not.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from moetrain.atomic_io import file_hash, sync
from moetrain.distributed.mesh import ParallelLayout
from moetrain.dtensor import local_tensor
from moetrain.fault_injection import fault_point


def is_sharded(state: Mapping[str, torch.Tensor]) -> bool:
    """Whether each rank holds a shard of some tensor."""
    return any(isinstance(value, DTensor) for value in state.values())


def save_shards(folder: Path, state: Mapping[str, torch.Tensor], layout: ParallelLayout) -> dict[str, str]:
    """Write a sharded state to an empty folder; returns the hashes of all files by name. All ranks must call this.

    Raises:
        OSError: on every rank, if one of them could not write.
    """
    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    hashes: dict[str, str] = {}
    problem = ""
    try:
        dcp.save(_unshared(state), storage_writer=writer, process_group=layout.object_group)
        for path in folder.glob(f"shard-{layout.rank + 1:05d}-*"):
            fault_point(f"write {folder.name}/{path.name}")
            sync(path)
            hashes[path.name] = file_hash(path)
    except CheckpointException as error:
        problem = "; ".join(f"rank {rank}: {_first_line(cause)}" for rank, (cause, _) in error.failures.items())
    except OSError as error:
        problem = f"rank {layout.rank}: {error}"
    gathered = layout.all_gather_objects((hashes, problem))
    if problems := [problem for _, problem in gathered if problem]:
        raise OSError(f"{folder.name} could not be written: {problems[0]}")
    return {name: digest for hashes, _ in gathered for name, digest in hashes.items()}


def _unshared(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state with no memory shared, so that a tensor with two names (tied embeddings) is written twice."""
    unshared: dict[str, torch.Tensor] = {}
    pointers: set[int] = set()
    for name, value in state.items():
        local = local_tensor(value)
        unshared[name] = value.clone() if local.data_ptr() in pointers else value
        pointers.add(local.data_ptr())
    return unshared


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def shard_names(folder: Path) -> set[str]:
    """Names of the tensors in a folder that `save_shards` wrote."""
    return set(dcp.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata)


def fill_from_shards(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy what `save_shards` wrote into tensors of any sharding, in place. All ranks must call this."""
    together = dist.is_available() and dist.is_initialized()
    with _no_warning():
        dcp.load(dict(tensors), storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=not together)


def read_shards(folder: Path) -> dict[str, torch.Tensor]:
    """All that `save_shards` wrote, unsharded, on the CPU. Not a collective."""
    metadata = dcp.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(tensor.size, dtype=tensor.properties.dtype)
        for name, tensor in metadata.items()
        if isinstance(tensor, TensorStorageMetadata)
    }
    with _no_warning():
        dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=True)
    return tensors


@contextmanager
def _no_warning() -> Iterator[None]:
    """Suppress dcp's warning that it loads on one rank alone, which is intended."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield
