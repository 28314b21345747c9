"""What a run shows: points, images and events into its folder and to trackers, lines and tables into the terminal.

A pure consumer, on the main rank: nothing here is part of a checkpoint or read back by a measurement.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from moetrain.checkpoint.manager import Checkpoint, checkpoint_folder, list_checkpoints
from moetrain.grokking import Estimate
from moetrain.loggers.events import Events, as_event
from moetrain.loggers.heat_map import heat_map
from moetrain.loggers.monitor_page import FIRST_GROUP
from moetrain.loggers.phase_image import phase_image
from moetrain.loggers.tensorboard import TensorBoard, cut_run_files, event_file_sizes
from moetrain.loggers.terminal import Terminal
from moetrain.loggers.trackers import Points, Tracker
from moetrain.probes.scoring import TaskScore
from moetrain.probes.tasks import Task
from moetrain.routing.panel_monitor import PanelPoints
from moetrain.routing.stream import StreamReading
from moetrain.training.evaluation import HeldOutLoss
from moetrain.training.incidents import Incident

_STREAM = {"d_path": "D_path", "cosine": "cosine"}
_PANEL = {
    "memorized/share": "memorized share",
    "memorized/gap_heldout": "gap to held-out",
    "pathway/spread": "spread, panel",
}
"""Metrics of the live display, with their titles."""


class RunLogger:
    """Writes what a run measured to every place that shows it.

    Args:
        checkpoint: that the run resumes from: later points and events are removed.
        tasks: probes that the TensorBoard page shows.
        trackers: experiment trackers by name, already started.
    """

    def __init__(
        self,
        folder: Path,
        domains: Sequence[str],
        checkpoint: Checkpoint | None,
        terminal: Terminal,
        tasks: Sequence[Task] = (),
        trackers: Mapping[str, Tracker] | None = None,
    ) -> None:
        if checkpoint is not None:
            cut_run_files(folder, checkpoint.run_files)
        self.folder = folder
        self._domains = list(domains)
        self._terminal = terminal
        self._checkpoint_event = (0, 0)  # where the newest checkpoint's event begins and ends in the events
        self._disk_full = False  # whether the last write of points and events found no room
        self._events = Events(folder)
        self._points = Points(trackers or {}, terminal.note)
        self._board = TensorBoard(folder, purge_step=checkpoint.step + 1 if checkpoint else None)
        self._board.lay_out(domains, [task.name for task in tasks], [task.name for task in tasks if task.trained])
        if checkpoint is not None:
            self._events.write("resume", checkpoint.step)
        self._flush(checkpoint.step if checkpoint else 0)

    def training(self, step: int, points: Mapping[str, float], system: Mapping[str, float]) -> None:
        """A point of the training curves, and what it cost."""
        for tag, value in {**points, **system}.items():
            self._scalar(tag, value, step)
        tags = {name: f"loss/train/{name}" for name in self._domains}
        shown = {name: {"loss": points[tag]} for name, tag in tags.items() if tag in points}
        self._terminal.training(step, points["loss/train"], system["system/tokens_per_second"], shown)
        self._flush(step)

    def validation(self, step: int, losses: Mapping[str, HeldOutLoss]) -> None:
        """Held-out loss per domain."""
        for name, heldout in losses.items():
            self._scalar(f"loss/validation/{name}", heldout.loss, step)
            self._scalar(f"loss/validation_bpb/{name}", heldout.bits_per_byte, step)
            self._terminal.values(name, {"held-out": heldout.loss, "bits/byte": heldout.bits_per_byte})

    def streaming(self, step: int, readings: Sequence[StreamReading]) -> None:
        """The streaming metrics per domain; one without a value has no point."""
        for reading in readings:
            for metric, estimate in reading.metrics.items():
                if estimate.mean == estimate.mean:
                    self._scalar(f"stream/{metric}/{reading.domain}", estimate.mean, step)
            shown = {f"{title}, stream": reading.metrics[name].mean for name, title in _STREAM.items()}
            self._terminal.values(reading.domain, shown)

    def metrics(self, step: int, estimates: Mapping[str, Estimate]) -> None:
        """Points of metrics by tag."""
        for tag, estimate in estimates.items():
            self._scalar(tag, estimate.mean, step)

    def repeats(self, step: int, domain: str, sentence: str) -> None:
        """What the next pass over a repeated domain is worth, in words."""
        self._events.write("repeat", step, domain=domain, sentence=sentence)
        self._terminal.note(f"step {step}: {sentence}")

    def panel(self, points: PanelPoints) -> None:
        """The metrics of a panel reading."""
        for tag, estimate in points.metrics.items():
            self._scalar(tag, estimate.mean, points.step)
            metric, _, domain = tag.rpartition("/")
            if metric in _PANEL:
                self._terminal.values(domain, {_PANEL[metric]: estimate.mean})
            if metric == "memorized/share":
                self._scalar(f"{FIRST_GROUP}/memorized_share/{domain}", estimate.mean, points.step, same_as=tag)
        for tag, matrix in points.matrices.items():
            self._image(tag, heat_map(matrix.values, 0.0, matrix.top), points.step)
        for tag, values in points.distributions.items():
            self._board.histogram(tag, values, points.step)
        for domain, verdict in points.phases.items():
            self._scalar(f"phase/{domain}", float(verdict.phase), points.step)
        self._verdicts(points)
        for domain, change in points.changes.items():
            self._events.write("phase", points.step, domain=domain, **as_event(change))
            self._terminal.note(f"step {points.step}: {domain} is {change.after.name.lower()}: {change.verdict.why}")
        if points.broken:
            self.guard(points.step, f"routing or loss of {points.broken} panel samples is not finite: skipped")
        for domain, memorized in points.memorized.items():
            self.memorized(points.step, domain, {"rule": "online", **asdict(memorized)})
        self._flush(points.step)

    def _verdicts(self, points: PanelPoints) -> None:
        """The verdicts where TensorBoard does not smooth them: as an image over time, and in words."""
        course = {domain: [verdict.phase for verdict in own] for domain, own in points.verdicts.items()}
        steps = [verdict.step for verdict in next(iter(points.verdicts.values()))]
        self._image(f"{FIRST_GROUP}/domains", phase_image(steps, course, points.steps), points.step)
        said = [f"| {domain} | {own.phase.name.lower()} | {own.why} |" for domain, own in points.phases.items()]
        self._board.text(
            f"{FIRST_GROUP}/domains", "\n".join(["| domain | phase | reason |", "|---|---|---|", *said]), points.step
        )

    def probes(self, step: int, scores: Mapping[str, TaskScore]) -> None:
        """A reading of the probes, per task."""
        for name, scored in scores.items():
            for metric, measured in scored.metrics.items():
                few = f"Too few items to say much: {measured.n}." if scored.too_few else f"{measured.n} items."
                self._scalar(f"probe/{name}/{metric}", measured.value, step, remark=few)
            self._events.write("probe", step, task=name, **scored.summary())
            accuracy = scored.metrics.get("accuracy")
            if accuracy is not None and scored.task.domain in self._domains:
                self._terminal.values(scored.task.domain, {name: accuracy.value})
        self._flush(step)

    def correlations(self, step: int, domain: str, values: Mapping[str, float]) -> None:
        """Rank correlation of a domain's probe accuracy with each predictor that has one."""
        for predictor, value in values.items():
            self._scalar(f"correlation/{predictor}/{domain}", value, step)

    def delay(self, step: int, domain: str, steps: float | None) -> None:
        """Steps by which a domain's generalization followed its memorization, where it did."""
        if steps is not None:
            self._scalar(f"delay/{domain}", steps, step)

    def memorized(self, step: int, domain: str, found: Mapping[str, Any]) -> None:
        """Which of a domain's seen samples count as memorized, and by which rule."""
        self._events.write("memorized", step, domain=domain, **found)

    def begin_checkpoint(self, step: int) -> dict[str, int] | None:
        """Write everything, with an event of the checkpoint that follows; returns the sizes that its manifest needs.

        The event is written before the sizes are taken, so that a resumed run keeps it. None if the disk is full: there
        can be no checkpoint then, which is logged.
        """
        before = None
        try:
            self._events.flush()
            before = self._events.size
            self._events.write("checkpoint", step, folder=checkpoint_folder(Path(), step).as_posix())
            self._events.flush(durable=True)
            self._board.flush(durable=True)
            sizes = event_file_sizes(self.folder) | {"events.jsonl": self._events.size}
        except OSError as error:
            if before is not None:
                self._events.cut(before)
            self._no_checkpoint(step, str(error))
            return None
        self._checkpoint_event = (before, self._events.size)
        return sizes

    def checkpoint_failed(self, step: int, problem: str) -> None:
        """The checkpoint that was begun last was not written: discard its event, unless others followed, and say so."""
        before, after = self._checkpoint_event
        if self._events.size == after:
            self._events.cut(before)
        self._no_checkpoint(step, problem)

    def checkpoint(self, step: int, write: Callable[[dict[str, int]], object]) -> bool:
        """Begin a checkpoint and call ``write`` with those sizes at once; returns whether it was written."""
        if (sizes := self.begin_checkpoint(step)) is None:
            return False
        try:
            write(sizes)
        except OSError as error:
            self.checkpoint_failed(step, str(error))
            return False
        return True

    def _no_checkpoint(self, step: int, problem: str) -> None:
        earlier = list_checkpoints(self.folder)
        left = f"{earlier[-1].name} remains" if earlier else "there is none to resume from yet"
        self.guard(step, f"no checkpoint was written ({problem}); {left}")

    def incident(self, incident: Incident) -> None:
        """A problem that training survived."""
        self.guard(incident.step, incident.problem, kind=incident.kind, **incident.details)

    def guard(self, step: int, problem: str, **details: Any) -> None:
        """A problem that the run survived; ``details`` are values that JSON can hold."""
        self._terminal.note(f"step {step}: {problem}")
        self._events.write("guard", step, problem=problem, **details)
        self._flush(step)

    def close(self) -> None:
        """Write everything.

        Raises:
            OSError: the disk is full.
        """
        self._points.send()
        self._events.flush(durable=True)
        self._board.flush(durable=True)

    def end_trackers(self, files: Sequence[Path] = ()) -> None:
        """End the runs of trackers, after they got the newest images and ``files``."""
        self._points.finish(files)

    def _scalar(self, tag: str, value: float, step: int, remark: str = "", same_as: str = "") -> None:
        self._board.scalar(tag, value, step, remark, same_as)
        self._points.add(tag, value, step)

    def _image(self, tag: str, pixels: np.ndarray, step: int) -> None:
        self._board.image(tag, pixels, step)
        self._points.add_image(tag, pixels, step)

    def _flush(self, step: int) -> None:
        """Write points and events; on a full disk they are kept for the next time, with one message."""
        self._points.send()
        try:
            self._events.flush()
            self._board.flush()
        except OSError as error:
            if not self._disk_full:
                self._terminal.note(f"step {step}: {error}: points and events stay in memory until there is space")
            self._disk_full = True
        else:
            self._disk_full = False
