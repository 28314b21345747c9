"""The trainer: what a run is built from, one step, what a checkpoint holds. `moetrain.training_loop` has the loop."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from moetrain.checkpoint.extension import changed_data
from moetrain.checkpoint.manager import (
    Checkpoint,
    CheckpointError,
    State,
    move_superseded,
)
from moetrain.config import Settings
from moetrain.data.batch import Batch
from moetrain.data.corpus import Corpus, prepare_corpus
from moetrain.data.prefetch import BatchReader
from moetrain.data.stream import Stream, run_steps, stream_tokens, training_stream, validation_streams
from moetrain.distributed.launch import compute_dtype, start_ranks
from moetrain.distributed.mesh import ParallelLayout
from moetrain.distributed.sharding import inner_model, replicate
from moetrain.loggers.preview import PROBES_LEGEND, layout_line, print_preview, stream_line
from moetrain.loggers.run_logger import RunLogger
from moetrain.loggers.terminal import Terminal
from moetrain.loggers.trackers import start_trackers
from moetrain.models.backends import choose_backends
from moetrain.models.transformer import Output
from moetrain.monitoring.monitor import Monitor
from moetrain.monitoring.outlook import print_outlook
from moetrain.monitoring.recording import StreamRecorder
from moetrain.monitoring.state import MonitorState, build_panel_monitor
from moetrain.optim.builder import Optimizer, initial_optimizer_state, make_optimizer, optimizer_state
from moetrain.optim.schedule import learning_rate, warmup_warning
from moetrain.probes.embeddings import check_encoder
from moetrain.probes.probe_monitor import COLUMNS, load_probes
from moetrain.probes.tasks import check_tasks
from moetrain.routing.near_duplicates import NearDuplicates, near_duplicates
from moetrain.routing.store import TrainingContext, remove_unlisted
from moetrain.run_saving import RunSaver
from moetrain.run_state import RunState
from moetrain.run_stream import RunStream
from moetrain.training.balancing import Balancing
from moetrain.training.guards import Findings, Guards
from moetrain.training.incident_samples import with_samples
from moetrain.training.initialize import initial_model
from moetrain.training.step import StepStatistics, forward_backward, step_rows, update
from moetrain.training.throughput import Clock, matmul_rate, peak_memory
from moetrain.training.train_metrics import TrainMetrics, expert_load


@dataclass
class Trainer:
    """One training run on this rank.

    Attributes:
        state: with the model and the optimizer, all that a checkpoint holds.
        matmul_rate: FLOP/s of large matmuls, summed over ranks.
        logged_tokens_D: text tokens of each domain trained on up to ``logged_step``, int64.
        logger: on the main rank, while the loop runs.
    """

    settings: Settings
    layout: ParallelLayout
    terminal: Terminal
    corpus: Corpus
    run_stream: RunStream
    model: nn.Module
    optimizer: Optimizer
    state: RunState
    monitor: Monitor
    recorder: StreamRecorder
    clock: Clock
    matmul_rate: float
    logged_tokens_D: np.ndarray
    saver: RunSaver
    logged_step: int = 0
    newest: StepStatistics | None = None
    logger: RunLogger | None = None

    @classmethod
    def build(
        cls, settings: Settings, layout: ParallelLayout | None = None, terminal: Terminal | None = None
    ) -> Trainer:
        """Prepare data, model, optimizer and monitor; start the ranks, unless ``layout`` says that they were.

        Raises:
            SettingsError, DataError: something that the settings ask for cannot be had, in one line.
        """
        layout = layout or start_ranks(settings)
        terminal = terminal or Terminal(speaks=layout.is_main)
        # Checked before the data is prepared, which may take hours.
        dtype = compute_dtype(settings, layout.device)
        choose_backends(settings.model, layout.device, dtype)
        check_tasks(settings)
        check_encoder(settings)
        with layout.main_first():
            corpus = prepare_corpus(settings, terminal.preparing)
            probes = load_probes(settings, corpus, terminal.preparing)
        stream = training_stream(corpus, settings)
        rows = settings.train.micro_batch_rows or layout.row_range(settings.train.batch_rows)[1]
        validation = validation_streams(corpus, settings, rows)
        torch.manual_seed(settings.run.seed)
        transformer = initial_model(settings, corpus.tokenizer, dtype, layout)
        if settings.train.compile:
            transformer.compile_layers()
        model = replicate(transformer, layout)
        domains = list(settings.data.domains)
        steps = run_steps(stream, settings)
        clock = Clock(layout.device)
        panel = build_panel_monitor(corpus, stream, settings, steps, rows)
        state = RunState(
            balancing=Balancing(transformer, settings.model),
            guards=Guards(settings.guard),
            train_metrics=TrainMetrics(domains, layout.expert_ranks),
            monitor=MonitorState.build(settings, panel, probes, layout, stream),
        )
        monitor = Monitor(settings, corpus, layout, state.monitor, validation, domains, clock)
        reader = BatchReader(stream, *step_rows(layout, settings), layout.device)
        return cls(
            settings=settings,
            layout=layout,
            terminal=terminal,
            corpus=corpus,
            run_stream=RunStream(settings, stream, reader, steps, panel),
            model=model,
            optimizer=make_optimizer(transformer, settings.optim),
            state=state,
            monitor=monitor,
            recorder=StreamRecorder(settings, stream, state.monitor, layout, monitor.incidents),
            clock=clock,
            matmul_rate=layout.world_size * matmul_rate(layout.device, dtype),
            logged_tokens_D=np.zeros(len(domains), np.int64),
            saver=RunSaver(settings.train, layout),
        )

    @property
    def stream(self) -> Stream:
        """What the run trains on."""
        return self.run_stream.stream

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.run_stream.steps

    def describe(self) -> None:
        """Print what is about to be trained, on what, and how much data stays unused."""
        model = inner_model(self.model)
        print_preview(self.terminal, model, self.layout.world_size, self.corpus, self.stream, self.steps, self.settings)
        if probes := self.state.monitor.probes:
            self.terminal.table("probes", COLUMNS, probes.rows())
            self.terminal.note(PROBES_LEGEND)
        if line := layout_line(model, self.layout, self.settings):
            self.terminal.note(line)
        self.terminal.note(stream_line(self.stream, self.steps, self.settings))
        print_outlook(self.terminal, self.state.monitor, self.steps, self.settings)
        for domain, copies in self.near_duplicates.items():
            if copies.found:
                self.terminal.note(copies.sentence(domain))
        if warning := warmup_warning(self.steps, self.settings.optim):
            self.terminal.note(warning)

    def train_step(self, step: int) -> None:
        """Update the model once (step 1 the first), and record metrics, guards and the routing of its samples."""
        settings, state = self.settings, self.state
        outputs: list[tuple[Batch, Output]] = []
        with self.clock.measure("train"):
            statistics = forward_backward(
                self.layout,
                self.model,
                self.stream,
                step - 1,
                state.balancing,
                settings,
                lambda batch, output: outputs.append((batch, output)),
                self.run_stream.reader,
            )
            rate = learning_rate(step, self.steps, settings.optim)
            norm, applied = update(
                self.layout, self.model, self.optimizer, rate, settings.optim.grad_clip, statistics.loss
            )
            state.balancing.after_step(statistics.load_LE, applied)
            state.train_metrics.add(statistics, norm, applied)
            self._note_incidents(state.guards.check(step, applied, statistics.loss, statistics.load_LE, outputs))
        self.newest = statistics
        tokens = self.stream.real_tokens(step - 1)
        state.step = step
        state.tokens_trained += tokens
        self.clock.add_tokens(tokens)
        if settings.monitor.enabled:
            with self.clock.measure("record"):
                self.recorder.record(step, outputs)

    def state_dict(self) -> tuple[dict[str, State], dict[str, Any]]:
        """What a checkpoint holds: tensors per part, and a record as JSON. All ranks must call."""
        self.monitor.publish(wait=True)  # readings that are still being computed belong to the state
        model = inner_model(self.model)
        tensors = {"model": model.state_dict(), "optimizer": optimizer_state(model, self.optimizer)}
        record = {**self.state.record(), **self.run_stream.record(), **self.corpus.record()}
        record["learning_rate"] = learning_rate(self.state.step, self.steps, self.settings.optim)
        return {**tensors, **self.state.tensors()}, record

    def load_state_dict(self, checkpoint: Checkpoint) -> None:
        """Restore what `state_dict` returned. All ranks must call.

        Raises:
            CheckpointError: the checkpoint was trained on other data, or holds another model.
        """
        extended = 0 < checkpoint.step == self.run_stream.begin  # it is of the run that this one goes on from
        if extended:
            if problem := changed_data(checkpoint.record, self.corpus, self.settings):
                raise CheckpointError(f"the run goes on from a checkpoint that was trained with {problem}")
        elif checkpoint.record["corpus"] != self.corpus.fingerprint:
            raise CheckpointError(
                "the checkpoint was trained on other data or another tokenizer: restore them, or set train.resume=never"
            )
        model = inner_model(self.model)
        checkpoint.states.fill("model", model.state_dict())
        if checkpoint.states.names("optimizer"):
            checkpoint.states.fill("optimizer", initial_optimizer_state(model, self.optimizer))
        self.run_stream.load_record(checkpoint.record)  # before the monitor's state, which counts exposures by it
        self.state.load(checkpoint, self.layout, extended)
        if extended:
            self.monitor.read_added(self.model, checkpoint.step)

    def save(self, run: Path, wait: bool = True) -> bool:
        """Write a checkpoint; a full disk does not end the run. All ranks must call.

        Args:
            wait: until it is written; False: it may still be written while training goes on.

        Returns:
            Whether the newest checkpoint of which that is known was written.
        """
        step = self.state.step
        self._note_incidents(self.state.guards.settle())
        self.recorder.write(step, flush=True)  # before the next collective: the manifest lists every rank's files
        self.monitor.synchronize()
        self.monitor.report_incidents()  # a run resumed from here would not report them again
        tensors, record = self.state_dict()
        with self.clock.measure("checkpoint"):
            self.saver.begin(run, step, tensors, record, self.logger)
            return self.saver.finish(self.logger) if wait else self.saver.saved

    @cached_property
    def near_duplicates(self) -> dict[str, NearDuplicates]:
        """Held-out panel samples that the training text holds too; searched for on the main rank."""
        panel = self.state.monitor.panel
        if panel is None or not self.layout.is_main:
            return {}
        return near_duplicates(panel.panel, self.corpus, self.stream.samples)

    @property
    def context(self) -> TrainingContext:
        """What the newest step says of the routers as a whole."""
        if self.newest is None or not self.newest.load_LE.numel():  # the dense twin has no router
            return TrainingContext(self.state.tokens_trained, None, None)
        load_cv = expert_load(self.newest.load_LE)["experts/load_cv"]
        return TrainingContext(self.state.tokens_trained, float(self.newest.entropy_L.mean()), load_cv)

    def close(self) -> None:
        """End the display and the background threads."""
        self.terminal.end_training()
        self.run_stream.reader.close()
        self.saver.close()
        self.monitor.close()

    def open_folder(self, folder: Path, checkpoint: Checkpoint | None) -> None:
        """Begin to write to the run's folder, after removing what was written later than the checkpoint."""
        if self.layout.is_main:
            if checkpoint is not None:
                move_superseded(folder, checkpoint.step)
                remove_unlisted(folder, checkpoint.record["pieces"])
            self.corpus.tokenizer.save_in(folder)  # the cache may be deleted: the folder holds all its model needs
            domains, trackers = list(self.settings.data.domains), start_trackers(self.settings, folder)
            tasks = self.state.monitor.tasks
            self.logger = RunLogger(folder, domains, checkpoint, self.terminal, tasks, trackers)
        self.monitor.open(folder, self.logger)
        self.recorder.open_store(folder)

    def _note_incidents(self, findings: Findings) -> None:
        """Note what the guards found, on the main rank, with the samples most involved; all ranks must call."""
        domains, count = list(self.settings.data.domains), self.settings.guard.samples
        for incident in with_samples(findings, self.stream.samples, domains, count, self.layout):
            self.monitor.incidents.add(incident)

    def log(self, step: int) -> None:
        """Log the training curves since the last point; nothing where every update since then was skipped."""
        clock, state = self.clock, self.state
        clock.settle()
        points = state.train_metrics.points()
        if self.logger is None or not points:
            return
        points["optim/learning_rate"] = learning_rate(step, self.steps, self.settings.optim)
        self.logged_tokens_D += stream_tokens(self.stream, len(self.logged_tokens_D), self.logged_step, step)
        self.logged_step = step
        for name, tokens in zip(self.settings.data.domains, self.logged_tokens_D.tolist(), strict=True):
            points[f"data/tokens/{name}"] = float(tokens)
            if (loss := points.get(f"loss/train/{name}")) is not None:
                state.monitor.latest.set_train_loss(name, loss)
        rate = clock.rate_since_last()
        system = {
            "system/tokens_per_second": rate,
            "system/mfu": rate * inner_model(self.model).flops_per_token() / self.matmul_rate,
            **self.monitor.overhead(),
            "system/data_wait": self.run_stream.reader.seconds_waited / clock.spent("train"),
            "system/memory": float(peak_memory(self.layout.device)),
        }
        self.logger.training(step, points, system)
