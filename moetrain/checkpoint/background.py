"""Checkpoints written by a thread, from copies of the state in host memory, while training goes on.

Training waits for the copy, not for the disk. The copies are made by torch's checkpoint stager, in pinned memory on
CUDA; their memory is kept for the next checkpoint. One checkpoint is written at a time: the next one waits for it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch.distributed as dist
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from moetrain.checkpoint.host_memory import available_memory
from moetrain.checkpoint.manager import State, end_write, help_write
from moetrain.checkpoint.sharded_tensors import is_sharded
from moetrain.distributed.mesh import ParallelLayout
from moetrain.distributed.progress import Progress
from moetrain.dtensor import local_tensor

Write = Callable[[Mapping[str, State], ParallelLayout], list[str]]
"""Writes the given states with the given layout's collectives; returns lines about what did not quite succeed.

It raises OSError where nothing was written."""

_LARGEST_SHARE = 0.5  # of the memory that is available, which copies may take


@dataclass(frozen=True)
class Outcome:
    """What became of a checkpoint: the same ``saved`` on all ranks, the rest on the main rank."""

    step: int
    saved: bool
    problem: str = ""  # why it was not saved
    remarks: tuple[str, ...] = ()


class CheckpointWriter:
    """Writes a run's checkpoints, one at a time. Every rank has one, and all ranks make the same calls.

    Args:
        background: write in a thread; False writes within `write`, whose caller then waits; None: in a thread where the
            copies of this machine's ranks fit into half of its available memory.
    """

    def __init__(self, layout: ParallelLayout, background: bool | None = None) -> None:
        self._layout = layout
        self._background = background
        self._writing: ParallelLayout | None = None
        self._stager: DefaultStager | None = None
        self._thread: threading.Thread | None = None
        self._outcome: Outcome | BaseException | None = None

    def write(self, step: int, states: Mapping[str, State], write: Write | None) -> None:
        """Begin to write a checkpoint of the states as they are now; `finish` must have been called since the last.

        Args:
            write: on the main rank; None where nothing is to be written, and on other ranks.
        """
        assert self._outcome is None
        assert self._thread is None
        if not self._layout.is_main:  # other ranks write nothing but their shards
            states = {owner: state for owner, state in states.items() if is_sharded(state)}
        if self._background is None:
            self._background = self._fits(states)
        if not self._background:
            self._outcome = self._run(step, states, write, self._layout)
            return
        if self._writing is None:
            self._writing = _with_own_group(self._layout)
            cuda = self._layout.device.type == "cuda"
            self._stager = DefaultStager(StagingOptions(cuda, False, False, cuda))
        assert self._stager is not None
        copies = self._stager.stage({owner: dict(state) for owner, state in states.items()})
        self._thread = threading.Thread(
            target=self._run_in_thread, args=(step, copies, write, self._writing), name="checkpoint", daemon=True
        )
        self._thread.start()

    @property
    def done(self) -> bool:
        """Whether `finish` would return something, and at once. Ranks may differ."""
        return self._outcome is not None

    def finish(self) -> Outcome | None:
        """Wait for the checkpoint being written; None if there is none. Each outcome is returned once.

        Raises:
            Exception: what writing raised, other than OSError.
        """
        if self._thread is not None:
            with self._layout.progress.busy():
                self._thread.join()
            self._thread = None
        outcome, self._outcome = self._outcome, None
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def close(self) -> None:
        """Wait for the checkpoint being written, unless other ranks take part, which may be gone."""
        if self._thread is not None and self._layout.world_size == 1:
            self._thread.join()
        if self._stager is not None:
            self._stager.close()

    def _run_in_thread(
        self, step: int, states: Mapping[str, State], write: Write | None, layout: ParallelLayout
    ) -> None:
        try:
            self._outcome = self._run(step, states, write, layout)
        except BaseException as error:  # raised by `finish`
            self._outcome = error

    @staticmethod
    def _run(step: int, states: Mapping[str, State], write: Write | None, layout: ParallelLayout) -> Outcome:
        saved, problem, remarks = False, "", []
        if layout.is_main:
            try:
                if write is not None:
                    with layout.progress.busy():
                        remarks = write(states, layout)
                    saved = True
            except OSError as error:
                problem = str(error)
            finally:
                end_write(layout)
        else:
            help_write(states, layout)
        return Outcome(step, layout.broadcast_object(saved), problem, tuple(remarks))

    def _fits(self, states: Mapping[str, State]) -> bool:
        """Whether all ranks of each machine have memory for copies; the same answer on all ranks."""
        own = sum(local_tensor(tensor).nbytes for state in states.values() for tensor in state.values())
        available = available_memory()
        fits = available is not None and own * self._layout.local_world_size <= _LARGEST_SHARE * available
        return all(self._layout.all_gather_objects(fits))


def _with_own_group(layout: ParallelLayout) -> ParallelLayout:
    """The layout with a process group of its own, so that collectives of two threads do not mix."""
    group = dist.new_group(backend="gloo") if layout.mesh is not None else None
    return replace(layout, object_group=group, progress=Progress())
