"""Replay, the paper's procedure: the same texts read through a series of saved models.

The models are measured by the `Monitor` that measures a run while it trains, so a replay of a run's own checkpoints
gives the same bits. Models of transformers are converted to ours where ours has their architecture
(`moetrain.models.hf`), and otherwise read through transformers (`moetrain.integrations`).
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from moetrain.atomic_io import write_file
from moetrain.checkpoint.manager import CheckpointError, load_checkpoint
from moetrain.checkpoint.restore import find_checkpoint, open_model
from moetrain.config import Settings, SettingsError
from moetrain.data.corpus import Corpus, prepare_corpus
from moetrain.data.errors import DataError
from moetrain.data.stream import Stream, run_steps, training_stream, validation_streams
from moetrain.data.tokenizer import Tokenizer
from moetrain.distributed.launch import compute_dtype
from moetrain.distributed.mesh import ParallelLayout
from moetrain.grokking.memorization import LEAST_READINGS
from moetrain.integrations.families import FamilyError
from moetrain.integrations.foreign_model import ForeignModel, open_folder
from moetrain.loggers.run_logger import RunLogger
from moetrain.loggers.summary import write_summary
from moetrain.loggers.terminal import Terminal
from moetrain.models.hf import find_olmoe
from moetrain.models.router import record_weights
from moetrain.models.transformer import Transformer
from moetrain.monitoring.monitor import Monitor
from moetrain.monitoring.state import MonitorState, build_panel_monitor, panel_monitor
from moetrain.probes.probe_monitor import ProbeMonitor, load_probes
from moetrain.report.report import report_or_say_why
from moetrain.routing.panel import Panel, document_panel
from moetrain.routing.panel_monitor import PanelMonitor
from moetrain.routing.store import TrainingContext, has_reading, read_reading
from moetrain.run_summary import metrics_summary
from moetrain.training.initialize import initial_model
from moetrain.training.throughput import Clock
from moetrain.training.train_metrics import expert_load
from moetrain.version import __version__


@dataclass(frozen=True)
class SavedModel:
    """A model of a series, not yet in memory."""

    name: str  # RUN/checkpoints/step_XXXXXXXX, or a folder or OWNER/NAME[@REVISION] of transformers
    step: int
    tokens: int  # trained on by then; steps where that is unknown
    ours: bool
    losses: dict[str, dict[str, Any]] = field(default_factory=dict)  # per domain, as training logged them
    context: TrainingContext | None = None  # recorded when training read its panel at this step

    def open(self, settings: Settings, device: torch.device) -> Transformer:
        """The model, computing as ``train.precision`` says.

        Raises:
            CheckpointError, OlmoeError, FamilyError: it cannot be read, in one line.
        """
        dtype = compute_dtype(settings, device)
        if self.ours:
            model = open_model(self.name, device, dtype, settings.model.dense_experts).model
        else:
            model = open_folder(find_olmoe(self.name), dtype).to(device)
        if settings.monitor.weights != "softmax" and isinstance(model, ForeignModel):
            raise FamilyError(
                f"{self.name}: monitor.weights={settings.monitor.weights} is of models of our own: set softmax"
            )
        record_weights(model, settings.monitor.weights)
        return model


def own_model(folder: Path, corpus: str | None = None) -> SavedModel:
    """A checkpoint of ours.

    Args:
        corpus: fingerprint of the data that it must have been trained on.

    Raises:
        CheckpointError: there is none, or it was trained on other data.
        StoreError: the run's reading of its panel at that step is altered.
    """
    checkpoint = load_checkpoint(folder, owners=())
    if "corpus" not in checkpoint.record:
        raise CheckpointError(
            f"{folder}: the state of a monitor in another trainer, without a model: replay that trainer's checkpoints"
        )
    if corpus is not None and checkpoint.record["corpus"] != corpus:
        raise CheckpointError(
            f"{folder}: it was trained on other data or another tokenizer than its run's config.yaml now gives: "
            "restore them, or give documents with --data"
        )
    losses = {
        domain: {name: value for name, value in found["metrics"].items() if name.startswith("train_loss")}
        for domain, found in checkpoint.record["domains"].items()
    }
    _, run = find_checkpoint(folder)
    context = read_reading(run, checkpoint.step).training_context if has_reading(run, checkpoint.step) else None
    return SavedModel(str(folder), checkpoint.step, checkpoint.record["tokens_trained"], True, losses, context)


def transformers_model(name: str, step: int | None = None) -> SavedModel:
    """A model of transformers; step and tokens are taken from names such as ``...step5000-tokens20B``.

    Raises:
        SettingsError: no step is given, nor in the name.
    """
    in_name = re.search(r"step[_-]?(\d+)", name)
    tokens = re.search(r"tokens[_-]?(\d+)B", name)
    step = int(in_name[1]) if step is None and in_name else step
    if step is None:
        raise SettingsError(f"{name}: no step in its name, as in step5000-tokens20B: give --steps, one a model")
    return SavedModel(name, step, int(tokens[1]) * 10**9 if tokens else step, False)


@dataclass
class ReplayTexts:
    """What the models are read on.

    Attributes:
        panel_domains: names of the domain numbers of the panel's samples.
        validation: held-out rows per domain; may be empty.
        initial: the model before its first step, where it is to be read too.
    """

    settings: Settings
    corpus: Corpus
    panel: PanelMonitor
    panel_domains: list[str]
    validation: dict[str, Stream]
    probes: ProbeMonitor | None
    initial: Transformer | None = None


def texts_of_run(settings: Settings, layout: ParallelLayout, terminal: Terminal, start: bool) -> ReplayTexts:
    """A run's own panel, held-out text and probes; with ``start``, also the model it started from.

    Raises:
        DataError, SettingsError: its data cannot be had, or it has no router or panel.
    """
    corpus = prepare_corpus(settings, terminal.preparing)
    probes = load_probes(settings, corpus, terminal.preparing)
    stream = training_stream(corpus, settings)
    steps = run_steps(stream, settings)
    rows = settings.train.micro_batch_rows or settings.train.batch_rows
    panel = build_panel_monitor(corpus, stream, settings, steps, rows)
    if panel is None:
        raise SettingsError(
            "the run has no panel: a dense model without model.dense_experts, monitor.enabled=false, or no text is "
            "long enough"
        )
    validation = validation_streams(corpus, settings, rows)
    texts = ReplayTexts(settings, corpus, panel, panel.domains, validation, probes)
    if start:
        torch.manual_seed(settings.run.seed)
        initial = initial_model(settings, corpus.tokenizer, compute_dtype(settings, layout.device))
        texts.initial = initial.to(layout.device).eval()
    return texts


def texts_of_documents(settings: Settings, unseen: Settings | None, steps: int, terminal: Terminal) -> ReplayTexts:
    """A panel of given documents, and the probes of their settings.

    Args:
        settings: its domains are documents that the models were trained on.
        unseen: its domains, of the same names, are documents that the models were not trained on.
        steps: step of the last model.

    Raises:
        DataError, SettingsError: documents that cannot be used.
    """
    corpus = prepare_corpus(settings, terminal.preparing)
    probes = load_probes(settings, corpus, terminal.preparing)
    domains, both = list(settings.data.domains), corpus
    if unseen is not None:
        unknown = [name for name in unseen.data.domains if name not in domains]
        if unknown:
            raise SettingsError(f"--unseen: domain {unknown[0]} is not one of --data: {', '.join(domains)}")
        other = prepare_corpus(unseen, terminal.preparing)
        both = Corpus([*corpus.domains, *other.domains], corpus.tokenizer, corpus.fingerprint + other.fingerprint)
    rows = settings.train.micro_batch_rows or settings.train.batch_rows
    panel = document_panel(both, settings, len(domains), rows)
    if not len(panel):
        raise DataError(f"no document has panel.tokens={settings.panel.tokens} tokens: lower it")
    names = [domain.name for domain in both.domains]
    return ReplayTexts(settings, both, panel_monitor(panel, settings, steps), names, {}, probes)


def check_vocabulary(tokenizer: Tokenizer, model: Transformer, name: str) -> None:
    """Raise SettingsError where a model has no embedding for an id of the tokenizer."""
    rows = len(model.lm_head.weight)
    if rows < tokenizer.vocab_size:
        raise SettingsError(f"{name}: {rows} embeddings for the {tokenizer.vocab_size} ids of the tokenizer in use")


def replay(
    models: Sequence[SavedModel], texts: ReplayTexts, folder: Path, layout: ParallelLayout, terminal: Terminal
) -> dict[str, Any]:
    """Read the texts through each model, in order of steps; returns what ``summary.json`` in the folder holds.

    Where a model cannot be read, the folder holds the results of all models before it.

    Raises:
        OSError: the folder exists already, or cannot be written.
        CheckpointError, OlmoeError, FamilyError, SettingsError: a model that cannot be read.
    """
    series = sorted(models, key=lambda model: model.step)
    repeated = [b for a, b in pairwise(series) if a.step == b.step]
    if repeated:
        raise SettingsError(f"{repeated[0].name}: a second model of step {repeated[0].step}: give each step once")
    if texts.initial is not None and (warning := few_checkpoints(series, texts.settings)):
        terminal.note(warning)
    folder.mkdir(parents=True)
    write_file(folder / "config.yaml", texts.settings.to_yaml())
    tasks = texts.probes.prepared.tasks if texts.probes is not None else []
    logger = RunLogger(folder, texts.panel.domains, None, terminal, tasks)
    state = MonitorState.build(texts.settings, texts.panel, texts.probes, layout)
    monitor = Monitor(
        texts.settings,
        texts.corpus,
        layout,
        state,
        texts.validation,
        texts.panel_domains,
        Clock(layout.device),
    )
    monitor.open(folder, logger)
    reader = _Reader(monitor, logger)
    count = len(series) + (texts.initial is not None)
    try:
        if texts.initial is not None:
            terminal.preparing("reading models", 0, count)
            untrained = SavedModel("before the first step", 0, 0, True, context=TrainingContext())
            reader.read(texts.initial, untrained)
            texts.initial = None
        for number, saved in enumerate(series, count - len(series)):
            terminal.preparing("reading models", number, count)
            reader.newest = None  # two large models may not fit into memory
            reader.read(saved.open(texts.settings, layout.device), saved)
    finally:
        summary = reader.finish()
        monitor.close()
    if texts.settings.run.report:
        report_or_say_why(folder, terminal)
    return summary


def few_checkpoints(series: Sequence[SavedModel], settings: Settings) -> str:
    """What to do where a run kept too few checkpoints to see anything over time; empty where it kept enough."""
    newest, readings = max(model.step for model in series), len(series) + 1  # and the model before the first step
    if readings >= LEAST_READINGS:
        return ""
    every = settings.train.checkpoint_every or newest
    written = -(-newest // every)
    enough = max(1, newest // LEAST_READINGS)
    return (
        f"{len(series)} of the run's {written} checkpoints are kept, so the panel is read {readings} times: fewer than "
        f"{LEAST_READINGS} are too few for onsets and trends. The next run keeps enough with "
        f"train.checkpoint_every={enough} train.keep_every={enough}"
    )


class _Reader:
    """Has the monitor of a run read one saved model after the other."""

    def __init__(self, monitor: Monitor, logger: RunLogger) -> None:
        self.newest: Transformer | None = None
        self._monitor, self._logger = monitor, logger
        self._read: dict[int, str] = {}

    def read(self, model: Transformer, saved: SavedModel) -> None:
        monitor, latest = self._monitor, self._monitor.state.latest
        check_vocabulary(monitor.corpus.tokenizer, model, saved.name)
        self.newest = model
        for domain, losses in saved.losses.items():
            if domain in latest.domains:
                latest.domains[domain]["metrics"].update(losses)
        monitor.validate(model, saved.step)
        assert monitor.state.panel is not None
        context = saved.context
        if context is None:
            context = measured_context(model, monitor.state.panel.panel, saved.tokens, monitor.layout.device)
        monitor.read_panel(model, saved.step, context)
        monitor.publish(wait=True)
        monitor.run_probes(model, saved.step, saved.tokens)
        self._read[saved.step] = saved.name

    def finish(self) -> dict[str, Any]:
        """Write and return ``summary.json``; without a single reading, remove the folder."""
        if self.newest is None and not self._read:
            self._logger.close()
            shutil.rmtree(self._logger.folder)
            return {}
        self._monitor.finish(self.newest, max(self._read))
        models = {str(step): name for step, name in self._read.items()}
        summary = metrics_summary(self._monitor.state.latest) | {"models": models, "version": __version__}
        write_summary(self._logger.folder, summary)
        self._logger.close()
        return summary


@torch.no_grad()
def measured_context(model: Transformer, panel: Panel, tokens: int, device: torch.device) -> TrainingContext:
    """The phase rule's controls from the panel's first rows, for a model without a record of its training."""
    if model.settings.experts == "dense":
        return TrainingContext(tokens, None, None)
    batch = panel.stream.batch(0, 0, panel.stream.batch_rows)
    routing = model(batch.to(device).model_input(by_sample=False)).routing
    assert routing is not None
    real = int((batch.slots_BT >= 0).sum())
    load_cv = expert_load(routing.load_LE.double().cpu())["experts/load_cv"]
    return TrainingContext(tokens, float(routing.entropy_L.mean()) / real, load_cv)
