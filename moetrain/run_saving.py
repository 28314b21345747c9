"""Saving a run: its checkpoints, which may be written while training goes on, and what it says of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moetrain.checkpoint.background import CheckpointWriter, Write
from moetrain.checkpoint.manager import State, prune_checkpoints, save_checkpoint
from moetrain.config import TrainSettings
from moetrain.distributed.mesh import ParallelLayout
from moetrain.loggers.run_logger import RunLogger
from moetrain.routing.store import list_files


class RunSaver:
    """Writes a run's checkpoints, removes old ones, and logs failures. Every rank has one; all make the same calls.

    Attributes:
        saved: whether the newest checkpoint of which that is known was written; True before the first.
    """

    def __init__(self, settings: TrainSettings, layout: ParallelLayout) -> None:
        self.saved = True
        self._settings = settings
        self._writer = CheckpointWriter(layout, settings.background_checkpoints)

    def begin(
        self, run: Path, step: int, tensors: Mapping[str, State], record: dict[str, Any], logger: RunLogger | None
    ) -> None:
        """Begin to write a checkpoint, once the one before is written.

        Args:
            record: JSON; the list of routing files is added.
            logger: on the main rank.
        """
        self.finish(logger)
        self._writer.write(step, tensors, self._write(run, step, record, logger))

    @property
    def done(self) -> bool:
        """Whether a checkpoint was written since the last `finish`."""
        return self._writer.done

    def finish(self, logger: RunLogger | None) -> bool:
        """Wait for the checkpoint being written, log what failed, and say whether the newest one was saved."""
        if (outcome := self._writer.finish()) is not None:
            self.saved = outcome.saved
            if logger is not None:
                if outcome.problem:
                    logger.checkpoint_failed(outcome.step, outcome.problem)
                for remark in outcome.remarks:
                    logger.guard(outcome.step, remark)
        return self.saved

    def close(self) -> None:
        """Wait for the checkpoint being written, unless other ranks take part, which may be gone."""
        self._writer.close()

    def _write(self, run: Path, step: int, record: dict[str, Any], logger: RunLogger | None) -> Write | None:
        """On the main rank, what writes a checkpoint; None where it cannot be written."""
        if logger is None or (sizes := logger.begin_checkpoint(step)) is None:
            return None
        record = record | {"pieces": list_files(run)}

        def write(tensors: Mapping[str, State], layout: ParallelLayout) -> list[str]:
            save_checkpoint(run, step, tensors, record, sizes, layout)
            try:
                prune_checkpoints(run, self._settings.keep_checkpoints, self._settings.keep_every)
            except OSError as error:
                return [f"an old checkpoint was not removed ({error})"]
            return []

        return write
