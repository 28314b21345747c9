"""Ranks, devices and precision of a launch. accelerate starts the ranks; the data stream and the step are our own."""

from __future__ import annotations

import hashlib
import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState

from moetrain.config import Settings, SettingsError
from moetrain.data.workers import available_cpus
from moetrain.distributed.expert_parallel import check_expert_shards
from moetrain.distributed.mesh import ParallelLayout, make_expert_mesh, make_mesh

JOIN_TIMEOUT = timedelta(minutes=10)
"""How long ranks wait for each other at the start of a launch."""
_REJOIN_TIMEOUT = timedelta(minutes=1)
"""The same where torchrun starts lost ranks again: they start together. It tries again while it may."""
_NEW_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
# Rank 0 alone prepares data, for which the others may wait for hours. The watchdog shortens this once training runs.
_PREPARATION_TIMEOUT = timedelta(hours=12)


def start_ranks(settings: Settings) -> ParallelLayout:
    """Join this launch's ranks, with gloo on CPU and NCCL on CUDA, and set up threads and determinism.

    Raises:
        SettingsError: ranks that did not join or have other settings; a batch, mesh or model that does not split.
    """
    deterministic = settings.train.deterministic
    if deterministic or (deterministic is None and not torch.cuda.is_available()):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # We never read uninitialized memory, and filling it costs time.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if not torch.cuda.is_available():
        # Without this, accelerate launch gives a rank on CPU one thread.
        torch.set_num_threads(settings.train.threads or max(1, available_cpus() // local_world_size))
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    timeout = _REJOIN_TIMEOUT if restarted else JOIN_TIMEOUT
    try:
        own_store = _store_of_restart(restarted, timeout) if _keeps_store() and restarted else {}
        state = PartialState(cpu=not torch.cuda.is_available(), timeout=timeout, **own_store)
    except dist.DistError as error:
        remedy = f"; where torchrun starts ranks again, export {_NEW_STORE}=1 for it" if _keeps_store() else ""
        raise SettingsError(
            f"not all of {launched} processes joined within {timeout.total_seconds():.0f} s "
            f"({str(error).splitlines()[0]}): start all of them, or see why one ended{remedy}"
        ) from None
    joined = state.num_processes
    if joined != launched:
        raise SettingsError(
            f"{launched} processes were launched but {joined} joined: "
            "on CPU launch them with torchrun --nproc_per_node N moetrain/train.py CONFIG"
        )
    if dist.is_initialized():
        _check_same_settings(settings)
    rows, micro = settings.train.batch_rows, settings.train.micro_batch_rows or 1
    if rows % (launched * micro):
        raise SettingsError(
            f"train.batch_rows {rows} does not split over {launched} processes into micro-batches of {micro} rows: "
            f"set train.batch_rows to a multiple of {launched * micro}"
        )
    mesh = None
    ranks = settings.train.sharding, launched, local_world_size, state.device
    if launched > 1:
        mesh = make_mesh(*ranks)
    expert_mesh = make_expert_mesh(settings.train.expert_parallel, *ranks)
    layout = ParallelLayout(state.process_index, launched, local_world_size, state.device, mesh, expert_mesh)
    if expert_mesh is not None:
        check_expert_shards(settings.model, expert_mesh["expert_shard"].size())
    layout.set_timeout(_PREPARATION_TIMEOUT)
    return layout


def _keeps_store() -> bool:
    """Whether torchrun keeps one store for all its starts of ranks."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _store_of_restart(number: int, timeout: timedelta) -> dict[str, Any]:
    """Arguments of a process group that does not read what earlier ranks have left in torchrun's store.

    Their addresses are still there, under the same keys (torch 2.13): gloo may connect to a lost rank, and hang. Each
    machine counts starts on its own, so this is for a single one. With several machines the launcher must make a new
    store for each start, see README.
    """
    if int(os.environ["GROUP_WORLD_SIZE"]) > 1:
        return {}
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(*place, world_size, is_master=False, timeout=timeout)
    return {"store": dist.PrefixStore(f"start_{number}", store), "rank": rank, "world_size": world_size}


def _check_same_settings(settings: Settings) -> None:
    """Compare the settings of all ranks. All ranks must call this.

    Raises:
        SettingsError: on every rank, where they differ; it names the ranks that differ from rank 0, and a key.
    """
    own = settings.by_key()
    digest = hashlib.blake2b(settings.to_yaml().encode(), digest_size=16).hexdigest()
    # Gathered with the process group's own call: there is no layout before the ranks agree on the mesh.
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, digest)
    different = [rank for rank, other in enumerate(gathered) if other != gathered[0]]
    if not different:
        return
    dist.all_gather_object(gathered, own)
    main, other = gathered[0], gathered[different[0]]
    key = min(key for key in main.keys() | other.keys() if main.get(key) != other.get(key))
    ranks = f"rank{'s' * (len(different) > 1)} {', '.join(map(str, different))}"
    raise SettingsError(f"{key}: {ranks} and rank 0 have other values: start all ranks with the same settings")


def compute_dtype(settings: Settings, device: torch.device) -> torch.dtype:
    """The dtype of matmuls; ``auto`` takes bf16 where the hardware has instructions for it."""
    if settings.train.precision != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[settings.train.precision]
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def end_processes() -> None:
    """Leave the process group, after the last collective.

    Otherwise gloo's threads may outlive their owner when the interpreter exits, which aborts the process although all
    its work is done.
    """
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
