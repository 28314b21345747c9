"""What stops or skips a step: numbers that are not finite, and signals to end."""

from __future__ import annotations

import signal
from collections import deque
from types import FrameType

import torch

from moetrain.training.parallel import largest_over_processes
from moetrain.transfer import HostCopy

STOPPED_BY_SIGNAL = 75
"""Exit status of a run that saved and ended because it was told to; running it again continues it."""


class TrainingDivergedError(RuntimeError):
    """Too many steps in a row whose loss or gradient was not finite."""


class FiniteGuard:
    """Counts skipped updates; after ``patience`` in a row training stops.

    On CUDA it hears of a step while the next one is under way: to hear of it at once, the host would have to wait.
    """

    def __init__(self, patience: int = 10) -> None:
        self.patience = patience
        self.skipped = 0
        self.in_a_row = 0
        self._coming: deque[tuple[int, HostCopy]] = deque()

    def check(self, made: torch.Tensor, step: int) -> list[int]:
        """Take note of whether a step's update was made; returns the steps now known to have been skipped.

        Raises:
            TrainingDivergedError: ``patience`` steps in a row were all skipped.
        """
        self._coming.append((step, HostCopy([made])))
        return self._hear(waiting=1 if made.device.type == "cuda" else 0)

    def settle(self) -> list[int]:
        """Wait for what is not known yet, as before a checkpoint; returns and raises as `check`."""
        return self._hear(waiting=0)

    def _hear(self, waiting: int) -> list[int]:
        skipped = []
        while len(self._coming) > waiting:
            step, copy = self._coming.popleft()
            made = bool(copy.wait()[0])
            self._count(made, step)
            if not made:
                skipped.append(step)
        return skipped

    def _count(self, finite: bool, step: int) -> None:
        self.in_a_row = 0 if finite else self.in_a_row + 1
        self.skipped += not finite
        if self.in_a_row >= self.patience:
            raise TrainingDivergedError(
                f"step {step}: the gradient was not finite in {self.patience} steps in a row: "
                "lower optim.learning_rate, or set train.precision=fp32, and resume from a checkpoint before it"
            )

    def state(self) -> dict[str, int]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state(self, state: dict[str, int]) -> None:
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]


class StopSignals:
    """SIGTERM and SIGINT ask for an end after the step in progress; a second one ends at once."""

    def __init__(self) -> None:
        self.received: str | None = None

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name


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
        asked = HostCopy([largest_over_processes(number, self._device)])
        answer = self._asked_before if self._device.type == "cuda" else asked
        self._asked_before = asked
        agreed = int(answer.wait()[0]) if answer is not None else 0
        return signal.Signals(agreed).name if agreed else None
