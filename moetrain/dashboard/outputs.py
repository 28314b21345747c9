"""A run's files and display, on its main process: TensorBoard, events, terminal, and the newest values by domain."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moetrain.dashboard.events import Events, as_event
from moetrain.dashboard.figures import heat_map
from moetrain.dashboard.summary import as_metric
from moetrain.dashboard.tensorboard import TensorBoard, cut_run_files, event_file_sizes
from moetrain.dashboard.terminal import Terminal
from moetrain.routing.monitor import StreamReading
from moetrain.routing.panel_monitor import PanelPoints
from moetrain.training.checkpoint import Checkpoint, checkpoint_folder
from moetrain.training.evaluation import HeldOutLoss


class Outputs:
    """Takes what the run found, at a step, to every place that shows it.

    ``domains`` holds, by domain, the newest value of each metric in the form of ``summary.json``; it is part of a
    checkpoint, so that a resumed run's summary is the straight run's.
    """

    def __init__(self, folder: Path, domains: Sequence[str], checkpoint: Checkpoint | None, terminal: Terminal) -> None:
        if checkpoint is not None:
            cut_run_files(folder, checkpoint.run_files)
        self.folder = folder
        self.domains: dict[str, dict[str, Any]] = {name: {"metrics": {}} for name in domains}
        self._terminal = terminal
        self._full = False  # whether the disk had no room for points and events when they were last written
        self._events = Events(folder)
        self._board = TensorBoard(folder, purge_step=checkpoint.step + 1 if checkpoint else None)
        self._board.lay_out(domains)
        if checkpoint is not None:
            self.domains = checkpoint.record["domains"]
            self._events.write("resume", checkpoint.step)
        self._flush(checkpoint.step if checkpoint else 0)

    def training(self, step: int, points: Mapping[str, float], system: Mapping[str, float]) -> None:
        """A point of the training curves, and what it cost."""
        self._board.scalars({**points, **system}, step)
        shown: dict[str, dict[str, float]] = {}
        for name in self.domains:
            loss = points.get(f"loss/train/{name}")
            if loss is not None:
                self._note(name, "train_loss", loss, None)
                shown[name] = {"loss": loss}
        self._terminal.training(step, points["loss/train"], system["system/tokens_per_second"], shown)
        self._flush(step)

    def validation(self, step: int, losses: Mapping[str, HeldOutLoss]) -> None:
        """Held-out loss by domain."""
        for name, heldout in losses.items():
            self._board.scalar(f"loss/validation/{name}", heldout.loss, step)
            self._board.scalar(f"loss/validation_bpb/{name}", heldout.bits_per_byte, step)
            self._note(name, "validation_loss", heldout.loss, heldout.tokens)
            self._note(name, "bits_per_byte", heldout.bits_per_byte, heldout.tokens)
            self._terminal.values(name, {"held-out": heldout.loss, "bits/byte": heldout.bits_per_byte})

    def streaming(self, step: int, readings: Sequence[StreamReading]) -> None:
        """The streaming metrics by domain; one without a value has no point."""
        for reading in readings:
            for metric, estimate in reading.metrics.items():
                self._note(reading.domain, f"stream/{metric}", estimate, None)
                if estimate.mean == estimate.mean:
                    self._board.scalar(f"stream/{metric}/{reading.domain}", estimate.mean, step)
            shown = {"D_path": reading.metrics["d_path"].mean, "cosine": reading.metrics["cosine"].mean}
            self._terminal.values(reading.domain, shown)

    def panel(self, points: PanelPoints) -> None:
        """The metrics of a panel reading."""
        for tag, estimate in points.metrics.items():
            self._board.scalar(tag, estimate.mean, points.step)
            metric, _, domain = tag.rpartition("/")
            self._note(domain, metric, estimate, None)
            if metric in ("memorized/gap_heldout", "pathway/spread"):
                self._terminal.values(domain, {metric.rpartition("/")[2]: estimate.mean})
        for tag, matrix in points.matrices.items():
            high = 2.0 if tag.startswith("experts/load") else 1.0
            self._board.image(tag, heat_map(matrix, 0.0, high), points.step)
        for tag, values in points.distributions.items():
            self._board.histogram(tag, values, points.step)
        for domain, verdict in points.phases.items():
            self._board.scalar(f"phase/{domain}", float(verdict.phase), points.step)
            self.domains[domain]["phase"] = verdict.phase.name.lower()
        for domain, change in points.changes.items():
            self._events.write("phase", points.step, domain=domain, **as_event(change))
            self._terminal.note(
                f"step {points.step}: {domain} is {change.after.name.lower()}: {change.verdict.sentence}"
            )
        self._flush(points.step)

    def checkpoint(self, step: int, write: Callable[[dict[str, int]], object]) -> bool:
        """Have a checkpoint written, given the sizes its manifest needs; whether it was.

        The event stands before the sizes are taken, so that a resumed run keeps it; where the writing fails, for
        instance on a full disk, it is taken back, the run is told so, and goes on.
        """
        before = None
        try:
            self._events.flush()
            before = self._events.size
            self._events.write("checkpoint", step, folder=checkpoint_folder(Path(), step).as_posix())
            self._events.flush(durable=True)
            self._board.flush(durable=True)
            write(event_file_sizes(self.folder) | {"events.jsonl": self._events.size})
        except OSError as error:
            if before is not None:
                self._events.cut(before)
            self.guard(step, f"no checkpoint was written ({error}); the one before it stands")
            return False
        return True

    def guard(self, step: int, problem: str) -> None:
        """Something that went wrong and that training survived."""
        self._terminal.note(f"step {step}: {problem}")
        self._events.write("guard", step, problem=problem)
        self._flush(step)

    def close(self) -> None:
        """Write what still waits.

        Raises:
            OSError: there is no room for it.
        """
        self._events.flush(durable=True)
        self._board.flush(durable=True)

    def _flush(self, step: int) -> None:
        """Write points and events; those that the disk has no room for wait for the next time, which is told once."""
        try:
            self._events.flush()
            self._board.flush()
        except OSError as error:
            if not self._full:
                self._terminal.note(f"step {step}: {error}: points and events wait in memory until there is room")
            self._full = True
        else:
            self._full = False

    def _note(self, domain: str, metric: str, value: Any, n: int | None) -> None:
        self.domains[domain]["metrics"][metric] = as_metric(value, n)
