"""Signals that ask a run to end."""

from __future__ import annotations

import signal
from types import FrameType

STOPPED_BY_SIGNAL = 75
"""Exit status of a run that saved and ended because it was told to; running it again continues it."""


class StopSignals:
    """SIGTERM and SIGINT ask for an end after the step in progress; a second one ends the process at once."""

    def __init__(self) -> None:
        self.received: str | None = None

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        # The system's own action needs no interpreter, which may be deep in a library: it ends the process even there.
        for asked in self._before:
            signal.signal(asked, signal.SIG_DFL)
