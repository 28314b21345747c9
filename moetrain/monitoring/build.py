"""What a run is made of, and how it is put together and described before its first step."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

from moetrain import __version__
from moetrain.checkpoint.manager import CheckpointError
from moetrain.checkpoint.run_folder import RunFolder, open_run_folder
from moetrain.config import Settings, SettingsError
from moetrain.data.corpus import Corpus, prepare_corpus
from moetrain.data.stream import Stream, training_stream, validation_streams
from moetrain.distributed.launch import compute_dtype, start_ranks
from moetrain.distributed.mesh import ParallelLayout
from moetrain.distributed.sharding import distribute, inner_model
from moetrain.grokking import PhaseThresholds
from moetrain.loggers.preview import DATA_COLUMNS, data_rows, data_summary, model_line, short_lines, stream_line
from moetrain.loggers.terminal import Terminal
from moetrain.models.backends import choose_backends
from moetrain.monitoring.background import Beside
from moetrain.optim.builder import Optimizer, make_optimizer
from moetrain.optim.schedule import warmup_warning
from moetrain.probes.probe_monitor import COLUMNS, ProbeMonitor, load_probes
from moetrain.probes.tasks import check_tasks
from moetrain.routing.panel import draw_panel
from moetrain.routing.panel_monitor import PanelMonitor, PanelPoints
from moetrain.routing.sample_store import SampleStore
from moetrain.routing.store import TrainingContext
from moetrain.routing.stream import StreamMonitor, StreamPoints
from moetrain.training.balancing import Balancing
from moetrain.training.guards import Guards, Incident
from moetrain.training.initialize import initial_model
from moetrain.training.step import StepStatistics
from moetrain.training.throughput import Clock, matrix_rate
from moetrain.training.train_metrics import Interval, expert_load


@dataclass
class Run:
    """What a run is made of."""

    settings: Settings
    layout: ParallelLayout
    terminal: Terminal
    corpus: Corpus
    stream: Stream
    validation: dict[str, Stream]
    model: nn.Module
    optimizer: Optimizer
    balancing: Balancing
    guards: Guards
    monitor: StreamMonitor
    panel: PanelMonitor | None
    probes: ProbeMonitor | None
    steps: int
    interval: Interval
    matrix_rate: float  # operations a second of large products, over all processes
    token_bytes: torch.Tensor  # int64 [V], bytes of text that each token id stands for
    met: np.ndarray  # int64 [domains], text tokens trained on
    clock: Clock
    beside: Beside[StreamPoints | PanelPoints] = field(default_factory=Beside)
    sample_store: SampleStore | None = None  # once the run has a folder, where it is asked for
    troubles: list[Incident] = field(default_factory=list)  # survived, and not told yet
    tokens_trained: int = 0
    newest: StepStatistics | None = None

    @property
    def surroundings(self) -> TrainingContext:
        """What the newest step says of the routers as a whole."""
        if self.newest is None:
            return TrainingContext(self.tokens_trained, None, None)
        load_cv = expert_load(self.newest.load_LE)["experts/load_cv"]
        return TrainingContext(self.tokens_trained, float(self.newest.entropy_L.mean()), load_cv)


def build(settings: Settings, layout: ParallelLayout | None = None) -> Run:
    """Data, model and instruments of a run, and its processes where they are not started yet."""
    layout = layout or start_ranks(settings)
    terminal = Terminal(speaks=layout.is_main)
    # What a setting asks for in vain is told before the data is prepared, which may take hours.
    dtype = compute_dtype(settings, layout.device)
    choose_backends(settings.model, layout.device, dtype)
    check_tasks(settings)
    with layout.main_first():
        corpus = prepare_corpus(settings, terminal.preparing)
        probes = load_probes(settings, corpus, terminal.preparing)
    stream = training_stream(corpus, settings)
    rows = settings.train.micro_batch_rows or layout.row_range(settings.train.batch_rows)[1]
    validation = validation_streams(corpus, settings, rows)
    torch.manual_seed(settings.run.seed)
    transformer = initial_model(settings, corpus.tokenizer, dtype).to(layout.device)
    if settings.train.compile:
        transformer.compile_layers()
    model = distribute(transformer, layout)
    names = list(settings.data.domains)
    steps = min(stream.steps, settings.train.max_steps or stream.steps)
    return Run(
        settings=settings,
        layout=layout,
        terminal=terminal,
        corpus=corpus,
        stream=stream,
        validation=validation,
        optimizer=make_optimizer(transformer, settings.optim),
        balancing=Balancing(transformer, settings.model),
        guards=Guards(settings.guard),
        model=model,
        monitor=StreamMonitor(names, settings.monitor.window, settings.monitor.tau, layout.all_gather_objects),
        panel=panel_monitor(corpus, stream, settings, steps, rows),
        probes=probes,
        steps=steps,
        interval=Interval(names),
        matrix_rate=layout.world_size * matrix_rate(layout.device, dtype),
        token_bytes=torch.from_numpy(corpus.tokenizer.token_bytes()).long().to(layout.device),
        met=np.zeros(len(names), np.int64),
        clock=Clock(layout.device),
    )


def panel_monitor(corpus: Corpus, stream: Stream, settings: Settings, steps: int, rows: int) -> PanelMonitor | None:
    """The panel and what becomes of its readings; none without a router or a monitor."""
    if not settings.watches_routing:
        return None
    panel = draw_panel(corpus, stream, settings, steps, rows)
    if not len(panel):
        return None  # no text is as long as panel.tokens; the table of the data says so
    eps = {name: domain.eps for name, domain in settings.data.domains.items()}
    thresholds = PhaseThresholds(**settings.phase.model_dump())
    return PanelMonitor(panel, list(settings.data.domains), settings.monitor.tau, steps, eps, thresholds)


def sample_store(run: Run, folder: Path) -> SampleStore | None:
    """Where the routing of all training samples goes, if it is asked for."""
    settings = run.settings
    if not (settings.watches_routing and settings.monitor.store_top):
        return None
    names = list(settings.data.domains)
    top = min(settings.monitor.store_top, settings.model.num_experts)
    places = settings.train.batch_rows * run.stream.most_samples
    return SampleStore(folder, run.layout.rank, top, run.stream.samples, names, places)


def describe(run: Run) -> None:
    """Print what is about to be trained, on what, and what of it will stay unused."""
    transformer, processes = inner_model(run.model), run.layout.world_size
    run.terminal.note(f"moetrain {__version__}: {model_line(transformer)}, {processes} process{'es' * (processes > 1)}")
    for note in transformer.backends(run.layout.device).notes:
        run.terminal.note(note)
    for domain in run.corpus.domains:
        for place in domain.report.bad_places:
            run.terminal.note(f"skipped {place}")
    summary = data_summary(run.corpus, run.stream, run.steps, run.settings)
    run.terminal.table("data", DATA_COLUMNS, data_rows(summary))
    for line in short_lines(summary, run.settings):
        run.terminal.note(line)
    if run.probes is not None:
        run.terminal.table("probes", COLUMNS, run.probes.rows())
    run.terminal.note(stream_line(run.stream, run.steps, run.settings))
    if warning := warmup_warning(run.steps, run.settings.optim):
        run.terminal.note(warning)


def claim_folder(run: Run) -> RunFolder:
    """The run's folder, chosen and locked by the main process, known to all."""
    folder: RunFolder | None = None
    error: Exception | None = None
    if run.layout.is_main:
        try:
            folder = open_run_folder(run.settings)
        except (SettingsError, CheckpointError, OSError) as caught:
            error = caught
    folder, error = run.layout.all_gather_objects((folder, error))[0]
    if error is not None:
        raise error
    assert folder is not None
    for note in folder.notes:
        run.terminal.note(note)
    return folder
