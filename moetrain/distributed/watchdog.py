"""The watchdog: a rank that dies, freezes or hangs ends the run within two minutes, and the others name it.

Left alone, they would wait for it: a collective with a rank that is gone may return only after hours. Each rank
publishes heartbeats, and how far its main thread is, in a store that all ranks share.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

from moetrain.distributed.mesh import ParallelLayout
from moetrain.distributed.progress import Progress

STALL_LIMIT = 100
"""Seconds without progress on any rank after which a run counts as stalled, once each rank has finished a step. It is
longer where a rank regularly takes more than a third of it between two marks of progress."""
_SILENCE = 20  # heartbeats that a rank may miss, of one per second
_LONG_SILENCE = 3600  # the same while data is prepared, which may hold the interpreter and with it the heartbeats
_STORE_TIMEOUT = timedelta(seconds=5)
_COLLECTIVE_TIMEOUT = timedelta(hours=1)  # once training runs: longer than other ranks wait for a busy one


@dataclass(frozen=True)
class Peer:
    """Another rank of the run."""

    rank: int
    pid: int
    host: str

    def __str__(self) -> str:
        return f"rank {self.rank} (pid {self.pid} on {self.host})"

    @property
    def visible(self) -> bool:
        """Whether this process sees it alive: it is on the same machine, in the same container."""
        try:
            state = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (OSError, IndexError):
            return False
        return self.host == socket.gethostname() and state not in "ZX"


@dataclass(frozen=True)
class Heartbeat:
    """What a rank publishes every second."""

    number: int
    idle: int = 0  # heartbeats since its last progress
    stalled: bool = False  # whether those are more than its limit
    step: int = 0  # the step in progress
    position: tuple[int, int] = (0, 0)  # see `Progress`
    where: str = ""
    waiting: bool = False  # whether it seems to wait for other ranks

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, content: bytes) -> Heartbeat:
        fields: dict[str, Any] = json.loads(content)
        return cls(**fields | {"position": tuple(fields["position"])})


class Watchdog:
    """Publishes heartbeats from a thread of its own, and watches those of the other ranks.

    Time is counted in own heartbeats, so that a machine that was suspended wakes up without having missed any.

    Args:
        store: holds the heartbeats; it goes when the main rank does.
        rank: this rank.
        peers: the others.
        end: called by a thread with a line about the rank that is lost; must end this process.
        progress: this rank's; None: only lost ranks are noticed, not stalled ones.
        every: seconds between heartbeats.
        preparing: while data is prepared, only a rank that is gone ends this one, and not before it had time to run
            into the same error.
        stall_limit: see `STALL_LIMIT`.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        peers: list[Peer],
        end: Callable[[str], object],
        progress: Progress | None = None,
        every: float = 1.0,
        preparing: bool = False,
        stall_limit: float = STALL_LIMIT,
    ) -> None:
        self._silence = _LONG_SILENCE if preparing else _SILENCE
        self._delay = _SILENCE if preparing else 0  # heartbeats after which a rank that is gone counts as lost
        self._store, self._rank, self._peers, self._end, self._every = store, rank, peers, end, every
        self._progress, self._stall_limit = progress, stall_limit / every
        self._seen = {peer.rank: peer.visible for peer in peers}
        self._newest = {peer.rank: (b"", 0) for peer in peers}  # heartbeat, and how many of ours ago it arrived
        self._idle = self._longest_idle = 0
        self._last_position = (0, 0)
        self._closing = threading.Event()
        self._number = 0
        self._rounds = 0
        self._own = self.beat()
        self._threads = [threading.Thread(target=target, daemon=True) for target in (self._run, self._watch)]

    def start(self) -> None:
        """Begin to watch, once every rank has published its first heartbeat."""
        for thread in self._threads:
            thread.start()

    def beat(self) -> Heartbeat:
        """Publish a heartbeat."""
        self._number += 1
        self._own = Heartbeat(self._number) if self._progress is None else self._measure(self._progress)
        self._store.set(f"beat/{self._rank}", self._own.encode())
        return self._own

    def leave(self, why: str) -> None:
        """Stop watching, and publish why this rank ends."""
        self.close()
        with suppress(RuntimeError):  # the store may be gone too
            self._store.set(f"left/{self._rank}", why)

    def close(self) -> None:
        """Stop publishing and watching."""
        self._closing.set()
        for thread in self._threads:
            thread.join(10 * self._every)

    def wait(self) -> None:
        """Give the threads time to find out which rank is lost."""
        self._threads[1].join((_SILENCE + 5) * self._every)

    def _measure(self, progress: Progress) -> Heartbeat:
        position = progress.position
        if progress.excused:
            self._idle = 0
        elif position != self._last_position:
            self._longest_idle = max(self._longest_idle, self._idle)
            self._idle = 0
        else:
            self._idle += 1
        self._last_position = position
        stalled = self._idle >= max(self._stall_limit, 3 * self._longest_idle)
        where, waiting = progress.where() if stalled else ("", False)
        return Heartbeat(self._number, self._idle, stalled, progress.step, position, where, waiting)

    def _run(self) -> None:
        silent = 0.0  # heartbeats for which the store could not be reached
        while not self._closing.wait(self._every):
            began = time.monotonic()
            try:
                self.beat()
                lost = next(filter(None, map(self._lost, self._peers)), None)
                if not lost and (lost := self._stalled()):
                    self._store.set(f"left/{self._rank}", lost)  # or the others would say that this rank is gone
                    self._closing.wait(3 * self._every)  # for them to find the same; the store goes with the main rank
                silent = 0.0
            except RuntimeError:  # the main rank's store cannot be reached
                silent += 1 + (time.monotonic() - began) / self._every
                main = self._peers[0]
                gone = self._seen[main.rank] and not main.visible and silent >= self._delay
                lost = f"{main} is gone" if gone else self._silent(main, silent)
            self._rounds += 1
            if lost and not self._closing.is_set():
                self._end(lost)
                return

    def _watch(self) -> None:
        """See that `_run` goes on: where the main rank hangs, a call to its store may wait for ever."""
        before, times = -1, 0
        while not self._closing.wait(self._every):
            times = times + 1 if before == self._rounds else 0
            before = self._rounds
            if lost := self._silent(self._peers[0], times):
                self._end(lost)
                return

    def _lost(self, peer: Peer) -> str | None:
        newest = self._store.get(f"beat/{peer.rank}")
        before, times = self._newest[peer.rank]
        times = times + 1 if newest == before else 0
        self._newest[peer.rank] = newest, times
        if self._store.check([f"left/{peer.rank}"]):  # it has published why, and the others may be about to end as well
            return f"{peer} ended: {self._store.get(f'left/{peer.rank}').decode()}" if times >= _SILENCE else None
        if self._seen[peer.rank] and not peer.visible:
            return f"{peer} is gone" if times >= self._delay else None
        return self._silent(peer, times)

    def _silent(self, peer: Peer, beats: float) -> str | None:
        return f"{peer} has not been heard of for {beats * self._every:.0f} s" if beats >= self._silence else None

    def _stalled(self) -> str | None:
        """The ranks that others wait for, where no rank has made progress for too long."""
        if not self._own.stalled:
            return None
        everyone = {str(peer): Heartbeat.decode(self._newest[peer.rank][0]) for peer in self._peers}
        everyone[f"rank {self._rank} (pid {os.getpid()} on {socket.gethostname()})"] = self._own
        if not all(beat.stalled for beat in everyone.values()):
            return None
        held_up = {name: beat for name, beat in everyone.items() if not beat.waiting} or everyone
        first = min(beat.position for beat in held_up.values())
        named = {name: beat for name, beat in held_up.items() if beat.position == first}
        each = "; ".join(f"{name} at step {beat.step}, {beat.where}" for name, beat in sorted(named.items()))
        seconds = min(beat.idle for beat in everyone.values()) * self._every
        return f"no rank has made progress for {seconds:.0f} s, waiting for {each}"


@contextmanager
def watchdog(layout: ParallelLayout, preparing: bool = False, stall_limit: float = STALL_LIMIT) -> Iterator[None]:
    """Meanwhile a rank that is lost or stalled ends them all. All ranks must enter and leave; a single one may too.

    Args:
        preparing, stall_limit: see `Watchdog`.
    """
    if layout.mesh is None:
        yield
        return
    rank = layout.rank
    # The launcher's store is not accessible, and need not live on the machine of any rank.
    host = os.environ.get("MASTER_ADDR", "localhost")
    store = None
    if layout.is_main:
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=_STORE_TIMEOUT)
    port = layout.broadcast_object(store.port if store is not None else None)
    if store is None:
        store = dist.TCPStore(host, port, is_master=False, timeout=_STORE_TIMEOUT)
    everyone = [Peer(*each) for each in layout.all_gather_objects((rank, os.getpid(), socket.gethostname()))]
    others = [peer for peer in everyone if peer.rank != rank]
    progress = None if preparing else layout.progress
    watching = Watchdog(
        store, rank, others, lambda lost: _end(rank, lost), progress, preparing=preparing, stall_limit=stall_limit
    )
    layout.barrier()
    if not preparing:
        layout.set_timeout(_COLLECTIVE_TIMEOUT)
    watching.start()
    try:
        yield
        layout.barrier()
    except BaseException as error:
        if isinstance(error, RuntimeError):  # most often a collective that failed because a rank is gone
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher's, which has noticed as well
            watching.wait()
        watching.leave(f"{type(error).__name__}: {error}")
        raise
    watching.close()
    layout.barrier()  # the store goes with the main rank


def _end(rank: int, lost: str) -> NoReturn:
    """End this process at once: its main thread may wait for the lost rank inside a library, for ever."""
    remedy = "run the same command again to resume from the last checkpoint"
    sys.stderr.write(f"error: {lost}; rank {rank} ends as well: {remedy}\n")
    sys.stderr.flush()
    os._exit(1)
