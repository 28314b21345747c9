"""Computation in the background of training: one thread, first in, first out.

The order is fixed, so its timing affects no number. A full queue makes training wait, which is charged as overhead; the
thread's own processor time is returned with each result.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")

_QUEUE_SIZE = 4


@dataclass(frozen=True)
class Result(Generic[T]):
    """A value, and the processor time in seconds that the thread took to compute it."""

    value: T
    seconds: float


class BackgroundWorker(Generic[T]):
    """Computes what is submitted, in order, on a thread of its own; its errors are raised by `results`."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="background")
        self._pending: deque[Future[Result[T]]] = deque()

    def submit(self, compute: Callable[..., T], *arguments: Any) -> None:
        """Queue ``compute(*arguments)``; waits while four are unfinished. The arguments must not change afterwards."""
        unfinished = [future for future in self._pending if not future.done()]
        if len(unfinished) >= _QUEUE_SIZE:
            unfinished[0].exception()
        self._pending.append(self._pool.submit(_timed, compute, arguments))

    def results(self, wait: bool = False) -> list[Result[T]]:
        """Results that are ready and were not returned before, in order; with ``wait``, all that were submitted."""
        ready = []
        while self._pending and (wait or self._pending[0].done()):
            ready.append(self._pending.popleft().result())
        return ready

    def close(self) -> None:
        """Discard what has not started, and wait for what has."""
        self._pool.shutdown(cancel_futures=True)


def _timed(compute: Callable[..., T], arguments: tuple[Any, ...]) -> Result[T]:
    begin = time.thread_time()
    value = compute(*arguments)
    return Result(value, time.thread_time() - begin)
