"""Tokens per second and memory, over the time spent training alone."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Splits a run's wall time by what it was spent on, and counts tokens against the time spent training."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.tokens = 0
        self._last = (0, 0.0)

    @contextmanager
    def measure(self, what: str) -> Iterator[None]:
        """Count the time inside as spent on ``what``."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] = self.spent(what) + time.perf_counter() - begin

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


def peak_memory(device: torch.device) -> int:
    """Largest number of bytes this process has held: of the device's memory on CUDA, else of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes * (1 if sys.platform == "darwin" else 1024)
