"""The loop over a run's steps: what is measured, logged and saved after which step, and how a run ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from moetrain.checkpoint.manager import load_checkpoint
from moetrain.checkpoint.run_folder import RunFolder
from moetrain.distributed.sharding import evaluation, inner_model, unsharded_copy
from moetrain.distributed.signals import STOPPED_BY_SIGNAL, SignalNotice, StopAgreement, StopSignals
from moetrain.loggers.summary import RESULT_COLUMNS, closing_lines, summary_rows, write_summary
from moetrain.monitoring.budget import Readings
from moetrain.monitoring.monitor import CLOCKED
from moetrain.optim.schedule import learning_rate, rate_after_jump
from moetrain.report.report import report_or_say_why
from moetrain.routing.panel import reading_steps
from moetrain.run_summary import Speed, run_summary
from moetrain.trainer import Trainer
from moetrain.training.divergence import write_dump
from moetrain.training.errors import TrainingDivergedError
from moetrain.training.profiling import StepProfiler
from moetrain.training.throughput import peak_memory

_BUSY = {
    "validate": "the held-out loss",
    "panel": "the reading of the panel",
    "probes": "the probes",
    "checkpoint": "the checkpoint",
}
"""What the clock's entries are called in a line for the user."""


def fit(trainer: Trainer, folder: RunFolder, readings: Readings | None = None) -> int:
    """Train from the first step, or from the folder's checkpoint, to the summary; returns the exit status.

    Args:
        readings: how often the panel and the probes are read; None: as the settings say.

    Raises:
        TrainingDivergedError: the loss stays not finite; a dump of the step was written.
        OSError: the last checkpoint cannot be written.
    """
    settings, monitor, state = trainer.settings, trainer.monitor, trainer.state
    readings = readings or Readings(settings.panel.readings, settings.probes.readings)
    checkpoint = load_checkpoint(folder.checkpoint, verify=False) if folder.checkpoint else None
    if checkpoint is not None:
        trainer.load_state_dict(checkpoint)
    trainer.open_folder(folder.path, checkpoint)
    panel_steps = reading_steps(trainer.steps, readings.panel)
    probe_steps = reading_steps(trainer.steps, readings.probes)
    saved = True
    profiler = StepProfiler(settings.profile, folder.path, trainer.layout, trainer.terminal.note)
    if warning := profiler.unreached(state.step, trainer.steps):
        trainer.terminal.note(warning)
    with StopSignals() as stop, SignalNotice(trainer.terminal.notice, lambda: _before_a_stop(trainer)), profiler:
        agreement = StopAgreement(trainer.layout)
        trainer.terminal.start_training(state.step, trainer.steps)
        if state.step == 0:
            monitor.validate(trainer.model, 0)
            monitor.read_panel(trainer.model, 0, trainer.context)
            monitor.run_probes(trainer.model, 0, 0)
        while state.step < trainer.steps:
            with profiler.step(state.step + 1):
                trainer.train_step(state.step + 1)
            step, last = state.step, state.step == trainer.steps
            monitor.report_incidents()
            if state.guards.diverged:
                _stop_diverged(trainer, folder.path)
            if last or step % settings.monitor.every == 0:
                monitor.measure_stream(trainer.model, step)
            if last or step % settings.train.log_every == 0:
                trainer.log(step)
            if last or step % settings.train.eval_every == 0:
                monitor.validate(trainer.model, step)
            if step in panel_steps:
                monitor.read_panel(trainer.model, step, trainer.context)
                if worthless := monitor.measure_repeats(trainer.model, trainer.optimizer, step):
                    _stop_repeats(trainer, worthless)
                    panel_steps = reading_steps(trainer.steps, readings.panel)
                    probe_steps = reading_steps(trainer.steps, readings.probes)
                    last = step == trainer.steps
            if step in probe_steps:
                monitor.run_probes(trainer.model, step, state.tokens_trained)
            signal = agreement.ask(stop.received)
            every = settings.train.checkpoint_every
            if last or signal or (every and step % every == 0):
                saved = trainer.save(folder.path, wait=bool(last or signal))
            elif trainer.saver.done:
                trainer.saver.finish(trainer.logger)
            if signal and not last:
                outcome = f"saved at step {step}" if saved else "not saved: it resumes from the last checkpoint"
                trainer.terminal.end_training()
                trainer.terminal.note(f"{signal}: {outcome}; run the same command again to resume")
                if trainer.logger is not None:
                    trainer.logger.close()
                    trainer.logger.end_trackers()
                return STOPPED_BY_SIGNAL
    trainer.terminal.end_training()
    if not saved:
        raise OSError("the last step could not be saved: free some space and run the same command again to resume")
    with trainer.layout.progress.busy():
        _finish(trainer)
    return 0


def _before_a_stop(trainer: Trainer) -> str:
    """What a run that is to stop has to do before."""
    step = trainer.state.step
    busy = {**_BUSY, "train": f"step {step + 1}"}.get(trainer.clock.current or "", f"the end of step {step}")
    return f"{busy}, then the run is saved"


def _stop_repeats(trainer: Trainer, names: Sequence[str]) -> None:
    """Leave the repeats of some domains out of the rest of the stream, and say what that saves."""
    step, numbers = trainer.state.step, trainer.run_stream.to_stop(names)
    if not numbers:
        return
    trainer.monitor.publish(wait=True)  # readings still being computed belong to the stream as it was
    before = trainer.steps
    trainer.run_stream.stop_repeats(step, numbers)
    if trainer.logger is not None:
        length = (
            f"has {trainer.steps:,} steps instead of {before:,}"
            if trainer.steps < before
            else f"keeps its {before:,} steps"
        )
        rate = learning_rate(step, before, trainer.settings.optim)
        if (after := rate_after_jump(rate, step, trainer.steps, trainer.settings.optim)) is not None:
            length += f", and its learning rate goes from {rate:.3g} to {after:.3g}"
        for number in numbers:
            sentence = f"is not repeated any more; the run {length}"
            name = list(trainer.settings.data.domains)[number]
            trainer.logger.repeats(step, name, f"{name}: {sentence}")
        trainer.terminal.set_steps(trainer.steps)


def _stop_diverged(trainer: Trainer, run: Path) -> None:
    """End a run that skips every update, with a dump to replay: the model, and the rows of the last skipped step.

    Raises:
        TrainingDivergedError: always; it names the dump.
    """
    guards = trainer.state.guards
    step = guards.last_skipped
    dump = run / "dumps" / f"step_{step:08d}"
    remedy = f"see why with python tools/replay_step.py {dump}"
    with unsharded_copy(trainer.model) as model:
        if trainer.layout.is_main and not dump.exists():  # the same run diverges at the same step again
            try:
                tokens = trainer.state.tokens_trained
                with trainer.layout.progress.busy():
                    write_dump(dump, model, trainer.state.balancing, trainer.stream, trainer.corpus, step, tokens)
            except OSError as error:
                remedy = f"no dump was written ({error})"
    trainer.layout.barrier()  # no rank may end before the dump is complete
    raise TrainingDivergedError(
        f"step {step}: the loss or the gradient was not finite in {guards.skipped_in_a_row} steps in a row; "
        f"{remedy}; lower optim.learning_rate, or set train.precision=fp32"
    )


def _finish(trainer: Trainer) -> None:
    """Write the summary, whose presence marks the run as finished, and print its table."""
    with evaluation(trainer.model) as model:
        trainer.monitor.finish(model, trainer.steps)
    if trainer.logger is None:
        return
    state, clock = trainer.state, trainer.clock
    memory, seconds = peak_memory(trainer.layout.device), dict(clock.seconds)
    speed = Speed(clock.tokens, clock.rate(), clock.share(*CLOCKED), memory, seconds)
    parameters = inner_model(trainer.model).parameter_counts()
    summary = run_summary(state, trainer.corpus, trainer.stream, trainer.steps, trainer.settings, parameters, speed)
    for domain, copies in trainer.near_duplicates.items():
        summary["data"][domain]["near_duplicates"] = asdict(copies)
    folder = trainer.logger.folder
    trainer.logger.close()  # before the summary, which says that everything else is complete
    write_summary(folder, summary)
    rows = summary_rows(state.monitor.latest.domains, RESULT_COLUMNS)
    trainer.terminal.table("result", ["domain", *RESULT_COLUMNS.values()], rows)
    for line in closing_lines(summary, folder):
        trainer.terminal.note(line)
    page = report_or_say_why(folder, trainer.terminal) if trainer.settings.run.report else None
    trainer.logger.end_trackers([page] if page else [])
