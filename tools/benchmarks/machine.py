"""The machine a number was measured on: its name, its versions, and the rate of its matrix products."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.timing import Timing, clock
from moetrain.training.throughput import large_matmul

_TOLD = ("model name", "cpu family", "model")


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Processor, accelerator, threads and versions."""
    return {
        "processor": processor(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "bf16_instructions": bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def heading(what: str, arguments: Sequence[str]) -> dict[str, Any]:
    """What every result begins with: what it is, when, where and by which command it was measured."""
    return {
        "what": what,
        "date": datetime.now(UTC).date().isoformat(),
        "command": " ".join(["python", "tools/bench.py", *arguments]),
        "machine": describe_machine(this_device()),
    }


def this_device() -> torch.device:
    """Where benchmarks run: the current CUDA device, else the processor."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def processor() -> str:
    """The processor's name as far as the system tells, with family and model: one name is sold in several."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    told = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    parts = [told[key] if key == "model name" else f"{key} {told[key]}" for key in _TOLD if key in told]
    return ", ".join(parts) or platform.machine()


class MatrixRate:
    """The rate of one large square product, a turn at a time, so that it can be measured among other things."""

    def __init__(self, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> None:
        self.device = device
        self._multiply, self._operations = large_matmul(device, dtype)
        self._multiply()
        self.timing = Timing()

    def turn(self, products: int = 2) -> None:
        """Multiply and take note of each product's time."""
        for _ in range(products):
            wall, cpu = clock(self.device)
            self._multiply()
            wall_after, cpu_after = clock(self.device)
            self.timing.add(wall_after - wall, cpu_after - cpu)

    @property
    def flops(self) -> float:
        """Floating-point operations a second of the median product: 2 n^3 each."""
        return self._operations / self.timing.seconds
