"""Micro-batches read ahead: the same ones in the same order, and training does not wait for them."""

from __future__ import annotations

import threading
import time
from dataclasses import fields

import pytest
import torch

from moetrain.data.batch import Batch
from moetrain.data.corpus import prepare_corpus
from moetrain.data.documents import DataError
from moetrain.data.prefetch import BatchReader
from moetrain.data.stream import training_stream

CPU = torch.device("cpu")


def _same(one: Batch, other: Batch) -> bool:
    return all(torch.equal(getattr(one, f.name), getattr(other, f.name)) for f in fields(Batch))


@pytest.mark.parametrize("ahead", [True, False])
def test_batches_are_those_of_the_stream_in_any_order(ahead, make_settings):
    settings = make_settings()
    stream = training_stream(prepare_corpus(settings), settings)
    reader = BatchReader(stream, 1, 2, 1, CPU, ahead=ahead)
    try:
        in_order = [(step, first) for step in range(3) for first in (1, 2)]
        for step, first in [*in_order, (0, 2), (2, 1)]:  # then as after resuming elsewhere
            assert _same(reader.batch(step, first, 1), stream.batch(step, first, 1))
        assert reader.seconds_waited > 0
    finally:
        reader.close()


class _SlowStream:
    """Takes a while for each batch, and notes which thread built which."""

    def __init__(self, seconds: float, fails_at: int | None = None) -> None:
        self.seconds, self.fails_at = seconds, fails_at
        self.built: list[tuple[int, int, int]] = []
        self.threads: set[int] = set()

    def batch(self, step: int, first: int, count: int) -> Batch:
        time.sleep(self.seconds)
        if step == self.fails_at:
            raise DataError("a token id is outside the vocabulary")
        self.threads.add(threading.get_ident())
        self.built.append((step, first, count))
        return Batch(*[torch.tensor([step, first, count]) for _ in fields(Batch)])


def test_a_consumer_slower_than_the_data_hardly_waits():
    stream = _SlowStream(0.01)
    reader = BatchReader(stream, 0, 4, 2, CPU, ahead=True)
    reader.batch(0, 0, 2)  # the first is waited for
    before, begin = reader.seconds_waited, time.perf_counter()
    for step, first in [(0, 2), (1, 0), (1, 2), (2, 0), (2, 2)]:
        time.sleep(0.06)
        assert reader.batch(step, first, 2).tokens_BT.tolist() == [step, first, 2]
    waited = reader.seconds_waited - before
    assert waited < 0.1 * (time.perf_counter() - begin)  # building in turn would be a seventh
    reader.close()
    assert stream.built[:6] == [(0, 0, 2), (0, 2, 2), (1, 0, 2), (1, 2, 2), (2, 0, 2), (2, 2, 2)]
    assert len(stream.threads) == 2


def test_what_was_read_ahead_is_read_again_after_the_stream_changes():
    stream = _SlowStream(0.0)
    reader = BatchReader(stream, 0, 2, 2, CPU, ahead=True)
    reader.batch(0, 0, 2)
    reader.discard()
    count = len(stream.built)
    reader.batch(1, 0, 2)
    assert (1, 0, 2) in stream.built[count:]
    reader.close()


def test_an_error_of_the_thread_is_raised_when_its_batch_is_asked_for():
    reader = BatchReader(_SlowStream(0.0, fails_at=1), 0, 2, 2, CPU, ahead=True)
    reader.batch(0, 0, 2)
    with pytest.raises(DataError, match="outside the vocabulary"):
        reader.batch(1, 0, 2)
    reader.close()
