"""What a rank's main thread is doing, for the watchdog."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

# Python files whose functions wait for other ranks, or, on a device, for queued work that does.
_WAITING = (
    "torch/distributed/",
    "torch/autograd/",
    "torch/cuda/",
    "moetrain/device_transfer.py",
    "moetrain/models/experts_exchange.py",
)
_COMPILER = ("torch/_dynamo/convert_frame.py", "torch/_inductor/compile_fx.py")


@dataclass
class Progress:
    """Marks of progress, set by the main thread and read by the watchdog's thread.

    Long loops call `mark` once per pass, so that only a rank that hangs makes no progress. A single call that may take
    minutes on one rank while the others wait (saving, a report) runs inside `busy`.
    """

    step: int = 0  # the training step in progress, 1 the first
    finished_steps: int = 0  # of this process
    marks: int = 0  # since the last finished step
    _busy: int = 0
    _main_thread: int = field(default_factory=threading.get_ident)

    def mark(self) -> None:
        """Note that this rank has done something since the last mark."""
        self.marks += 1

    def finish_step(self) -> None:
        """Note the end of a training step."""
        self.finished_steps += 1
        self.marks = 0

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Meanwhile no marks are expected."""
        self._busy += 1
        try:
            yield
        finally:
            self._busy -= 1
            self.mark()

    @property
    def position(self) -> tuple[int, int]:
        """How far this rank is: comparable between ranks that run the same program."""
        return self.finished_steps, self.marks

    @property
    def excused(self) -> bool:
        """Whether no marks are expected now: before the end of the first step, while busy, or while compiling."""
        return not self.finished_steps or self._busy > 0 or _is_compiling()

    def where(self) -> tuple[str, bool]:
        """The main thread's innermost line in moetrain, and whether it seems to wait for other ranks there."""
        frame = sys._current_frames().get(self._main_thread)
        if frame is None:
            return "unknown", False
        waiting = any(part in frame.f_code.co_filename for part in _WAITING)
        innermost = next((f for f in _outwards(frame) if "moetrain/" in f.f_code.co_filename), frame)
        file = innermost.f_code.co_filename.rpartition("moetrain/")[2]
        return f"{file}:{innermost.f_lineno} in {innermost.f_code.co_name}", waiting


def _is_compiling() -> bool:
    """Whether torch.compile is at work in any thread of this process: backward passes compile in others."""
    return any(
        frame.f_code.co_filename.endswith(_COMPILER)
        for innermost in sys._current_frames().values()
        for frame in _outwards(innermost)
    )


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    """A frame and its callers."""
    while frame is not None:
        yield frame
        frame = frame.f_back
