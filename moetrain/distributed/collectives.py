"""Collectives over all ranks. Every rank must call each of them; with one process they return at once."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def all_reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all processes, on each of them."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values)
    return values


def all_reduce_max(number: int, device: torch.device) -> torch.Tensor:
    """The largest of the processes' numbers, on each of them; on ``device``, where the host need not wait for it."""
    largest = torch.full((), number, device=device)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest


def all_gather_objects(value: Any) -> list[Any]:
    """Each process's value, in the order of ranks, on each of them."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered
