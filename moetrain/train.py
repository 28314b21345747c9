"""A run from top to bottom: build, loop, close. ``accelerate launch moetrain/train.py CONFIG``"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from moetrain.checkpoint.manager import CheckpointError, load_checkpoint, move_superseded
from moetrain.checkpoint.run_folder import RunFolder
from moetrain.config import Settings, SettingsError, describe_settings, load_settings
from moetrain.data.documents import DataError
from moetrain.data.stream import Batch, stream_tokens
from moetrain.distributed.launch import end_processes, leave, start_ranks
from moetrain.distributed.sharding import unsharded_copy
from moetrain.distributed.signals import STOPPED_BY_SIGNAL, StopAgreement, StopSignals
from moetrain.distributed.watchdog import watchdog
from moetrain.loggers.run_logger import Outputs
from moetrain.loggers.terminal import Terminal
from moetrain.loggers.trackers import check_trackers, start_trackers
from moetrain.models.transformer import Output
from moetrain.monitoring.budget import LEAST, keep_within_budget, measure_costs
from moetrain.monitoring.build import Run, build, claim_folder, describe, sample_store
from moetrain.monitoring.keep import finish, resume, save, stop_diverged
from moetrain.monitoring.watch import log, measure, note, probe, read, record, router_rows, tell_troubles, validate
from moetrain.optim.schedule import learning_rate
from moetrain.routing.panel import reading_steps
from moetrain.routing.store import remove_unlisted
from moetrain.training.guards import TrainingDivergedError
from moetrain.training.step import forward_backward, update
from moetrain.training.throughput import peak_memory

USAGE = """usage: accelerate launch moetrain/train.py [CONFIG.yaml] [section.key=value ...] [--check] [--help]

Pretrains a mixture-of-experts language model and monitors its routing by sample and domain.
Without CONFIG: configs/quickstart.yaml. Watch it with: tensorboard --logdir runs

  --check   stop before step 1 and print what will happen
  --help    this text, and every setting with its default and meaning

settings:
"""
_QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    0 done, 1 training, 2 settings or data, 75 saved because it was told to stop, 130 interrupted outside of the steps.
    """
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
    except KeyboardInterrupt:
        terminal.error("interrupted: what was saved stays; run the same command again to continue")
        return 130


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
    check_trackers(settings.run.trackers)
    layout = start_ranks(settings)
    with watchdog(layout, preparing=True):
        run = build(settings, layout)
        describe(run)
        if check:
            dry_run(run)
            return 0
        folder = claim_folder(run)
    try:
        with watchdog(layout):
            keep_within_budget(run, folder.path, folder.checkpoint is not None)
            return loop(run, folder)
    finally:
        run.terminal.end_training()
        run.beside.close()
        if run.layout.is_main:
            folder.release()


def loop(run: Run, folder: RunFolder) -> int:
    """All steps from the first, or from where the run was left, to the summary."""
    settings = run.settings
    checkpoint = load_checkpoint(folder.checkpoint, verify=False) if folder.checkpoint else None
    first = resume(run, checkpoint) if checkpoint else 0
    outputs = None
    if run.layout.is_main:
        if checkpoint is not None:
            move_superseded(folder.path, checkpoint.step)
            remove_unlisted(folder.path, checkpoint.record["pieces"])
        run.corpus.tokenizer.save_in(folder.path)  # a cache may go: the run's folder has all that its model needs
        tasks = run.probes.prepared.tasks if run.probes is not None else []
        trackers = start_trackers(settings, folder.path)
        outputs = Outputs(folder.path, list(settings.data.domains), checkpoint, run.terminal, tasks, trackers)
    run.sample_store = sample_store(run, folder.path)
    run.monitor.keeps = run.sample_store is not None
    saved = True
    with StopSignals() as stop:
        agreement = StopAgreement(run.layout)
        run.terminal.start_training(first, run.steps)
        readings = reading_steps(run.steps, settings.panel.readings)
        probings = reading_steps(run.steps, settings.probes.readings)
        if first == 0:
            validate(run, 0, outputs)
            read(run, folder.path, 0, outputs)
            probe(run, folder.path, 0, outputs)
        for step in range(first + 1, run.steps + 1):
            train_step(run, step)
            tell_troubles(run, outputs)
            if run.guards.diverged:
                stop_diverged(run, folder.path)
            last = step == run.steps
            if last or step % settings.monitor.every == 0:
                measure(run, step, outputs)
            if last or step % settings.train.log_every == 0:
                log(run, step, outputs)
            if last or step % settings.train.eval_every == 0:
                validate(run, step, outputs)
            if step in readings:
                read(run, folder.path, step, outputs)
            if step in probings:
                probe(run, folder.path, step, outputs)
            signal = agreement.ask(stop.received)
            every = settings.train.checkpoint_every
            if last or signal or (every and step % every == 0):
                saved = save(run, folder.path, step, outputs)
            if signal and not last:
                run.terminal.end_training()
                if outputs is not None:
                    outputs.close()
                outcome = (
                    f"saved at step {step}" if saved else "could not be saved: it goes on from the last checkpoint"
                )
                run.terminal.note(f"{signal}: {outcome}; run the same command again to continue")
                return STOPPED_BY_SIGNAL
    run.terminal.end_training()
    if not saved:
        raise OSError("the last step could not be saved: free some space and run the same command again to continue")
    with unsharded_copy(run.model) as model:
        if outputs is not None:
            with run.layout.progress.busy():
                finish(replace(run, model=model), outputs)
    return 0


def dry_run(run: Run) -> None:
    """Train a few steps, time them, and print what the whole run will take; nothing is kept."""
    steps = min(3, run.stream.steps)
    for step in range(1, steps + 1):
        run.clock.seconds.clear()  # the first steps warm up: only the last one counts
        train_step(run, step)
        run.clock.settle()
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
        f"memory so far {peak_memory(run.layout.device) / 2**30:.2f} GiB"
    )
    for cost in measure_costs(run, seconds):
        auto = run.settings.monitor.budget == "auto"
        readings = max(LEAST, cost.affordable) if auto else getattr(run.settings, cost.what).readings
        run.terminal.note(cost.line(readings))


def train_step(run: Run, step: int) -> None:
    """One update (step 1 the first), into curves and guards, its samples' routing on its way into the windows."""
    recorded: list[tuple[Batch, Output]] = []
    with run.clock.measure("train"):
        statistics = forward_backward(
            run.layout,
            run.model,
            run.stream,
            step - 1,
            run.balancing,
            run.settings,
            lambda batch, output: recorded.append((batch, output)),
        )
        rate = learning_rate(step, run.steps, run.settings.optim)
        norm, made = update(run.layout, run.model, run.optimizer, rate, run.settings.optim.grad_clip, statistics.loss)
        run.balancing.after_step(statistics.load_LE, made)
        run.interval.add(statistics, norm, made)
        note(run, run.guards.check(step, made, statistics.loss, statistics.load_LE, recorded))
    run.newest = statistics
    tokens = run.stream.real_tokens(step - 1)
    run.tokens_trained += tokens
    run.met += stream_tokens(run.stream, len(run.met), step - 1, step)
    run.clock.add_tokens(tokens)
    if run.settings.watches_routing:
        with run.clock.measure("record"):
            record(run, step, recorded)


if __name__ == "__main__":
    leave(main())
