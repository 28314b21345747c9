"""Signals that ask a run to stop, and how all ranks agree on the step after which they do."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

from moetrain.device_transfer import HostCopy
from moetrain.distributed.mesh import ParallelLayout

STOPPED_BY_SIGNAL = 75
"""Exit status of a run that saved and stopped because of a signal; running it again resumes it."""


class StopSignals:
    """SIGTERM and SIGINT ask for a stop after the current step; a second one ends the process at once."""

    def __init__(self) -> None:
        self.received: str | None = None

    def __enter__(self) -> StopSignals:
        self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        # The default action needs no interpreter, so it ends the process even deep inside a library.
        for handled in self._previous:
            signal.signal(handled, signal.SIG_DFL)


class SignalNotice:
    """Says at once that a signal was received, and what keeps the process from acting on it.

    Python acts on a signal when the main thread is back from C code, which a backward pass or a collective may keep for
    long. So a thread says it. Only the main thread may enter this; signals without a handler of Python are not noticed.

    Args:
        say: called from that thread with a line.
        waiting: called from that thread; what is waited for, or an empty text.
    """

    def __init__(self, say: Callable[[str], None], waiting: Callable[[], str]) -> None:
        self._say, self._waiting = say, waiting

    def __enter__(self) -> SignalNotice:
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._previous = signal.set_wakeup_fd(self._write)
        self._thread = threading.Thread(target=self._notice, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._previous)
        os.close(self._write)
        self._thread.join()
        os.close(self._read)

    def _notice(self) -> None:
        while number := os.read(self._read, 1):
            if number[0] in (signal.SIGTERM, signal.SIGINT):
                waiting = self._waiting()
                self._say(f"{signal.Signals(number[0]).name} received{'; waiting for: ' if waiting else ''}{waiting}")


class StopAgreement:
    """All ranks stop after the same step, whichever of them received a signal.

    On CUDA they act on the signals of the step before, whose reduction has finished, so that the host does not wait.
    """

    def __init__(self, layout: ParallelLayout) -> None:
        self._layout = layout
        self._previous: HostCopy | None = None

    def ask(self, received: str | None) -> str | None:
        """The signal that any rank received, the same on all ranks. A collective: all ranks must call it each step.

        Args:
            received: the signal that this rank received, if any.
        """
        number = signal.Signals[received].value if received else 0
        current = HostCopy([self._layout.all_reduce_max(number)])
        answer = self._previous if self._layout.device.type == "cuda" else current
        self._previous = current
        agreed = int(answer.wait()[0]) if answer is not None else 0
        return signal.Signals(agreed).name if agreed else None
