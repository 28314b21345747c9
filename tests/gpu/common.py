"""Shared by the tests that need a CUDA device. On a machine with one: ``pytest tests/gpu -m gpu``."""

from __future__ import annotations

import importlib.util

import pytest
import torch

DEVICE = torch.device("cuda")
GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: torch.cuda.is_available() is false"),
]


def needs(*packages: str) -> None:
    """Skip where a package is not installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (docker/install_kernels.sh)")


PACKAGES = {"megablocks": ("megablocks", "grouped_gemm"), "flash_attn": ("flash_attn",)}
