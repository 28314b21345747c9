"""A run from top to bottom: build, loop, close. ``accelerate launch moetrain/train.py CONFIG``"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from moetrain import __version__
from moetrain.config import Settings, SettingsError, describe_settings, load_settings
from moetrain.dashboard.outputs import Outputs
from moetrain.dashboard.preview import DATA_COLUMNS, data_rows, data_summary, model_line, panel_cost, stream_line
from moetrain.dashboard.summary import summary_rows, write_summary
from moetrain.dashboard.terminal import Terminal
from moetrain.data.corpus import Corpus, prepare_corpus
from moetrain.data.documents import DataError
from moetrain.data.stream import Batch, Stream, stream_tokens, training_stream, validation_streams
from moetrain.grokking import PhaseThresholds, gram_blocks
from moetrain.model.router import Router
from moetrain.model.transformer import Routing
from moetrain.routing.monitor import StreamMonitor
from moetrain.routing.panel import draw_panel, read_panel, reading_steps
from moetrain.routing.panel_monitor import PanelMonitor, Surroundings, memorization_summary
from moetrain.routing.recorder import record_samples
from moetrain.routing.store import as_stored, list_pieces, remove_unlisted, write_reading
from moetrain.training.balancing import Balancing
from moetrain.training.checkpoint import Checkpoint, CheckpointError, load_checkpoint, save_checkpoint
from moetrain.training.curves import Interval, expert_load
from moetrain.training.evaluation import heldout_losses
from moetrain.training.guards import STOPPED_BY_SIGNAL, FiniteGuard, StopSignals, TrainingDivergedError
from moetrain.training.initialize import initial_model
from moetrain.training.optimizer import load_optimizer_state, make_optimizer, optimizer_state
from moetrain.training.parallel import compute_dtype, end_processes, gather_objects, start_accelerator
from moetrain.training.run_folder import RunFolder, open_run_folder
from moetrain.training.schedule import learning_rate
from moetrain.training.step import StepStatistics, bare, forward_backward, update
from moetrain.training.throughput import Clock, peak_memory

USAGE = """usage: accelerate launch moetrain/train.py [CONFIG.yaml] [section.key=value ...] [--check] [--help]

Pretrains a mixture-of-experts language model and monitors its routing by sample and domain.
Without CONFIG: configs/quickstart.yaml. Watch it with: tensorboard --logdir runs

  --check   stop before step 1 and print what will happen
  --help    this text, and every setting with its default and meaning

settings:
"""
_QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"


@dataclass
class Run:
    """What a run is made of."""

    settings: Settings
    accelerator: Accelerator
    terminal: Terminal
    corpus: Corpus
    stream: Stream
    validation: dict[str, Stream]
    model: nn.Module
    optimizer: torch.optim.AdamW
    balancing: Balancing
    monitor: StreamMonitor
    panel: PanelMonitor | None
    steps: int
    interval: Interval
    token_bytes: torch.Tensor  # int64 [V], bytes of text that each token id stands for
    met: np.ndarray  # int64 [domains], text tokens trained on
    guard: FiniteGuard = field(default_factory=FiniteGuard)
    clock: Clock = field(default_factory=Clock)
    tokens_trained: int = 0
    newest: StepStatistics | None = None

    @property
    def surroundings(self) -> Surroundings:
        """What the newest step says of the routers as a whole."""
        if self.newest is None:
            return Surroundings(self.tokens_trained, None, None)
        load_cv = expert_load(self.newest.load_LE)["experts/load_cv"]
        return Surroundings(self.tokens_trained, float(self.newest.entropy_L.mean()), load_cv)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 done, 2 settings or data, 1 training, 75 told to stop."""
    arguments = sys.argv[1:] if arguments is None else arguments
    terminal = Terminal()
    if "--help" in arguments or "-h" in arguments:
        terminal.console.print(USAGE, markup=False, end="")
        for key, kind, default, meaning in describe_settings():
            terminal.console.print(f"  {key} ({kind}; default {default})\n      {meaning}", markup=False)
        return 0
    try:
        status = train(*_parse(arguments))
        end_processes()
        return status
    except (SettingsError, DataError, CheckpointError) as error:
        terminal.error(str(error))
        return 2
    except (TrainingDivergedError, OSError) as error:
        terminal.error(str(error))
        return 1


def _parse(arguments: list[str]) -> tuple[Settings, bool]:
    flags = [argument for argument in arguments if argument.startswith("-")]
    unknown = [flag for flag in flags if flag != "--check"]
    if unknown:
        raise SettingsError(f"command line {unknown[0]!r}: unknown option: --check or --help")
    words = [argument for argument in arguments if not argument.startswith("-")]
    configs = [word for word in words if "=" not in word]
    if len(configs) > 1:
        raise SettingsError(f"command line {configs[1]!r}: a second configuration: give one, and section.key=value")
    config = configs[0] if configs else _QUICKSTART
    return load_settings(config, [word for word in words if "=" in word]), "--check" in flags


def train(settings: Settings, check: bool = False) -> int:
    """One run, from its data to its summary; with ``check``, up to its first step."""
    run = build(settings)
    describe(run)
    if check:
        dry_run(run)
        return 0
    folder = claim_folder(run)
    try:
        return loop(run, folder)
    finally:
        run.terminal.end_training()
        if run.panel is not None:
            run.panel.close()
        if run.accelerator.is_main_process:
            folder.release()


def loop(run: Run, folder: RunFolder) -> int:
    """All steps from the first, or from where the run was left, to the summary."""
    settings, checkpoint = run.settings, load_checkpoint(folder.checkpoint) if folder.checkpoint else None
    first = resume(run, checkpoint) if checkpoint else 0
    outputs = None
    if run.accelerator.is_main_process:
        if checkpoint is not None:
            remove_unlisted(folder.path, checkpoint.record["pieces"])
        run.corpus.tokenizer.save_in(folder.path)  # a cache may go: the run's folder has all that its model needs
        outputs = Outputs(folder.path, list(settings.data.domains), checkpoint, run.terminal)
    with StopSignals() as stop:
        run.terminal.start_training(first, run.steps)
        readings = reading_steps(run.steps, settings.panel.readings)
        if first == 0:
            validate(run, 0, outputs)
            read(run, folder.path, 0, outputs)
        for step in range(first + 1, run.steps + 1):
            statistics, norm = train_step(run, step)
            run.interval.add(statistics, norm)
            if outputs is not None and run.guard.in_a_row:
                outputs.guard(step, "the gradient was not finite; the update was skipped")
            last = step == run.steps
            if last or step % settings.monitor.every == 0:
                measure(run, step, outputs)
            if last or step % settings.train.log_every == 0:
                log(run, step, outputs)
            if last or step % settings.train.eval_every == 0:
                validate(run, step, outputs)
            if step in readings:
                read(run, folder.path, step, outputs)
            signal = next(filter(None, gather_objects(stop.received)), None)
            every = settings.train.checkpoint_every
            saved = True
            if last or signal or (every and step % every == 0):
                saved = save(run, folder.path, step, outputs)
            if signal and not last:
                run.terminal.end_training()
                outcome = (
                    f"saved at step {step}" if saved else "could not be saved: it goes on from the last checkpoint"
                )
                run.terminal.note(f"{signal}: {outcome}; run the same command again to continue")
                return STOPPED_BY_SIGNAL
    run.terminal.end_training()
    if outputs is not None:
        finish(run, outputs)
    return 0


def build(settings: Settings) -> Run:
    """Processes, data, model and instruments of a run."""
    accelerator = start_accelerator(settings)
    terminal = Terminal(speaks=accelerator.is_main_process)
    with accelerator.main_process_first():
        corpus = prepare_corpus(settings, terminal.preparing)
    stream = training_stream(corpus, settings)
    share = settings.train.batch_rows // accelerator.num_processes
    rows = settings.train.micro_batch_rows or share
    validation = validation_streams(corpus, settings, rows)
    torch.manual_seed(settings.run.seed)
    dtype = compute_dtype(settings, accelerator.device)
    transformer = initial_model(settings, corpus.tokenizer, dtype).to(accelerator.device)
    names = list(settings.data.domains)
    steps = min(stream.steps, settings.train.max_steps or stream.steps)
    return Run(
        settings=settings,
        accelerator=accelerator,
        terminal=terminal,
        corpus=corpus,
        stream=stream,
        validation=validation,
        optimizer=make_optimizer(transformer, settings.optim),
        balancing=Balancing(transformer, settings.model),
        model=accelerator.prepare_model(transformer),
        monitor=StreamMonitor(names, settings.monitor.window, settings.monitor.tau, gather_objects),
        panel=panel_monitor(corpus, stream, settings, steps, rows),
        steps=steps,
        interval=Interval(names),
        token_bytes=torch.from_numpy(corpus.tokenizer.token_bytes()).long().to(accelerator.device),
        met=np.zeros(len(names), np.int64),
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


def describe(run: Run) -> None:
    """Print what is about to be trained, on what, and what of it will stay unused."""
    transformer, processes = bare(run.model), run.accelerator.num_processes
    run.terminal.note(f"moetrain {__version__}: {model_line(transformer)}, {processes} process{'es' * (processes > 1)}")
    for domain in run.corpus.domains:
        for place in domain.report.bad_places:
            run.terminal.note(f"skipped {place}")
    summary = data_summary(run.corpus, run.stream, run.steps, run.settings)
    run.terminal.table("data", DATA_COLUMNS, data_rows(summary))
    run.terminal.note(stream_line(run.stream, run.steps, run.settings))


def dry_run(run: Run) -> None:
    """Train a few steps, time them, and print what the whole run will take; nothing is kept."""
    steps = min(3, run.stream.steps)
    for step in range(1, steps + 1):
        run.clock.seconds.clear()  # the first steps warm up: only the last one counts
        train_step(run, step)
    seconds = run.clock.spent("train")
    with run.clock.measure("stream"):
        if run.settings.watches_routing:
            run.monitor.measure(router_rows(run.model))
    monitored = run.clock.spent("record") + run.clock.spent("stream") / run.settings.monitor.every
    tokens = run.stream.real_tokens(steps - 1)
    run.terminal.note(
        f"one step: {seconds:.2f} s, {tokens / seconds:,.0f} tokens/s; all {run.steps:,} steps: "
        f"about {run.steps * seconds / 60:.1f} min without validation; "
        f"recording and streaming metrics: about {monitored / (seconds + monitored):.1%} of it; "
        f"memory so far {peak_memory(run.accelerator.device) / 2**30:.2f} GiB"
    )
    if run.panel is not None:
        with run.clock.measure("panel"):
            read_panel(bare(run.model), run.panel.panel, 0, run.accelerator.device)
        run.terminal.note(panel_cost(run.clock.spent("panel"), run.steps * seconds, run.settings.panel.readings))


def claim_folder(run: Run) -> RunFolder:
    """The run's folder, chosen and locked by the main process, known to all."""
    folder: RunFolder | None = None
    error: Exception | None = None
    if run.accelerator.is_main_process:
        try:
            folder = open_run_folder(run.settings)
        except (SettingsError, CheckpointError, OSError) as caught:
            error = caught
    folder, error = gather_objects((folder, error))[0]
    if error is not None:
        raise error
    assert folder is not None
    for note in folder.notes:
        run.terminal.note(note)
    return folder


def train_step(run: Run, step: int) -> tuple[StepStatistics, torch.Tensor]:
    """One update (step 1 the first), and the routing of its samples into the monitor's windows."""
    recorded: list[tuple[Batch, Routing]] = []
    with run.clock.measure("train"):
        statistics = forward_backward(
            run.accelerator,
            run.model,
            run.stream,
            step - 1,
            run.balancing,
            run.settings,
            lambda batch, routing: recorded.append((batch, routing)),
        )
        rate = learning_rate(step, run.steps, run.settings.optim)
        norm, finite = update(run.model, run.optimizer, rate, run.settings.optim.grad_clip)
        if finite:
            run.balancing.after_step(statistics.load_LE)
    run.guard.check(finite, step)
    run.newest = statistics
    tokens = run.stream.real_tokens(step - 1)
    run.tokens_trained += tokens
    run.met += stream_tokens(run.stream, len(run.met), step - 1, step)
    run.clock.add_tokens(tokens)
    if run.settings.watches_routing:
        with run.clock.measure("record"):
            record(run, step, recorded)
    return statistics, norm if finite else torch.zeros_like(norm)


def record(run: Run, step: int, recorded: list[tuple[Batch, Routing]]) -> None:
    """Put the routing of this process's rows of a step into the windows."""
    rows, slots = run.settings.train.batch_rows, run.stream.most_samples
    row = (step - 1) * rows + run.accelerator.process_index * (rows // run.accelerator.num_processes)
    for batch, routing in recorded:
        run.monitor.add(
            record_samples(
                routing.sums_LBRE, routing.counts_LBRE, batch.samples_BS, batch.domains_BS, batch.whole_BS, row * slots
            )
        )
        row += len(batch.samples_BS)


def router_rows(model: nn.Module) -> np.ndarray:
    """The routers' weights, [L, E, D]."""
    return np.stack([m.weight.detach().float().cpu().numpy() for m in bare(model).modules() if isinstance(m, Router)])


def measure(run: Run, step: int, outputs: Outputs | None) -> None:
    """Read the streaming metrics of each domain and log them."""
    if not run.settings.watches_routing:
        return
    with run.clock.measure("stream"):
        readings = run.monitor.measure(router_rows(run.model))
    if outputs is not None:
        outputs.streaming(step, readings)


def read(run: Run, folder: Path, step: int, outputs: Outputs | None) -> None:
    """Read the panel, keep the reading, and have its metrics computed beside the training."""
    if run.panel is None:
        return
    with run.clock.measure("panel"):
        accelerator = run.accelerator
        process = (accelerator.process_index, accelerator.num_processes)
        inputs = run.settings.panel.linear_kernel
        reading = read_panel(
            bare(run.model), run.panel.panel, step, accelerator.device, *process, gather_objects, inputs
        )
        if outputs is None:
            return
        blocks = gram_blocks(router_rows(run.model))
        stored = as_stored(run.panel.panel, reading, run.panel.domains, blocks)
        try:
            write_reading(folder, stored)
        except OSError as error:
            outputs.guard(step, f"the panel reading was not stored ({error}); its metrics are shown")
        run.panel.submit(stored, run.surroundings)
    show_readings(run, outputs, wait=False)


def show_readings(run: Run, outputs: Outputs, wait: bool) -> None:
    """Log the panel metrics that are done; with ``wait``, all of them."""
    if run.panel is None:
        return
    with run.clock.measure("panel"):
        done = run.panel.results(wait)
    for points in done:
        run.clock.add_beside("panel", points.seconds)
        outputs.panel(points)


def validate(run: Run, step: int, outputs: Outputs | None) -> None:
    """Held-out loss of each domain."""
    with run.clock.measure("validate"):
        losses = heldout_losses(run.accelerator, bare(run.model), run.validation, run.token_bytes)
    if outputs is not None:
        outputs.validation(step, losses)


def log(run: Run, step: int, outputs: Outputs | None) -> None:
    """The training curves since the last point."""
    points = run.interval.points()
    if outputs is None:
        return
    points["optim/learning_rate"] = learning_rate(step, run.steps, run.settings.optim)
    points |= {f"data/tokens/{domain.name}": float(n) for domain, n in zip(run.corpus.domains, run.met, strict=True)}
    system = {
        "system/tokens_per_second": run.clock.rate_since_last(),
        "system/monitor_share": run.clock.share("record", "stream", "panel"),
        "system/monitor_panel": run.clock.share("panel"),
        "system/monitor_stream": run.clock.share("record", "stream"),
        "system/memory": float(peak_memory(run.accelerator.device)),
    }
    outputs.training(step, points, system)


def save(run: Run, folder: Path, step: int, outputs: Outputs | None) -> bool:
    """Write the checkpoint of a step; a disk that is full costs the checkpoint, not the run.

    Returns whether it was written, as far as this process knows: the main process writes.
    """
    windows = run.monitor.state()  # of all processes
    if outputs is None:
        return True
    show_readings(run, outputs, wait=True)
    with run.clock.measure("checkpoint"):
        states = {
            "model": bare(run.model).state_dict(),
            "optimizer": optimizer_state(bare(run.model), run.optimizer),
            "balancing": run.balancing.state(),
            "interval": run.interval.state(),
            "monitor": windows,
            "panel": run.panel.state() if run.panel else {},
        }
        record = {
            "domains": outputs.domains,
            "tokens_trained": run.tokens_trained,
            "guard": run.guard.state(),
            "corpus": run.corpus.fingerprint,
            "pieces": list_pieces(folder),
        }
        keep = run.settings.train.keep_checkpoints
        return outputs.checkpoint(step, lambda sizes: save_checkpoint(folder, step, states, record, sizes, keep))


def resume(run: Run, checkpoint: Checkpoint) -> int:
    """Put everything back as it was; returns the step to go on from.

    Raises:
        CheckpointError: the data is not what the checkpoint was trained on.
    """
    if checkpoint.record["corpus"] != run.corpus.fingerprint:
        raise CheckpointError(
            "the checkpoint was trained on other data or another tokenizer: restore them, or set train.resume=never"
        )
    model = bare(run.model)
    model.load_state_dict(checkpoint.states["model"])
    load_optimizer_state(model, run.optimizer, checkpoint.states["optimizer"])
    run.balancing.load_state(checkpoint.states["balancing"])
    run.interval.load_state(checkpoint.states.get("interval", {}), run.accelerator.device)
    run.monitor.load_state(checkpoint.states.get("monitor", {}), run.accelerator.is_main_process)
    if run.panel is not None:
        run.panel.load_state(checkpoint.states.get("panel", {}))
    run.tokens_trained = checkpoint.record["tokens_trained"]
    run.met = stream_tokens(run.stream, len(run.met), 0, checkpoint.step)
    run.guard.load_state(checkpoint.record["guard"])
    return checkpoint.step


def finish(run: Run, outputs: Outputs) -> None:
    """Write the summary, whose presence says that the run is finished, and print its table."""
    every, active = bare(run.model).parameter_counts()
    for domain, memorized in (memorization_summary(run.panel) if run.panel else {}).items():
        outputs.domains[domain]["memorized"] = memorized
    share, memory = run.clock.share("record", "stream", "panel"), peak_memory(run.accelerator.device)
    summary = {
        "domains": outputs.domains,
        "data": data_summary(run.corpus, run.stream, run.steps, run.settings),
        "steps": run.steps,
        "tokens": run.tokens_trained,
        "tokens_per_second": run.clock.rate(),
        "monitor_share": share,
        "parameters": {"all": every, "active": active},
        "rows_full": run.stream.fullness(),
        "skipped_updates": run.guard.skipped,
        "peak_memory_bytes": memory,
        "seconds": dict(run.clock.seconds),
        "version": __version__,
    }
    write_summary(outputs.folder, summary)
    outputs.close()
    columns = {"bits_per_byte": "bits/byte", "validation_loss": "held-out loss", "train_loss": "train loss"}
    columns |= {"stream/d_path": "D_path", "stream/cosine": "cosine"}
    run.terminal.table("result", ["domain", *columns.values()], summary_rows(outputs.domains, columns))
    run.terminal.note(
        f"{run.tokens_trained:,} tokens, {run.clock.rate():,.0f} tokens/s, monitoring {share:.2%} "
        f"of the time, peak memory {memory / 2**30:.2f} GiB; all of it is in {outputs.folder}"
    )


if __name__ == "__main__":
    sys.exit(main())
