"""Signals that ask a run to end, and how its processes agree on when."""

from __future__ import annotations

import signal
from types import FrameType

import torch

from moetrain.device_transfer import HostCopy
from moetrain.distributed.collectives import all_reduce_max

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


class StopAgreement:
    """All processes end after the same step, whichever of them was sent a signal.

    On CUDA they go by what was asked after the step before, whose answer is there: nobody waits for anybody.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._asked_before: HostCopy | None = None

    def ask(self, received: str | None) -> str | None:
        """The signal that any process was sent, the same answer on all of them; each has to ask after each step.

        Args:
            received: the signal that this one was sent, if any.
        """
        number = signal.Signals[received].value if received else 0
        asked = HostCopy([all_reduce_max(number, self._device)])
        answer = self._asked_before if self._device.type == "cuda" else asked
        self._asked_before = asked
        agreed = int(answer.wait()[0]) if answer is not None else 0
        return signal.Signals(agreed).name if agreed else None
