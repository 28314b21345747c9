"""Tokens per second, memory and the machine's matrix rate, over the time spent training alone."""

from __future__ import annotations

import functools
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median

import torch
import torch.nn.functional as F

_QUEUED = ("train", "record")  # what leaves its work to the device and goes on


class Clock:
    """Splits a run's wall time by what it was spent on, and counts tokens against the time spent training.

    On CUDA training only queues its work. Whatever is measured beside it first waits for that work, as time spent
    training, or it would be charged with the waiting.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self.tokens = 0
        self._device = device if device is not None and device.type == "cuda" else None
        self._last = (0, 0.0)

    @contextmanager
    def measure(self, what: str) -> Iterator[None]:
        """Count the time inside as spent on ``what``."""
        if what not in _QUEUED:
            self.settle()
        begin = time.perf_counter()
        try:
            yield
        finally:
            if what not in _QUEUED:
                self._wait()
            self.seconds[what] = self.spent(what) + time.perf_counter() - begin

    def settle(self) -> None:
        """Wait for what training has queued, as time spent training."""
        if self._device is None:
            return
        begin = time.perf_counter()
        self._wait()
        self.seconds["train"] = self.spent("train") + time.perf_counter() - begin

    def _wait(self) -> None:
        if self._device is not None:
            _wait_for(self._device)

    def add_beside(self, what: str, seconds: float) -> None:
        """Count processor time that a thread beside the training took: it is cost too."""
        self.seconds[what] = self.spent(what) + seconds

    def spent(self, what: str) -> float:
        return self.seconds.get(what, 0.0)

    def taken(self, what: str) -> float:
        """Time spent on ``what``, which is forgotten: it was a trial and belongs to no run's cost."""
        return self.seconds.pop(what, 0.0)

    def share(self, *what: str) -> float:
        """Share of all measured time."""
        total = sum(self.seconds.values())
        return sum(map(self.spent, what)) / total if total else 0.0

    def add_tokens(self, tokens: int) -> None:
        self.tokens += tokens

    def rate(self) -> float:
        """Tokens a second of training, since this process began."""
        return self.tokens / self.spent("train") if self.tokens else 0.0

    def rate_since_last(self) -> float:
        """Tokens a second of training since the last call."""
        (tokens, seconds), self._last = self._last, (self.tokens, self.spent("train"))
        return (self.tokens - tokens) / (self._last[1] - seconds) if self.tokens > tokens else 0.0


@functools.cache
def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of one large square product, here and now: the median of three."""
    multiply, operations = large_product(device, dtype)
    seconds = []
    for _ in range(4):
        _wait_for(device)
        begin = time.perf_counter()
        multiply()
        _wait_for(device)
        seconds.append(time.perf_counter() - begin)
    return operations / median(seconds[1:])


def large_product(device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], torch.Tensor], int]:
    """A product of square matrices large enough to run at the machine's rate, and its floating-point operations."""
    size = 8192 if device.type == "cuda" else 2048
    generator = torch.Generator(device).manual_seed(0)  # a run's own draws stay as they are
    a, b = (torch.randn(size, size, generator=generator, device=device).to(dtype) for _ in range(2))
    return lambda: F.linear(a, b), 2 * size**3  # the form most products of a model have


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> int:
    """Largest number of bytes this process has held: of the device's memory on CUDA, else of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes * (1 if sys.platform == "darwin" else 1024)
