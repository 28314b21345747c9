"""Checkpoints written by a thread: of the state as it was, one at a time, with every failure told."""

import threading
import time

import pytest
import torch

from moetrain.checkpoint import background
from moetrain.checkpoint.background import CheckpointWriter, Outcome
from moetrain.checkpoint.manager import load_checkpoint, save_checkpoint
from moetrain.distributed.mesh import ParallelLayout


@pytest.fixture(params=[True, False], ids=["thread", "at once"])
def writer(request):
    writer = CheckpointWriter(ParallelLayout(), background=request.param)
    yield writer
    writer.close()


def _to(run, step):
    def write(states, layout):
        save_checkpoint(run, step, states, {"step": step}, {}, layout)
        return []

    return write


def test_what_is_written_is_the_state_of_its_step(tmp_path):
    writer = CheckpointWriter(ParallelLayout(), background=True)
    weight, moment = torch.zeros(3, 4), torch.zeros(5)
    states = {"model": {"a": weight, "tied": weight}, "optimizer": {"m": moment}}
    may_write = threading.Event()
    for step in (1, 2):  # the second is copied into the memory of the first
        weight.fill_(step)
        moment.fill_(10 * step)
        write = _to(tmp_path, step)

        def delayed(states, layout, write=write):
            assert may_write.wait(30)
            return write(states, layout)

        may_write.clear()
        writer.write(step, states, delayed)
        weight.fill_(-1.0)  # training goes on before a byte is written
        moment.fill_(-1.0)
        assert not writer.done
        may_write.set()
        assert writer.finish() == Outcome(step, saved=True)
    for step in (1, 2):
        saved = load_checkpoint(tmp_path / "checkpoints" / f"step_{step:08d}").states
        for name in ("a", "tied"):
            assert torch.equal(saved["model"][name], torch.full((3, 4), float(step)))
        assert torch.equal(saved["optimizer"]["m"], torch.full((5,), 10.0 * step))
    writer.close()


def test_training_waits_for_the_copy_alone():
    writer = CheckpointWriter(ParallelLayout(), background=True)

    def slow(states, layout):
        time.sleep(0.5)
        return []

    begin = time.perf_counter()
    writer.write(1, {"model": {"w": torch.ones(10)}}, slow)
    assert time.perf_counter() - begin < 0.4
    assert writer.finish() == Outcome(1, saved=True)
    assert time.perf_counter() - begin >= 0.5
    writer.close()


def test_failures_and_remarks_are_returned_once_and_other_errors_raised(writer):
    def full(states, layout):
        raise OSError("No space left on device")

    def wrong(states, layout):
        raise ValueError("a mistake")

    assert writer.finish() is None
    writer.write(3, {}, full)
    assert writer.finish() == Outcome(3, saved=False, problem="No space left on device")
    assert writer.finish() is None
    writer.write(4, {}, lambda states, layout: ["an old one was not removed"])
    assert writer.finish() == Outcome(4, saved=True, remarks=("an old one was not removed",))
    writer.write(5, {}, None)  # its event could not be written
    assert writer.finish() == Outcome(5, saved=False)

    def write_wrong():
        writer.write(6, {}, wrong)
        writer.finish()

    with pytest.raises(ValueError, match="a mistake"):
        write_wrong()


@pytest.mark.parametrize(("available", "threaded"), [(799, False), (800, True), (None, False)])
def test_a_thread_is_used_where_the_copies_fit_into_half_of_the_memory(available, threaded, monkeypatch):
    monkeypatch.setattr(background, "available_memory", lambda: available)
    writer = CheckpointWriter(ParallelLayout())
    threads = []
    states = {"model": {"w": torch.zeros(60)}, "optimizer": {"m": torch.zeros(40)}}  # 400 bytes
    writer.write(1, states, lambda states, layout: threads.append(threading.current_thread().name) or [])
    writer.finish()
    assert (threads == ["checkpoint"]) == threaded
    writer.close()
