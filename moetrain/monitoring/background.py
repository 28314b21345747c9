"""Computation in the background of training: one thread, first in, first out.

On CPU training itself uses all cores, and a thread beside it costs more than it takes. Measured on two virtual cores
(quickstart): streaming metrics delay training by 90 ms computed at once and by 110 to 130 ms on a thread, a panel
reading by 0.48 to 0.53 s and by 0.63 to 0.66 s. There they are computed at once.

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
    """A value, and the processor time in seconds that the thread took to compute it; 0 without a thread."""

    value: T
    seconds: float


class BackgroundWorker(Generic[T]):
    """Computes what is submitted, in order, on a thread of its own; its errors are raised by `results`.

    Args:
        threaded: False computes within `submit`, whose caller's time it then is.
    """

    def __init__(self, threaded: bool = True) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="background") if threaded else None
        self._pending: deque[Future[Result[T]]] = deque()

    def submit(self, compute: Callable[..., T], *arguments: Any) -> None:
        """Queue ``compute(*arguments)``; waits while four are unfinished. The arguments must not change afterwards."""
        if self._pool is None:
            self._pending.append(_computed(compute, arguments))
            return
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
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def _computed(compute: Callable[..., T], arguments: tuple[Any, ...]) -> Future[Result[T]]:
    future: Future[Result[T]] = Future()
    try:
        future.set_result(Result(compute(*arguments), 0.0))
    except Exception as error:
        future.set_exception(error)  # raised by `results`, as from a thread
    return future


def _timed(compute: Callable[..., T], arguments: tuple[Any, ...]) -> Result[T]:
    begin = time.thread_time()
    value = compute(*arguments)
    return Result(value, time.thread_time() - begin)
