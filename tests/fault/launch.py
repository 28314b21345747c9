"""Runs in processes of their own, forked from one that has imported everything, so that they can be killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType

import torch

from moetrain.atomic_io import write_file
from moetrain.distributed import launch as ranks
from moetrain.train import main
from tests.distributed.ranks import free_port

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.fault.launch"])


class Launched:
    """A run's process. It prints to ``log``; ``place`` holds a launcher's environment variables."""

    def __init__(
        self, overrides: list[str], log: Path, fault: str = "", place: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        self.log = log
        if not _config(log).exists():  # once, before any rank reads it
            write_file(_config(log), "run: {name: run}")
        self._process = _context.Process(target=_run, args=(overrides, log, fault, dict(place)))
        self._process.start()

    def wait(self, seconds: float = 240) -> int:
        """Wait for its exit status, negative for the signal that ended it."""
        self._process.join(seconds)
        if self._process.exitcode is None:
            self._process.kill()
            raise TimeoutError(f"the run did not end:\n{self.log.read_text()}")
        return self._process.exitcode

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def signal(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def kill_after(self, seconds: float) -> int:
        """Kill it after a time, unless it ends before; returns its exit status."""
        self._process.join(seconds)
        self._process.kill()
        return self.wait()

    def wait_for(self, text: str, seconds: float = 60) -> None:
        """Wait until it has printed a text."""
        end = time.monotonic() + seconds
        while not (self.log.exists() and text in self.log.read_text()):
            if time.monotonic() > end:
                raise TimeoutError(f"the run never printed {text!r}:\n{self.log.read_text()}")
            time.sleep(0.01)


def run(overrides: list[str], log: Path, fault: str = "") -> int:
    """Exit status of a run with a fault of `moetrain.fault_injection`."""
    return Launched(overrides, log, fault).wait()


def launch(ranks: int, overrides: list[str], log: Path, fault: str = "") -> list[Launched]:
    """A run of several ranks on this machine, without a launcher that would end the others when one fails."""
    everyone = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    everyone |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    own = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    return [Launched(overrides, log, fault, {**everyone, **rank}) for rank in own]


def _config(log: Path) -> Path:
    return log.with_suffix(".yaml")


def _run(overrides: list[str], log: Path, fault: str, place: dict[str, str]) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    os.environ |= place
    ranks.JOIN_TIMEOUT = timedelta(seconds=60)  # one that is killed before it joins
    if fault:
        os.environ["MOETRAIN_FAULT"] = fault
    status = main([str(_config(log)), *overrides])
    sys.stdout.flush()
    sys.exit(status)
