"""Micro-batches of the training stream, each built by a background thread while the one before it is trained on.

A batch is a function of its step and rows alone, so reading ahead changes neither the order nor what a resumed run
reads. On CPU there is no thread: it would take a core from training for longer than building a batch takes.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from moetrain.data.batch import Batch
from moetrain.data.stream import Stream

_Place = tuple[int, int, int]  # step, first row, rows


class BatchReader:
    """A rank's micro-batches of a stream on its device, read one ahead.

    Args:
        first, share: this rank's rows of every step.
        micro: rows of a micro-batch; a divisor of ``share``.
        ahead: whether to build the next batch in a thread; None: on an accelerator only.
    """

    def __init__(
        self, stream: Stream, first: int, share: int, micro: int, device: torch.device, ahead: bool | None = None
    ) -> None:
        self.seconds_waited = 0.0  # that `batch` took, since the start
        self._stream = stream
        self._rows = range(first, first + share, micro)
        self._micro = micro
        self._device = device
        ahead = device.type != "cpu" if ahead is None else ahead
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches") if ahead else None
        self._next: tuple[_Place, Future[Batch]] | None = None

    def batch(self, step: int, first: int, count: int) -> Batch:
        """As `Stream.batch`, on the device. Any place may be asked for; the one that follows the last is at hand.

        Raises:
            DataError: a token is outside the vocabulary.
        """
        begin = time.perf_counter()
        place = (step, first, count)
        if self._next is not None and self._next[0] == place:
            host = self._next[1].result()
        else:
            self.discard()
            host = self._build(place)
        if self._pool is not None:
            following = self._following(place)
            self._next = (following, self._pool.submit(self._build, following))
        batch = host.to(self._device)
        self.seconds_waited += time.perf_counter() - begin
        return batch

    def discard(self) -> None:
        """Forget what was read ahead. To be called before the rest of the stream changes."""
        if self._next is not None:
            future = self._next[1]
            if not future.cancel():
                future.exception()  # waits: the thread must not read a stream that changes
            self._next = None

    def close(self) -> None:
        """End the thread."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _build(self, place: _Place) -> Batch:
        batch = self._stream.batch(*place)
        return batch.pin_memory() if self._device.type == "cuda" else batch

    def _following(self, place: _Place) -> _Place:
        step, first, _ = place
        if first + self._micro in self._rows:
            return step, first + self._micro, self._micro
        return step + 1, self._rows.start, self._micro
