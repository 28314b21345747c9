"""The paper's procedure: the same texts read through a series of saved models, and all that their routing says.

A run's own checkpoints are read as the run itself read its panel, by the same functions, so that a reading gives the
same bits. Models of transformers become ours first (`moetrain.models.hf`), so there is one way through.
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

from moetrain import __version__
from moetrain.atomic_io import write_file
from moetrain.checkpoint.manager import CheckpointError, load_checkpoint
from moetrain.checkpoint.restore import find_checkpoint, open_model
from moetrain.config import Settings, SettingsError
from moetrain.data.corpus import Corpus, prepare_corpus
from moetrain.data.errors import DataError
from moetrain.data.stream import Stream, training_stream, validation_streams
from moetrain.data.tokenizer import Tokenizer
from moetrain.distributed.launch import compute_dtype
from moetrain.distributed.mesh import ParallelLayout
from moetrain.grokking import PhaseThresholds, gram_blocks
from moetrain.grokking.paper import CORRELATIONS
from moetrain.loggers.run_logger import Outputs
from moetrain.loggers.summary import write_summary
from moetrain.loggers.terminal import Terminal
from moetrain.models.hf import find_olmoe, read_olmoe
from moetrain.models.transformer import Transformer
from moetrain.monitoring.build import panel_monitor
from moetrain.monitoring.delays import delays
from moetrain.monitoring.watch import router_rows
from moetrain.probes.probe_monitor import ProbeMonitor, load_probes, write_scores
from moetrain.probes.scoring import score
from moetrain.report.report import report_or_say_why
from moetrain.routing.panel import Panel, document_panel, read_panel
from moetrain.routing.panel_monitor import PanelMonitor, memorization_summary
from moetrain.routing.store import TrainingContext, has_reading, read_reading, to_stored, write_reading
from moetrain.training.evaluation import heldout_losses
from moetrain.training.initialize import initial_model
from moetrain.training.train_metrics import expert_load


@dataclass(frozen=True)
class SavedModel:
    """A model of a series, not yet in memory."""

    name: str  # RUN/checkpoints/step_XXXXXXXX, or a folder or OWNER/NAME[@REVISION] of transformers
    step: int
    tokens: int  # trained on by then; steps where nobody says
    ours: bool
    losses: dict[str, dict[str, Any]] = field(default_factory=dict)  # by domain, what training said of its losses
    surroundings: TrainingContext | None = None  # what training said when it read its panel, where it did

    def open(self, settings: Settings, device: torch.device) -> Transformer:
        """The model, computing as ``train.precision`` says.

        Raises:
            CheckpointError, OlmoeError: it cannot be read, in one line.
        """
        dtype = compute_dtype(settings, device)
        if self.ours:
            return open_model(self.name, device, dtype).model
        return read_olmoe(find_olmoe(self.name), dtype).to(device)


def own_model(folder: Path, corpus: str | None = None) -> SavedModel:
    """A checkpoint of ours.

    Args:
        corpus: fingerprint of the data that it must have been trained on.

    Raises:
        CheckpointError: there is none, or it was trained on other data.
        StoreError: the run's reading of its panel at that step is altered.
    """
    checkpoint = load_checkpoint(folder, owners=())
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
    around = read_reading(run, checkpoint.step).training_context if has_reading(run, checkpoint.step) else None
    return SavedModel(str(folder), checkpoint.step, checkpoint.record["tokens_trained"], True, losses, around)


def transformers_model(name: str, step: int | None = None) -> SavedModel:
    """A model of transformers; step and tokens are taken from names such as ``...step5000-tokens20B``.

    Raises:
        SettingsError: no step is given, nor in the name.
    """
    said = re.search(r"step[_-]?(\d+)", name)
    tokens = re.search(r"tokens[_-]?(\d+)B", name)
    step = int(said[1]) if step is None and said else step
    if step is None:
        raise SettingsError(f"{name}: no step in its name, as in step5000-tokens20B: give --steps, one a model")
    return SavedModel(name, step, int(tokens[1]) * 10**9 if tokens else step, False)


@dataclass
class Texts:
    """What the models are read on."""

    settings: Settings
    corpus: Corpus
    panel: PanelMonitor
    names: list[str]  # of the panel's domains, by number
    validation: dict[str, Stream]
    probes: ProbeMonitor | None
    start: Transformer | None = None  # the model before its first step


def texts_of_run(settings: Settings, layout: ParallelLayout, terminal: Terminal, start: bool) -> Texts:
    """A run's own panel, held-out text and probes; with ``start``, also the model it started from.

    Raises:
        DataError, SettingsError: its data cannot be had, or it has no router or panel.
    """
    corpus = prepare_corpus(settings, terminal.preparing)
    probes = load_probes(settings, corpus, terminal.preparing)
    stream = training_stream(corpus, settings)
    steps = min(stream.steps, settings.train.max_steps or stream.steps)
    rows = settings.train.micro_batch_rows or settings.train.batch_rows
    panel = panel_monitor(corpus, stream, settings, steps, rows)
    if panel is None:
        raise SettingsError("the run has no panel: it has no router, monitor.enabled=false, or no text is long enough")
    texts = Texts(settings, corpus, panel, panel.domains, validation_streams(corpus, settings, rows), probes)
    if start:
        torch.manual_seed(settings.run.seed)
        first = initial_model(settings, corpus.tokenizer, compute_dtype(settings, layout.device))
        texts.start = first.to(layout.device).eval()
    return texts


def texts_of_documents(settings: Settings, unseen: Settings | None, steps: int, terminal: Terminal) -> Texts:
    """A panel of given documents, and the probes of their settings.

    Args:
        settings: its domains are the documents that the models have trained on.
        unseen: its domains, of the same names, are documents that they never met.
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
    eps = {name: domain.eps for name, domain in settings.data.domains.items()}
    thresholds = PhaseThresholds(**settings.phase.model_dump())
    monitor = PanelMonitor(panel, domains, settings.monitor.tau, steps, eps, thresholds)
    return Texts(settings, both, monitor, [domain.name for domain in both.domains], {}, probes)


def check_tokenizer(tokenizer: Tokenizer, model: Transformer, name: str) -> None:
    """Raise SettingsError where a model has no embedding for an id of the tokenizer."""
    rows = len(model.lm_head.weight)
    if rows < tokenizer.vocab_size:
        raise SettingsError(f"{name}: {rows} embeddings for the {tokenizer.vocab_size} ids of the tokenizer in use")


def replay(
    models: Sequence[SavedModel], texts: Texts, folder: Path, layout: ParallelLayout, terminal: Terminal
) -> dict[str, Any]:
    """Read the texts through each model, in order of steps; returns what ``summary.json`` in the folder holds.

    Where a model cannot be read, the folder holds all that those before it came to.

    Raises:
        OSError: the folder is there already, or cannot be written.
        CheckpointError, OlmoeError, SettingsError: a model that cannot be read.
    """
    series = sorted(models, key=lambda model: model.step)
    twice = [b for a, b in pairwise(series) if a.step == b.step]
    if twice:
        raise SettingsError(f"{twice[0].name}: a second model of step {twice[0].step}: give each step once")
    folder.mkdir(parents=True)
    write_file(folder / "config.yaml", texts.settings.to_yaml())
    tasks = texts.probes.prepared.tasks if texts.probes is not None else []
    reader = _Reader(texts, folder, Outputs(folder, texts.panel.domains, None, terminal, tasks), layout)
    count = len(series) + (texts.start is not None)
    try:
        if texts.start is not None:
            terminal.preparing("reading models", 0, count)
            unmoved = SavedModel("before the first step", 0, 0, True, surroundings=TrainingContext())
            reader.read(texts.start, unmoved)
            texts.start = None
        for number, saved in enumerate(series, count - len(series)):
            terminal.preparing("reading models", number, count)
            reader.model = None  # two large ones may not fit into memory
            reader.read(saved.open(texts.settings, layout.device), saved)
    finally:
        summary = reader.finish()
    if texts.settings.run.report:
        report_or_say_why(folder, terminal)
    return summary


class _Reader:
    """Reads one model after the other, and takes what they say to where it is kept and shown."""

    def __init__(self, texts: Texts, folder: Path, outputs: Outputs, layout: ParallelLayout) -> None:
        self.settings, self.corpus, self.panel, self.probes = texts.settings, texts.corpus, texts.panel, texts.probes
        self.layout = layout
        self.model: Transformer | None = None  # the newest
        self._texts, self._folder, self._outputs = texts, folder, outputs
        self._device = layout.device
        self._token_bytes = torch.from_numpy(texts.corpus.tokenizer.token_bytes()).long().to(self._device)
        self._read: dict[int, str] = {}

    def read(self, model: Transformer, saved: SavedModel) -> None:
        texts, step, panel = self._texts, saved.step, self.panel.panel
        check_tokenizer(texts.corpus.tokenizer, model, saved.name)
        self.model = model
        for domain, said in saved.losses.items():
            if domain in self._outputs.domains:
                self._outputs.domains[domain]["metrics"].update(said)
        if texts.validation:
            losses = heldout_losses(self.layout, model, texts.validation, self._token_bytes)
            self._outputs.validation(step, losses)
        reading = read_panel(model, panel, step, self.layout, inputs=texts.settings.panel.linear_kernel)
        around = saved.surroundings or surroundings(model, panel, saved.tokens, self._device)
        stored = to_stored(panel, reading, texts.names, gram_blocks(router_rows(model)), around)
        write_reading(self._folder, stored)
        self._outputs.panel(self.panel.take(stored))
        if texts.probes is not None:
            self._probe(model, texts.probes, saved)
        self._read[step] = saved.name

    def _probe(self, model: Transformer, probes: ProbeMonitor, saved: SavedModel) -> None:
        answers = self.settings.probes.max_new_tokens if self.settings.probes.generate else 0
        scores = score(model, probes.prepared, self.layout, max_new_tokens=answers)
        probes.history.add(saved.step, saved.tokens, scores)
        write_scores(self._folder, saved.step, scores)
        self._outputs.probes(saved.step, scores)
        probes.relations.add(self._outputs.domains)
        for domain in self._outputs.domains:
            found = probes.relations.correlations(domain)
            points = {name: each["raw", "spearman"].value for name, each in found.items()}
            points = {name: value for name, value in points.items() if value == value}
            self._outputs.correlations(saved.step, domain, points)

    def finish(self) -> dict[str, Any]:
        """Write and return what all readings came to, as a run's ``summary.json``; without any, remove the folder."""
        outputs, probes, last = self._outputs, self.probes, max(self._read, default=0)
        if not self._read:
            outputs.close()
            shutil.rmtree(outputs.folder)
            return {}
        for domain, memorized in memorization_summary(self.panel).items():
            outputs.domains[domain]["memorized"] = memorized
            outputs.memorized(last, domain, {"rule": "finished run", **memorized})
        if probes is not None:
            for name, task in outputs.tasks.items():
                task["generalized"] = probes.history.group_sizes(name)
            for domain in outputs.domains:
                outputs.domains[domain]["correlations"] = probes.relations.as_dict(domain)
        for domain, delay in delays(self).items():
            outputs.delay(last, domain, delay.mean.steps if delay.mean else None, delay.as_dict())
        summary = {
            "domains": outputs.domains,
            "probes": outputs.tasks,
            "correlations_of_the_paper": CORRELATIONS,
            "models": {str(step): name for step, name in self._read.items()},
            "version": __version__,
        }
        write_summary(outputs.folder, summary)
        outputs.close()
        return summary


@torch.no_grad()
def surroundings(model: Transformer, panel: Panel, tokens: int, device: torch.device) -> TrainingContext:
    """The phase rule's controls, from the panel's first rows, for a model whose training says nothing of them."""
    batch = panel.stream.batch(0, 0, panel.stream.batch_rows)
    routing = model(batch.to(device).model_input(by_sample=False)).routing
    assert routing is not None
    real = int((batch.slots_BT >= 0).sum())
    load_cv = expert_load(routing.load_LE.double().cpu())["experts/load_cv"]
    return TrainingContext(tokens, float(routing.entropy_L.mean()) / real, load_cv)
