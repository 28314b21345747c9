"""A training by another trainer, watched: what is read of it and when, its files, and its state in checkpoints.

Every rank has one. Readings are collective; the main rank reads the panel and writes the files.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from moetrain.atomic_io import write_file
from moetrain.checkpoint.manager import (
    Checkpoint,
    CheckpointError,
    move_superseded,
    prune_checkpoints,
    save_checkpoint,
)
from moetrain.distributed.mesh import ParallelLayout
from moetrain.grokking import Estimate, PhaseThresholds, gram_blocks
from moetrain.integrations.batches import BatchRecorder
from moetrain.integrations.folders import check_weights, find_state, weight_sums
from moetrain.integrations.options import MonitorOptions
from moetrain.integrations.recorder import RouterRecorder
from moetrain.integrations.row_panel import NEVER, draw_row_panel, read_row_panel
from moetrain.integrations.rows import MonitorError, Rows
from moetrain.loggers.run_logger import RunLogger
from moetrain.loggers.summary import closing_lines, write_summary
from moetrain.loggers.terminal import Terminal
from moetrain.metrics.latest import LatestMetrics
from moetrain.report.report import report_or_say_why
from moetrain.routing.panel import reading_steps
from moetrain.routing.panel_monitor import PanelMonitor, memorization_summary
from moetrain.routing.recorder import SampleRouting
from moetrain.routing.store import TrainingContext, list_files, remove_unlisted, to_stored, write_reading
from moetrain.routing.stream import StreamMonitor
from moetrain.run_summary import metrics_summary
from moetrain.training.throughput import Clock, peak_memory
from moetrain.version import __version__

_MONITORING = ("record", "stream", "panel")  # the clock's entries that are overhead
_FROM_LOGS = {"loss": "loss/train", "learning_rate": "optim/learning_rate", "grad_norm": "optim/grad_norm"}
_RANKS, _SAMPLES = 2**12, 2**20  # more than there are ranks, and samples of a rank in a step


class _Notes(Terminal):
    """Prints notes alone: the trainer shows its own progress."""

    def training(self, *args: Any, **kwargs: Any) -> None:
        pass


class WatchedRun:
    """Watches a training from its beginning, or from the step at which it is resumed.

    Args:
        model: that the trainer trains, on this rank a whole replica.
        domains: names by number.
        train: the rows that are trained on, the same on all ranks.
        heldout: rows that are not; None where there are none.
        first_step: the step that first trains on each row, as far as is known; None where it is not.
        steps: of the whole training.
    """

    def __init__(
        self,
        options: MonitorOptions,
        model: nn.Module,
        layout: ParallelLayout,
        domains: Sequence[str],
        train: Rows,
        heldout: Rows | None,
        first_step: np.ndarray | None,
        steps: int,
    ) -> None:
        self.options, self.layout, self.domains, self.steps = options, layout, list(domains), steps
        self._settings = options.settings(domains)
        self._model, self._domain_of_row = model, train.domain
        self.rows = draw_row_panel(train, heldout, first_step, steps, options.samples, self._settings.run.seed)
        self._predicted = self.rows.panel.first_step.copy()
        self._met = np.full(len(self.rows.panel), NEVER)  # the step at which this rank first trained on each sample
        self._keys, self._row = np.unique(train.keys, return_index=True)
        self._member_keys, self._member = np.unique(self.rows.keys, return_index=True)
        self._clock = Clock(layout.device)
        self._recorder = RouterRecorder(model)
        self._batches = BatchRecorder(model, self._recorder, options.tokens, self._clock)
        self._stream = StreamMonitor(domains, options.window, options.tau, layout)
        thresholds = PhaseThresholds(**self._settings.phase.model_dump())
        eps: dict[str, float | None] = dict.fromkeys(domains)
        chosen = self._settings.panel
        self.panel = PanelMonitor(
            self.rows.panel, domains, options.tau, steps, eps, thresholds, chosen.delta, chosen.max_pairs
        )
        self.latest = LatestMetrics(domains)
        self._tokens_D = np.zeros(len(domains), np.int64)  # of this rank, since the last `_gather`
        self._total_D = np.zeros(len(domains), np.int64)  # of all ranks up to then
        self._unknown = self._samples = 0
        self._reading_steps = reading_steps(steps, options.readings)
        self._read_at = -1
        self._terminal = _Notes(speaks=layout.is_main)
        self._logger: RunLogger | None = None
        self._folder = Path(options.output_dir)
        self._mark = (time.perf_counter(), 0.0)

    def begin(self, step: int) -> None:
        """Open the folder, resume from its state of ``step``, and read the panel if training has not begun.

        Raises:
            MonitorError: the state belongs to another training.
            CheckpointError, OSError: it cannot be read.
        """
        checkpoint, error = None, None
        if self.layout.is_main:
            try:
                self._folder, checkpoint = find_state(self._folder, step, self._fingerprint())
                if checkpoint is not None:
                    self._load(checkpoint)
                self._open(checkpoint, step)
            except (MonitorError, CheckpointError, OSError) as caught:
                error = caught
        resumed, error = self.layout.broadcast_object((checkpoint is not None, error))
        if error is not None:
            raise error
        self._gather(step)
        if not resumed:
            self._read_panel(step)
        self._batches.step = step + 1
        self._mark = (time.perf_counter(), self._overhead())

    def step(self, step: int) -> None:
        """After an update: take in its samples, and compute and read what is due. All ranks must call."""
        now, overhead = self._mark
        elapsed = time.perf_counter() - now - (self._overhead() - overhead)
        self._clock.seconds["train"] = self._clock.spent("train") + elapsed
        self._batches.step = step + 1
        due = step in self._reading_steps
        measured = due or step % self.options.every == 0
        self._take_in(wait=measured)
        if measured:
            self._gather(step)
            self._measure_stream(step)
        if due:
            self._read_panel(step)
        self._mark = (time.perf_counter(), self._overhead())

    def log(self, step: int, logs: Mapping[str, Any]) -> None:
        """A point of the training curves, from what the trainer logs; all ranks must call."""
        self._take_in(wait=True)
        self._gather(step)
        if self._logger is None:
            return
        points = {tag: float(logs[name]) for name, tag in _FROM_LOGS.items() if logs.get(name) is not None}
        points |= {f"data/tokens/{name}": float(n) for name, n in zip(self.domains, self._total_D, strict=True)}
        share = self._clock.share
        system = {
            "system/tokens_per_second": self._clock.rate_since_last() * self.layout.world_size,
            "system/monitor_share": share(*_MONITORING),
            "system/monitor_panel": share("panel"),
            "system/monitor_stream": share("record", "stream"),
            "system/memory": float(peak_memory(self.layout.device)),
        }
        self._logger.training(step, points, system)

    def save(self, step: int, keep: int | None) -> None:
        """Save the state beside a checkpoint of the trainer's; all ranks must call.

        Args:
            keep: states to keep; None: all.
        """
        self._take_in(wait=True)
        self._gather(step)
        tensors = {
            "monitor": self._stream.state(),
            "panel": self.panel.state(),
            "met": {"met": torch.from_numpy(self._met)},
        }
        if self._logger is None:
            return
        record = {
            **self.latest.record(),
            "panel_of": self._fingerprint(),
            "tokens": self._total_D.tolist(),
            "unknown": self._unknown,
            "samples": self._samples,
            "pieces": list_files(self._folder),
            "weights": weight_sums(self._model),
        }
        folder = self._folder
        saved = self._logger.checkpoint(step, lambda sizes: save_checkpoint(folder, step, tensors, record, sizes))
        if saved and keep:
            prune_checkpoints(folder, keep, None)

    def finish(self, step: int) -> None:
        """The last reading, ``summary.json`` and the report; all ranks must call. Removes the hooks."""
        try:
            self._take_in(wait=True)
            self._gather(step)
            if step != self._read_at:
                self._read_panel(step)
        finally:
            self.close()
        logger = self._logger
        if logger is None:
            return
        for domain, memorized in memorization_summary(self.panel).items():
            self.latest.domains[domain]["memorized"] = memorized
            logger.memorized(step, domain, {"rule": "finished run", **memorized})
        if self._unknown:
            logger.guard(step, f"{self._unknown} of {self._samples} samples trained on are no rows of the data set")
        logger.close()
        summary = self._summary(step)
        write_summary(self._folder, summary)
        for line in closing_lines(summary, self._folder):
            self._terminal.note(line)
        if self.options.report:
            report_or_say_why(self._folder, self._terminal)

    def close(self) -> None:
        """Remove the hooks."""
        self._batches.close()
        self._recorder.close()

    def _summary(self, step: int) -> dict[str, Any]:
        tokens = int(self._total_D.sum())
        parameters = {"parameters": found} if (found := self._parameters()) else {}
        return {
            **metrics_summary(self.latest),
            **parameters,
            "steps": step,
            "tokens": tokens,
            "text_tokens": tokens,
            "measured_tokens": self._clock.tokens * self.layout.world_size,
            "tokens_per_second": self._clock.rate() * self.layout.world_size,
            "monitor_share": self._clock.share(*_MONITORING),
            "peak_memory_bytes": peak_memory(self.layout.device),
            "seconds": dict(self._clock.seconds),
            "samples_not_finite": self._stream.not_finite,
            "samples_unknown": self._unknown,
            "heldout_rows_also_trained_on": self.rows.copies,
            "version": __version__,
        }

    def _parameters(self) -> dict[str, int]:
        """All parameters, and those active for one token; empty where the experts' weights are not stacked."""
        routers, total = self._recorder.routers, sum(p.numel() for p in self._model.parameters())
        routed = sum(
            parameter.numel()
            for name, parameter in self._model.named_parameters()
            if "experts." in name and parameter.ndim == 3 and len(parameter) == routers.experts
        )
        return {"all": total, "active": round(total - routed * (1 - routers.top_k / routers.experts))} if routed else {}

    def _overhead(self) -> float:
        return sum(map(self._clock.spent, _MONITORING))

    def _take_in(self, wait: bool) -> None:
        """Take in the samples that this rank has trained on, as far as their routing has reached the host."""
        with self._clock.measure("record"):
            for part in self._batches.arrived(wait):
                at = np.minimum(np.searchsorted(self._keys, part.keys), len(self._keys) - 1)
                known = self._keys[at] == part.keys
                self._samples += len(known)
                self._unknown += int((~known).sum())
                self._clock.add_tokens(int(part.tokens.sum()))
                row = self._row[at]
                domain = self._domain_of_row[row]
                np.add.at(self._tokens_D, domain[known], part.tokens[known])
                member = np.minimum(np.searchsorted(self._member_keys, part.keys), len(self._member_keys) - 1)
                hit = self._member_keys[member] == part.keys
                np.minimum.at(self._met, self._member[member[hit]], part.step)
                used = known & part.compared
                order = (part.step * _RANKS + self.layout.rank) * _SAMPLES + part.first + np.arange(len(known))
                even_SLE, odd_SLE = part.sums_SL2E[used].swapaxes(1, 2).swapaxes(0, 1)
                self._stream.add(
                    SampleRouting(order[used], row[used], domain[used], even_SLE, odd_SLE, np.zeros_like(even_SLE))
                )
        if self._samples and self._unknown == self._samples:
            raise MonitorError(
                "no sample that the model trains on is a row of the data set: its collator packs or changes "
                "them: pack the rows beforehand, each of one domain, and give Trainer the packed data set"
            )

    def _gather(self, step: int) -> None:
        """Join what the ranks have counted."""
        tokens, met = self._tokens_D.copy(), self._met
        self._tokens_D[:] = 0
        for other_tokens, other_met in self.layout.all_gather_objects((tokens, met)):
            self._total_D += other_tokens
            self._met = np.minimum(self._met, other_met)
        # What was predicted for by now and has not come is not coming as predicted.
        expected = np.where(self._predicted > step, self._predicted, NEVER)
        trained = self.rows.panel.first_step != 0  # not held out
        self.rows.panel.first_step[trained] = np.where(self._met < NEVER, self._met, expected)[trained]

    def _measure_stream(self, step: int) -> None:
        with self._clock.measure("stream"):
            snapshot = self._stream.snapshot(self._router_rows())
            if self._logger is None:
                return
            readings = snapshot.readings()
        for reading in readings:
            for metric, estimate in reading.metrics.items():
                self.latest.set(reading.domain, f"stream/{metric}", estimate)
        self._logger.streaming(step, readings)

    def _read_panel(self, step: int) -> None:
        """Read the panel on the main rank, store the reading and log its metrics."""
        self._read_at = step
        if self._logger is None:
            return
        assert self.options.batch_rows is not None
        with self._clock.measure("panel"):
            reading, entropy, load = read_row_panel(
                self._model, self._recorder, self.rows, step, self.options.batch_rows, self.layout.device
            )
            if self.panel.initial is None:
                self.panel.initial = reading.loss
            context = TrainingContext(int(self._total_D.sum()), entropy, load["experts/load_cv"])
            blocks = gram_blocks(self._router_rows())
            panel = self.rows.panel
            stored = to_stored(panel, reading, self.domains, blocks, context, self.panel.initial)
            try:
                write_reading(self._folder, stored)
            except OSError as error:
                self._logger.guard(step, f"the panel reading was not stored ({error}); its metrics are shown")
            self.panel.begin(step)
            points = self.panel.take(stored)
        self.latest.set_all(points.metrics)
        for domain, verdict in points.phases.items():
            self.latest.domains[domain]["phase"] = verdict.phase.name.lower()
            self.latest.domains[domain]["why"] = verdict.why
        self._logger.panel(points)
        self._logger.metrics(step, {tag: Estimate(value, math.nan, math.nan, 0, 0) for tag, value in load.items()})

    def _router_rows(self) -> np.ndarray:
        """The routers' weights, float32 [L, E, D]."""
        return np.stack([weight.detach().float().cpu().numpy() for weight in self._recorder.routers.rows()])

    def _copies(self) -> dict[str, int]:
        """By domain, how often each of its texts is in the training data, on average."""
        rows_D, texts_D = (
            np.bincount(domain, minlength=len(self.domains))
            for domain in (self._domain_of_row, self._domain_of_row[self._row])
        )
        copies_D = np.maximum(np.rint(rows_D / np.maximum(texts_D, 1)), 1).astype(int)
        return dict(zip(self.domains, copies_D.tolist(), strict=True))

    def _fingerprint(self) -> str:
        return hashlib.sha256(self.rows.keys.tobytes() + self.rows.panel.cell.tobytes()).hexdigest()

    def _load(self, checkpoint: Checkpoint) -> None:
        record, states = checkpoint.record, checkpoint.states
        check_weights(self._model, record["weights"], checkpoint.step)
        self.latest.load_record(record)
        self._total_D = np.array(record["tokens"], np.int64)
        self._unknown, self._samples = record["unknown"], record["samples"]
        self._stream.load_state(states["monitor"], self.layout.is_main)
        self.panel.load_state(states["panel"])
        self._met = states["met"]["met"].numpy().copy()

    def _open(self, checkpoint: Checkpoint | None, step: int) -> None:
        """Begin to write to the folder, after removing what was written later than the state."""
        if checkpoint is not None:
            move_superseded(self._folder, checkpoint.step)
            remove_unlisted(self._folder, checkpoint.record["pieces"])
            (self._folder / "summary.json").unlink(missing_ok=True)
        else:
            if self._folder != Path(self.options.output_dir):
                self._terminal.note(
                    f"{self.options.output_dir} exists and is kept: the monitor writes to {self._folder}"
                )
            self._folder.mkdir(parents=True, exist_ok=True)
            write_file(self._folder / "config.yaml", self.options.config(self._copies(), self._recorder.routers))
        self._logger = RunLogger(self._folder, self.domains, checkpoint, self._terminal)
        if checkpoint is None and step:
            self._logger.guard(step, "there is no state of the steps before: all is measured from here")
        if self.rows.copies:
            self._logger.guard(step, f"{self.rows.copies} held-out rows are trained on too: they are left out")
