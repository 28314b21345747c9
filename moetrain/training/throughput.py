"""Tokens per second of training alone, the time spent on everything else, memory, and the machine's matmul rate."""

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

_QUEUED = ("train", "record")  # work that is queued on the device without waiting


class Clock:
    """Splits a run's wall time by purpose, and counts tokens against the time spent training.

    On CUDA, training only queues its work. Everything else that is measured first waits for that work and charges the
    wait to training.

    Attributes:
        current: what time is being charged to; None: nothing.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.current: str | None = None
        self.seconds: dict[str, float] = {}
        self.tokens = 0
        self._device = device if device is not None and device.type == "cuda" else None
        self._last = (0, 0.0)

    @contextmanager
    def measure(self, what: str) -> Iterator[None]:
        """Charge the time inside to ``what``."""
        if what not in _QUEUED:
            self.settle()
        begin, outer, self.current = time.perf_counter(), self.current, what
        try:
            yield
        finally:
            self.current = outer
            if what not in _QUEUED:
                self._wait()
            self.seconds[what] = self.spent(what) + time.perf_counter() - begin

    def settle(self) -> None:
        """Wait for what training has queued, and charge the wait to training."""
        if self._device is None:
            return
        begin = time.perf_counter()
        self._wait()
        self.seconds["train"] = self.spent("train") + time.perf_counter() - begin

    def _wait(self) -> None:
        if self._device is not None:
            _wait_for(self._device)

    def add_background(self, what: str, seconds: float) -> None:
        """Charge processor time of the background thread: it is overhead too."""
        self.seconds[what] = self.spent(what) + seconds

    def spent(self, what: str) -> float:
        return self.seconds.get(what, 0.0)

    def pop(self, what: str) -> float:
        """Time spent on ``what``, and forget it: a trial is no part of a run's overhead."""
        return self.seconds.pop(what, 0.0)

    def share(self, *what: str) -> float:
        """Share of all measured time."""
        total = sum(self.seconds.values())
        return sum(map(self.spent, what)) / total if total else 0.0

    def add_tokens(self, tokens: int) -> None:
        self.tokens += tokens

    def rate(self) -> float:
        """Tokens per second of training since this process started."""
        return self.tokens / self.spent("train") if self.tokens else 0.0

    def rate_since_last(self) -> float:
        """Tokens per second of training since the last call."""
        (tokens, seconds), self._last = self._last, (self.tokens, self.spent("train"))
        return (self.tokens - tokens) / (self._last[1] - seconds) if self.tokens > tokens else 0.0


@functools.cache
def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of one large square matmul on this machine: the median of three."""
    multiply, flops = large_matmul(device, dtype)
    seconds = []
    for _ in range(4):
        _wait_for(device)
        begin = time.perf_counter()
        multiply()
        _wait_for(device)
        seconds.append(time.perf_counter() - begin)
    return flops / median(seconds[1:])


def large_matmul(device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], torch.Tensor], int]:
    """A matmul of square matrices large enough to reach the machine's rate, and its FLOPs."""
    size = 8192 if device.type == "cuda" else 2048
    generator = torch.Generator(device).manual_seed(0)  # leaves the run's own random state alone
    a, b = (torch.randn(size, size, generator=generator, device=device).to(dtype) for _ in range(2))
    return lambda: F.linear(a, b), 2 * size**3  # the form of most matmuls of a model


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> int:
    """Peak bytes held by this process: of device memory on CUDA, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes * (1 if sys.platform == "darwin" else 1024)
