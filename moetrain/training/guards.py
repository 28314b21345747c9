"""What stops or skips a step: numbers that are not finite, and signals to end."""

from __future__ import annotations

import signal
from types import FrameType

STOPPED_BY_SIGNAL = 75
"""Exit status of a run that saved and ended because it was told to; running it again continues it."""


class TrainingDivergedError(RuntimeError):
    """Too many steps in a row whose loss or gradient was not finite."""


class FiniteGuard:
    """Counts skipped updates; after ``patience`` in a row training stops."""

    def __init__(self, patience: int = 10) -> None:
        self.patience = patience
        self.skipped = 0
        self.in_a_row = 0

    def check(self, finite: bool, step: int) -> None:
        """Take note of a step.

        Raises:
            TrainingDivergedError: the last ``patience`` steps were all skipped.
        """
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
