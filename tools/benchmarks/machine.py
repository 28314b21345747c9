"""The machine that a number was measured on: its processor, accelerator and versions."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch


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
    """The first entries of every result: what was measured, when, by which command and on which machine."""
    return {
        "what": what,
        "date": datetime.now(UTC).date().isoformat(),
        "command": " ".join(["python", "tools/bench.py", *arguments]),
        "machine": describe_machine(this_device()),
    }


def this_device() -> torch.device:
    """The device that benchmarks run on: the current CUDA device, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def processor() -> str:
    """The processor's name with family and model, which one name may not determine, as far as the system reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    shown = [fields[key] for key in ("model name",) if key in fields]
    shown += [f"{key} {fields[key]}" for key in ("cpu family", "model") if key in fields]
    return ", ".join(shown) or platform.machine()
