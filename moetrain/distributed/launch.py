"""Processes and precision: accelerate sets them up; the data stream and the step stay ours."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

from moetrain.config import Settings, SettingsError


def start_accelerator(settings: Settings) -> Accelerator:
    """The processes of this launch, checked: gloo on CPU, NCCL on CUDA, one precision for all.

    Raises:
        SettingsError: a launch or a batch that cannot be split evenly.
    """
    deterministic = settings.train.deterministic
    if deterministic or (deterministic is None and not torch.cuda.is_available()):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # We never read uninitialized memory, and filling it costs time.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if not torch.cuda.is_available():
        # accelerate launch leaves a CPU process one thread unless told otherwise.
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(settings.train.threads or max(1, len(os.sched_getaffinity(0)) // local))
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision="no",  # the model casts where it computes; see moetrain.models.transformer
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
            # Rank 0 alone prepares data; the others wait for it longer than the default 10 to 30 minutes.
            InitProcessGroupKwargs(timeout=timedelta(hours=12)),
        ],
    )
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != asked:
        raise SettingsError(
            f"{asked} processes were launched but {accelerator.num_processes} joined: "
            "on CPU launch them with torchrun --nproc_per_node N moetrain/train.py CONFIG"
        )
    rows, micro = settings.train.batch_rows, settings.train.micro_batch_rows or 1
    if rows % (asked * micro):
        raise SettingsError(
            f"train.batch_rows {rows} does not split over {asked} processes into micro-batches of {micro} rows: "
            f"set train.batch_rows to a multiple of {asked * micro}"
        )
    return accelerator


def compute_dtype(settings: Settings, device: torch.device) -> torch.dtype:
    """The type that products run in; ``auto`` takes bf16 where the hardware has instructions for it."""
    if settings.train.precision != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[settings.train.precision]
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def end_processes() -> None:
    """Leave the process group, once nothing is exchanged any more.

    Left to the interpreter's end, gloo's threads may still run when their owner goes, which aborts the process after
    its work was done.
    """
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def leave(status: int) -> NoReturn:
    """End the process with an exit status; one of several without the interpreter's own end.

    What FSDP keeps of gloo's groups has threads until the very end, and there they abort a process now and then, after
    all it had to do was written and closed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        os._exit(status)
    sys.exit(status)
