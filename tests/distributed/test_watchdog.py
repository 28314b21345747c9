import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch.distributed as dist

from moetrain.distributed import watchdog as module
from moetrain.distributed.watchdog import Heartbeat, Peer

EVERY = 0.02


@pytest.fixture
def other():
    """Another process, which does nothing."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.send_signal(signal.SIGCONT)
    process.kill()
    process.wait()


@pytest.fixture
def store():
    return dist.HashStore()


def listening(store, peer, lost):
    store.set(f"beat/{peer.rank}", "1")
    mine = Heartbeat(store, 0, [peer], lost.append, EVERY)
    mine.start()
    return mine


def wait_for(lost, seconds=10.0):
    end = time.monotonic() + seconds
    while not lost and time.monotonic() < end:
        time.sleep(EVERY)
    return lost


def test_a_process_on_this_machine_that_is_gone_is_named_at_once(store, other):
    lost = []
    peer = Peer(1, other.pid, socket.gethostname())
    mine = listening(store, peer, lost)
    time.sleep(5 * EVERY)
    assert lost == []
    other.kill()  # not waited for: it stays in the table of processes, as under a launcher that is slow
    assert wait_for(lost) == [f"process 1 (pid {other.pid} on {socket.gethostname()}) is gone"]
    mine.close()


def test_while_data_is_prepared_a_process_may_be_silent_and_one_that_is_gone_is_named_later(store, other):
    lost = []
    peer = Peer(1, other.pid, socket.gethostname())
    store.set("beat/1", "1")
    mine = Heartbeat(store, 0, [peer], lost.append, EVERY, preparing=True)
    mine.start()
    time.sleep(60 * EVERY)  # three times what it may miss in training
    assert lost == []
    store.set("beat/1", "2")
    time.sleep(5 * EVERY)
    other.kill()
    time.sleep(5 * EVERY)
    assert lost == []
    assert wait_for(lost) == [f"process 1 (pid {other.pid} on {socket.gethostname()}) is gone"]
    mine.close()


def test_a_process_elsewhere_that_falls_silent_is_named(store):
    lost = []
    mine = listening(store, Peer(3, os.getpid(), "elsewhere"), lost)
    for beat in range(2, 40):
        store.set("beat/3", str(beat))
        time.sleep(EVERY)
    assert lost == []  # more beats than it may miss
    assert wait_for(lost)[0].startswith(f"process 3 (pid {os.getpid()} on elsewhere) has not been heard of for")
    mine.close()


def test_one_that_left_for_a_reason_is_told_with_it_and_not_before_it_had_time_to(store, other):
    lost = []
    mine = listening(store, Peer(1, other.pid, socket.gethostname()), lost)
    store.set("left/1", "OSError: no such disk")
    other.kill()
    other.wait()
    time.sleep(5 * EVERY)
    assert lost == []
    assert "ended: OSError: no such disk" in wait_for(lost)[0]
    mine.close()


def test_when_the_store_goes_the_main_process_is_named(other):
    class Gone(dist.Store):
        def set(self, *_):
            raise dist.DistNetworkError("connection refused")

    lost = []
    mine = listening(dist.HashStore(), Peer(0, other.pid, socket.gethostname()), lost)
    mine._store = Gone()
    assert lost == []
    other.kill()
    other.wait()
    assert wait_for(lost) == [f"process 0 (pid {other.pid} on {socket.gethostname()}) is gone"]
    mine.close()


def test_when_the_store_hangs_the_main_process_is_named(store):
    class Hanging(dist.Store):
        def set(self, *_):
            time.sleep(3600)

    lost = []
    mine = listening(store, Peer(0, os.getpid(), "elsewhere"), lost)
    mine._store = Hanging()
    assert wait_for(lost)[0].startswith(f"process 0 (pid {os.getpid()} on elsewhere) has not been heard of for")
    mine._closing.set()


def test_time_is_counted_in_own_beats(store, monkeypatch):
    """A machine that sleeps for an hour has not missed any."""
    monkeypatch.setattr(module, "_SILENCE", 5)
    lost = []
    peer = Peer(1, os.getpid(), "elsewhere")
    store.set("beat/1", "1")
    mine = Heartbeat(store, 0, [peer], lost.append, EVERY)
    for _ in range(5):
        mine.beat()
        assert mine._lost(peer) is None
    assert mine._lost(peer) is not None
