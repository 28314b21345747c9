"""Tensors that may be sharded over ranks, as `torch.distributed.tensor.DTensor`."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor that may be sharded; if it is, all ranks must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this rank holds, all of it where it is not sharded; a view."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
