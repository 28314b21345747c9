"""A trace of some training steps by torch.profiler, for Perfetto and TensorBoard; on CUDA with a memory snapshot."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from moetrain.atomic_io import PARTIAL
from moetrain.config import ProfileSettings
from moetrain.distributed.mesh import ParallelLayout

FOLDER = "profile"
_MOST_ALLOCATIONS = 100_000  # events of the allocator that a memory snapshot holds


class StepProfiler:
    """Profiles the steps that ``profile.start`` and ``profile.steps`` name, once; each rank writes its own files.

    Everything between the first and the last of these steps is in the trace, the monitor's work included. Each step is
    marked ``ProfilerStep#N`` with its number. A run that ends or stops within them writes what it has.

    Kineto prints two lines ``USDT:`` to stderr, at the begin and the end. A KINETO_LOG_LEVEL that hides them would hide
    its errors too.

    Args:
        run: the run's folder; files go to ``profile/`` in it.
        note: called on every rank with a line about the files, or about why they were not written.
    """

    def __init__(
        self, settings: ProfileSettings, run: Path, layout: ParallelLayout, note: Callable[[str], None]
    ) -> None:
        first = settings.start
        self._steps = range(first, first + settings.steps) if first is not None else range(0)
        self._folder, self._layout, self._note = run / FOLDER, layout, note
        self._on_cuda = layout.device.type == "cuda"
        self._running: profile | None = None
        self._recorded: list[int] = []

    def unreached(self, done: int, steps: int) -> str | None:
        """A line for the user where a launch that begins after ``done`` of ``steps`` steps reaches none of its own."""
        if not self._steps or self._folder.exists() or (self._steps[-1] > done and self._steps[0] <= steps):
            return None
        return (
            f"profile.start={self._steps[0]}: no trace is written, for steps {done + 1} to {steps} are trained now: "
            "set profile.start to one of them"
        )

    def __enter__(self) -> StepProfiler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._finish()
        elif self._running is not None:  # other ranks may have failed elsewhere: no collective
            self._running.stop()

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around training step ``step`` (1 the first). All ranks must call it for each step."""
        if step not in self._steps:
            yield
            return
        if self._running is None:
            self._start()
        with record_function(f"ProfilerStep#{step}"):
            yield
        self._recorded.append(step)
        if step == self._steps[-1]:
            self._finish()

    def _start(self) -> None:
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_cuda else [])]
        if self._on_cuda:
            torch.cuda.memory._record_memory_history(max_entries=_MOST_ALLOCATIONS)
        self._running = profile(activities=activities, record_shapes=True, acc_events=True)
        self._running.start()

    def _finish(self) -> None:
        running, self._running = self._running, None
        if running is None:
            return
        running.stop()
        name = f"step_{self._recorded[0]:08d}_rank_{self._layout.rank}"
        problem = None
        try:
            self._folder.mkdir(exist_ok=True)
            self._write(f"{name}.pt.trace.json", running.export_chrome_trace)
            if self._on_cuda:
                torch.cuda.synchronize(self._layout.device)
                self._write(f"{name}.memory.pickle", torch.cuda.memory._dump_snapshot)
        except (OSError, RuntimeError) as error:  # the latter from export, where a file cannot be written
            problem = str(error)
        if self._on_cuda:
            torch.cuda.memory._record_memory_history(enabled=None)
        steps = f"steps {self._recorded[0]} to {self._recorded[-1]}"
        problems = [each for each in self._layout.all_gather_objects(problem) if each is not None]
        if problems:
            self._note(f"profile of {steps}: not written ({problems[0]}); training goes on")
            return
        opens = "open the traces in ui.perfetto.dev or TensorBoard's profiler plugin"
        memory = ", the memory snapshots in pytorch.org/memory_viz" if self._on_cuda else ""
        self._note(f"profile of {steps}: in {self._folder}; {opens}{memory}")

    def _write(self, name: str, write: Callable[[str], object]) -> None:
        """Have a file written beside its place and moved there.

        Raises:
            OSError: it was not written.
        """
        partial = self._folder / (name + PARTIAL)
        write(str(partial))
        partial.replace(self._folder / name)
