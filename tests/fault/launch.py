"""Whole runs in processes of their own, forked from one that has imported everything, so that one can be killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch

from moetrain.train import main

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.fault.launch"])


class Launched:
    """A run's process. What it says is in ``log``; ``place`` is what a launcher would tell it in its environment."""

    def __init__(
        self, overrides: list[str], log: Path, fault: str = "", place: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        self.log = log
        self._process = _context.Process(target=_run, args=(overrides, log, fault, dict(place)))
        self._process.start()

    def wait(self, seconds: float = 240) -> int:
        """Its exit status, negative for the signal that ended it."""
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
        """Send it a signal, once it runs."""
        os.kill(self.pid, number)

    def kill_after(self, seconds: float) -> int:
        """Kill it after a time, or let it end before; its exit status."""
        self._process.join(seconds)
        self._process.kill()
        return self.wait()

    def wait_for(self, text: str, seconds: float = 60) -> None:
        """Wait until it has said something."""
        end = time.monotonic() + seconds
        while not (self.log.exists() and text in self.log.read_text()):
            if time.monotonic() > end:
                raise TimeoutError(f"the run never said {text!r}:\n{self.log.read_text()}")
            time.sleep(0.01)


def run(overrides: list[str], log: Path, fault: str = "") -> int:
    """Exit status of a run, with a fault point of `moetrain.fault_injection` switched on."""
    return Launched(overrides, log, fault).wait()


def launch(processes: int, overrides: list[str], log: Path, fault: str = "") -> list[Launched]:
    """A run of several processes on this machine, without a launcher that would look after them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    everyone = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    everyone |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    return [Launched(overrides, log, fault, {**everyone, **rank}) for rank in ranks]


def _run(overrides: list[str], log: Path, fault: str, place: dict[str, str]) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    os.environ |= place
    if fault:
        os.environ["MOETRAIN_FAULT"] = fault
    config = log.with_suffix(".yaml")
    config.write_text("run: {name: run}")
    status = main([str(config), *overrides])
    sys.stdout.flush()
    sys.exit(status)
