"""Work beside the training: one thread, first in first out, so that its timing shows in no number.

A full queue makes the training wait; the wait is the training's to count as cost, the thread's own time comes with each
result.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")

_QUEUE = 4


@dataclass(frozen=True)
class Done(Generic[T]):
    """A result, and the processor time in seconds that the thread took for it."""

    value: T
    seconds: float


class Beside(Generic[T]):
    """Computes what it is given in order, on a thread of its own; an error there is raised where results are taken."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="beside-training")
        self._pending: deque[Future[Done[T]]] = deque()

    def submit(self, compute: Callable[..., T], *arguments: Any) -> None:
        """Queue ``compute(*arguments)``; waits while four are unfinished. What is given must not change any more."""
        unfinished = [future for future in self._pending if not future.done()]
        if len(unfinished) >= _QUEUE:
            unfinished[0].exception()
        self._pending.append(self._pool.submit(_timed, compute, arguments))

    def results(self, wait: bool = False) -> list[Done[T]]:
        """What is done and was not taken yet, in order; with ``wait``, all that was queued."""
        done = []
        while self._pending and (wait or self._pending[0].done()):
            done.append(self._pending.popleft().result())
        return done

    def close(self) -> None:
        """Drop what has not begun, and wait for what has."""
        self._pool.shutdown(cancel_futures=True)


def _timed(compute: Callable[..., T], arguments: tuple[Any, ...]) -> Done[T]:
    begin = time.thread_time()
    value = compute(*arguments)
    return Done(value, time.thread_time() - begin)
