"""A process that dies or hangs ends the run within a minute, and the others say which it was.

Left alone, they would wait for it: a collective call to a process that is gone may return only after hours.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

from moetrain.distributed.mesh import ParallelLayout

_SILENCE = 20  # beats missed, of one a second
_LONG_SILENCE = 3600  # the same, while data is prepared: that may hold the interpreter, and with it the beats
_PATIENCE = timedelta(seconds=5)  # with the store


@dataclass(frozen=True)
class Peer:
    """Another process of the run."""

    rank: int
    pid: int
    host: str

    def __str__(self) -> str:
        return f"process {self.rank} (pid {self.pid} on {self.host})"

    @property
    def visible(self) -> bool:
        """Whether this process can see it alive: it is on the same machine, and no container is between them."""
        try:
            state = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (OSError, IndexError):
            return False
        return self.host == socket.gethostname() and state not in "ZX"


class Heartbeat:
    """Beats into a store that all processes share, on threads, and listens for the others there.

    Time is counted in beats of its own: a machine that was put to sleep wakes up with all its processes.

    Args:
        store: holds the beats; it goes when the main process does.
        rank: this process.
        peers: the others.
        end: told who is lost and how, by a thread; ends this process.
        preparing: nothing but a process that is gone ends this one, and not before it had the time to come to the same
            error by itself.
        every: seconds between beats.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        peers: list[Peer],
        end: Callable[[str], object],
        every: float = 1.0,
        preparing: bool = False,
    ) -> None:
        self._limit = _LONG_SILENCE if preparing else _SILENCE
        self._delay = _SILENCE if preparing else 0  # beats after which a process counts as gone
        self._store, self._rank, self._peers, self._end, self._every = store, rank, peers, end, every
        self._seen = {peer.rank: peer.visible for peer in peers}
        self._heard = {peer.rank: (b"", 0) for peer in peers}  # newest beat, and for how many beats of ours
        self._closing = threading.Event()
        self._beats = 0
        self._rounds = 0
        self.beat()
        self._threads = [threading.Thread(target=target, daemon=True) for target in (self._run, self._watch)]

    def start(self) -> None:
        """Listen, once every process has beaten for the first time."""
        for thread in self._threads:
            thread.start()

    def beat(self) -> None:
        self._beats += 1
        self._store.set(f"beat/{self._rank}", str(self._beats))

    def leave(self, why: str) -> None:
        """End alone, for a reason that the others are to be told."""
        self.close()
        with suppress(RuntimeError):  # the store may be gone too
            self._store.set(f"left/{self._rank}", why)

    def close(self) -> None:
        """Beat and listen no more."""
        self._closing.set()
        for thread in self._threads:
            thread.join(10 * self._every)

    def wait(self) -> None:
        """Give the threads the time to find out who is lost."""
        self._threads[1].join((_SILENCE + 5) * self._every)

    def _run(self) -> None:
        silent = 0.0  # beats for which the store has not been reached
        while not self._closing.wait(self._every):
            began = time.monotonic()
            try:
                self.beat()
                lost = next(filter(None, map(self._lost, self._peers)), None)
                silent = 0.0
            except RuntimeError:  # what the store raises when it cannot be reached: it is the main process's
                silent += 1 + (time.monotonic() - began) / self._every
                main = self._peers[0]
                gone = self._seen[main.rank] and not main.visible and silent >= self._delay
                lost = f"{main} is gone" if gone else self._unheard(main, silent)
            self._rounds += 1
            if lost and not self._closing.is_set():
                self._end(lost)
                return

    def _watch(self) -> None:
        """See that `_run` goes on: where the main process hangs, a call to its store may wait for ever."""
        before, times = -1, 0
        while not self._closing.wait(self._every):
            times = times + 1 if before == self._rounds else 0
            before = self._rounds
            if lost := self._unheard(self._peers[0], times):
                self._end(lost)
                return

    def _lost(self, peer: Peer) -> str | None:
        newest = self._store.get(f"beat/{peer.rank}")
        before, times = self._heard[peer.rank]
        times = times + 1 if newest == before else 0
        self._heard[peer.rank] = newest, times
        if self._store.check([f"left/{peer.rank}"]):  # it has told why, and the others may be about to end as well
            return f"{peer} ended: {self._store.get(f'left/{peer.rank}').decode()}" if times >= _SILENCE else None
        if self._seen[peer.rank] and not peer.visible:
            return f"{peer} is gone" if times >= self._delay else None
        return self._unheard(peer, times)

    def _unheard(self, peer: Peer, beats: float) -> str | None:
        return f"{peer} has not been heard of for {beats * self._every:.0f} s" if beats >= self._limit else None


@contextmanager
def heartbeat(layout: ParallelLayout, preparing: bool = False) -> Iterator[None]:
    """Meanwhile a process that is lost ends them all. They leave together; one alone has nothing to do here.

    Args:
        preparing: as `Heartbeat` has it.
    """
    if layout.mesh is None:
        yield
        return
    rank = layout.rank
    # The launch's own store cannot be had, and need not live on the machine of any process.
    host = os.environ.get("MASTER_ADDR", "localhost")
    store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=_PATIENCE) if rank == 0 else None
    port = layout.all_gather_objects(store.port if store is not None else None)[0]
    if store is None:
        store = dist.TCPStore(host, port, is_master=False, timeout=_PATIENCE)
    everyone = [Peer(*told) for told in layout.all_gather_objects((rank, os.getpid(), socket.gethostname()))]
    others = [peer for peer in everyone if peer.rank != rank]
    beating = Heartbeat(store, rank, others, lambda lost: _end(rank, lost), preparing=preparing)
    layout.all_gather_objects(None)
    beating.start()
    try:
        yield
        layout.barrier()
    except BaseException as error:
        if isinstance(error, RuntimeError):  # most often a call that failed because a process is gone
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher's, which has noticed as well
            beating.wait()
        beating.leave(f"{type(error).__name__}: {error}")
        raise
    beating.close()
    layout.all_gather_objects(None)  # the store goes with the main process


def _end(rank: int, lost: str) -> NoReturn:
    """End this process at once: its main thread may wait for the lost one within a library, for ever."""
    said = f"error: {lost}; process {rank} ends as well: run the same command again to go on from the last checkpoint\n"
    sys.stderr.write(said)
    sys.stderr.flush()
    os._exit(1)
