import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist

from moetrain.distributed import progress as progress_module
from moetrain.distributed import watchdog as module
from moetrain.distributed.progress import Progress
from moetrain.distributed.watchdog import STALL_LIMIT, Heartbeat, Peer, Watchdog
from tests.conftest import small_run
from tests.distributed.ranks import alone

EVERY = 0.02


@pytest.fixture
def other():
    """A process that does nothing."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.send_signal(signal.SIGCONT)
    process.kill()
    process.wait()


@pytest.fixture
def store():
    return dist.HashStore()


def set_beat(store, rank, number, **fields):
    store.set(f"beat/{rank}", Heartbeat(number, **fields).encode())


def started(store, peer, lost):
    set_beat(store, peer.rank, 1)
    watching = Watchdog(store, 0, [peer], lost.append, every=EVERY)
    watching.start()
    return watching


def wait_for(lost, seconds=10.0):
    end = time.monotonic() + seconds
    while not lost and time.monotonic() < end:
        time.sleep(EVERY)
    return lost


def test_a_rank_on_this_machine_that_is_gone_is_named_at_once(store, other):
    lost = []
    peer = Peer(1, other.pid, socket.gethostname())
    watching = started(store, peer, lost)
    time.sleep(5 * EVERY)
    assert lost == []
    other.kill()  # it stays in the process table, as under a slow launcher
    assert wait_for(lost) == [f"rank 1 (pid {other.pid} on {socket.gethostname()}) is gone"]
    watching.close()


def test_while_data_is_prepared_a_rank_may_be_silent_and_one_that_is_gone_is_named_later(store, other):
    lost = []
    peer = Peer(1, other.pid, socket.gethostname())
    set_beat(store, 1, 1)
    watching = Watchdog(store, 0, [peer], lost.append, every=EVERY, preparing=True)
    watching.start()
    time.sleep(60 * EVERY)  # three times what it may miss in training
    assert lost == []
    set_beat(store, 1, 2)
    time.sleep(5 * EVERY)
    other.kill()
    time.sleep(5 * EVERY)
    assert lost == []
    assert wait_for(lost) == [f"rank 1 (pid {other.pid} on {socket.gethostname()}) is gone"]
    watching.close()


def test_a_silent_rank_on_another_machine_is_named(store):
    lost = []
    watching = started(store, Peer(3, os.getpid(), "elsewhere"), lost)
    for number in range(2, 40):
        set_beat(store, 3, number)
        time.sleep(EVERY)
    assert lost == []  # more heartbeats than it may miss
    assert wait_for(lost)[0].startswith(f"rank 3 (pid {os.getpid()} on elsewhere) has not been heard of for")
    watching.close()


def test_a_rank_that_left_with_an_error_is_named_with_it_after_a_delay(store, other):
    lost = []
    watching = started(store, Peer(1, other.pid, socket.gethostname()), lost)
    store.set("left/1", "OSError: no such disk")
    other.kill()
    other.wait()
    time.sleep(5 * EVERY)
    assert lost == []
    assert "ended: OSError: no such disk" in wait_for(lost)[0]
    watching.close()


def test_when_the_store_is_gone_the_main_rank_is_named(other):
    class Gone(dist.Store):
        def set(self, *_):
            raise dist.DistNetworkError("connection refused")

    lost = []
    watching = started(dist.HashStore(), Peer(0, other.pid, socket.gethostname()), lost)
    watching._store = Gone()
    assert lost == []
    other.kill()
    other.wait()
    assert wait_for(lost) == [f"rank 0 (pid {other.pid} on {socket.gethostname()}) is gone"]
    watching.close()


def test_when_the_store_hangs_the_main_rank_is_named(store):
    class Hanging(dist.Store):
        def set(self, *_):
            time.sleep(3600)

    lost = []
    watching = started(store, Peer(0, os.getpid(), "elsewhere"), lost)
    watching._store = Hanging()
    assert wait_for(lost)[0].startswith(f"rank 0 (pid {os.getpid()} on elsewhere) has not been heard of for")
    watching._closing.set()


def test_time_is_counted_in_own_heartbeats(store, monkeypatch):
    """A machine that was suspended for an hour has not missed any."""
    monkeypatch.setattr(module, "_SILENCE", 5)
    lost = []
    peer = Peer(1, os.getpid(), "elsewhere")
    set_beat(store, 1, 1)
    watching = Watchdog(store, 0, [peer], lost.append, every=EVERY)
    for _ in range(5):
        watching.beat()
        assert watching._lost(peer) is None
    assert watching._lost(peer) is not None


def test_a_stall_is_noticed_within_two_minutes():
    assert STALL_LIMIT <= 120


def measured(progress, limit=5):
    """A watchdog that publishes one heartbeat per call."""
    return Watchdog(dist.HashStore(), 0, [], lambda lost: None, progress, every=1.0, stall_limit=limit)


def test_a_rank_without_progress_is_stalled_once_it_has_finished_a_step():
    progress = Progress()
    watching = measured(progress)
    assert not any(watching.beat().stalled for _ in range(20))
    progress.finish_step()
    stalled = [watching.beat().stalled for _ in range(7)]
    assert stalled == [False] * 5 + [True] * 2
    progress.mark()
    assert not watching.beat().stalled


def test_a_busy_or_compiling_rank_is_not_stalled(monkeypatch):
    progress = Progress()
    watching = measured(progress)
    progress.finish_step()
    with progress.busy():
        assert not any(watching.beat().stalled for _ in range(20))
    monkeypatch.setattr(progress_module, "_is_compiling", lambda: True)
    assert not any(watching.beat().stalled for _ in range(20))
    monkeypatch.setattr(progress_module, "_is_compiling", lambda: False)
    assert [watching.beat().stalled for _ in range(5)][-1]


def test_compilation_is_seen_from_another_thread():
    seen = []
    outside = []

    def backend(graph, _):
        seen.append(progress_module._is_compiling())
        return graph.forward

    torch.compile(lambda x: x + 1, backend=backend)(torch.zeros(2))
    outside.append(progress_module._is_compiling())
    assert (seen, outside) == ([True], [False])
    torch.compiler.reset()


def test_ranks_whose_passes_take_long_may_take_longer():
    progress = Progress()
    watching = measured(progress)
    progress.finish_step()
    for _ in range(3):
        for _ in range(4):
            assert not watching.beat().stalled
        progress.mark()
    assert [watching.beat().stalled for _ in range(12)] == [False] * 9 + [True] * 3


STUCK = {"idle": 100, "stalled": True, "step": 7, "where": "somewhere"}


@pytest.mark.parametrize(
    ("beats", "named"),
    [
        ([{"waiting": True}, {}, {"waiting": True}], [1]),
        ([{"position": (6, 3)}, {"position": (6, 3)}, {"position": (6, 2)}], [2]),
        ([{"position": (6, 1), "waiting": True}, {"position": (6, 3)}, {"position": (6, 2)}], [2]),
        ([{"waiting": True}] * 3, [0, 1, 2]),
        ([{"waiting": True}, {}, {"stalled": False}], []),
    ],
)
def test_of_stalled_ranks_the_one_that_others_wait_for_is_named(store, beats, named):
    peers = [Peer(rank, 10 + rank, "elsewhere") for rank in (1, 2)]
    for rank, fields in enumerate(beats):
        set_beat(store, rank, 1, **STUCK | fields)
    watching = Watchdog(store, 0, peers, lambda lost: None)
    watching._own = Heartbeat(1, **STUCK | beats[0])
    for peer in peers:
        watching._lost(peer)
    found = watching._stalled()
    assert [rank for rank in range(3) if found and f"rank {rank} (pid" in found] == named
    assert not named or "at step 7, somewhere" in found


HANG = """
import os, sys, time
from moetrain.data.stream import Stream
from moetrain.distributed import watchdog
from moetrain.train import main

original = Stream.batch

def batch(self, step, first, count):
    if self.batch_rows == 16 and step == 3 and os.environ["RANK"] == sys.argv[1]:
        time.sleep(600)
    return original(self, step, first, count)

Stream.batch = batch
watchdog.watchdog.__wrapped__.__defaults__ = (False, 4.0)
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    ("stuck", "setting"),
    [
        (1, "train.sharding=none"),
        pytest.param(0, "train.sharding=fsdp", marks=pytest.mark.slow),
        pytest.param(0, "train.expert_parallel=2", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_never_enters_a_collective_is_named(corpus_folder, tmp_path, tmp_path_factory, stuck, setting):
    run = small_run(corpus_folder, tmp_path, tmp_path_factory.getbasetemp())
    (tmp_path / "hang.py").write_text(HANG)
    (tmp_path / "empty.yaml").write_text("run: {name: run}")
    arguments = [str(stuck), str(tmp_path / "empty.yaml"), *run, setting]
    ranks = list(alone([str(tmp_path / "hang.py"), *arguments]))
    try:
        said = [rank.communicate(timeout=110)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [1, 1]
    for text in said:
        assert "no rank has made progress for" in text
        assert f"waiting for rank {stuck} (pid {ranks[stuck].pid}" in text
        assert f"rank {1 - stuck} (pid" not in text
        assert "at step 4," in text
