"""A run kept: its checkpoints, how it takes one up again, and the summary it ends with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from moetrain import __version__
from moetrain.checkpoint.manager import (
    Checkpoint,
    CheckpointError,
    State,
    end_write,
    help_write,
    prune_checkpoints,
    save_checkpoint,
    write_checkpoint,
)
from moetrain.data.stream import stream_tokens
from moetrain.distributed.sharding import inner_model, unsharded_copy
from moetrain.grokking.paper import CORRELATIONS
from moetrain.loggers.preview import data_summary
from moetrain.loggers.run_logger import Outputs
from moetrain.loggers.summary import summary_rows, write_summary
from moetrain.monitoring.build import Run
from moetrain.monitoring.delays import delays
from moetrain.monitoring.watch import MONITORING, gather_troubles, note, show, store, tell_troubles
from moetrain.optim.builder import initial_optimizer_state, optimizer_state
from moetrain.report.report import report_or_say_why
from moetrain.routing.panel_monitor import memorization_summary
from moetrain.routing.store import list_pieces
from moetrain.training.guards import TrainingDivergedError
from moetrain.training.throughput import peak_memory


def save(run: Run, folder: Path, step: int, outputs: Outputs | None) -> bool:
    """Write the checkpoint of a step; a disk that is full costs the checkpoint, not the run.

    Returns whether it was written, on every process.
    """
    note(run, run.guards.settle())
    store(run, step, everything=True)  # before the next lines, where all processes meet: the manifest lists every piece
    gather_troubles(run)
    tell_troubles(run, outputs)  # a run that goes on from here would not hear of them again
    windows = run.monitor.state()  # of all processes
    parts = {
        "model": inner_model(run.model).state_dict(),
        "optimizer": optimizer_state(inner_model(run.model), run.optimizer),
    }
    saved = False
    if outputs is None:
        help_write(parts, run.layout)
    else:
        try:
            saved = _write(run, folder, step, outputs, {**parts, "monitor": windows})
        finally:
            end_write(run.layout)
    return run.layout.all_gather_objects(saved)[0]


def _write(run: Run, folder: Path, step: int, outputs: Outputs, parts: Mapping[str, State]) -> bool:
    """The main process's part of `save`, with what all processes have a part in."""
    show(run, outputs, wait=True)
    with run.clock.measure("checkpoint"):
        states = {
            **parts,
            "balancing": run.balancing.state(),
            "interval": run.interval.state(),
            "panel": run.panel.state() if run.panel else {},
            "probes": run.probes.history.state() if run.probes else {},
            "relations": run.probes.relations.state() if run.probes else {},
        }
        record = {
            "domains": outputs.domains,
            "tasks": outputs.tasks,
            "tokens_trained": run.tokens_trained,
            "guards": run.guards.state(),
            "corpus": run.corpus.fingerprint,
            "pieces": list_pieces(folder),
            "not_finite": run.monitor.not_finite,
        }
        saved = outputs.checkpoint(step, lambda sizes: save_checkpoint(folder, step, states, record, sizes, run.layout))
        if saved:
            try:
                prune_checkpoints(folder, run.settings.train.keep_checkpoints, run.settings.train.keep_every)
            except OSError as error:
                outputs.guard(step, f"an old checkpoint was not removed ({error})")
        return saved


def resume(run: Run, checkpoint: Checkpoint) -> int:
    """Put everything back as it was; returns the step to go on from.

    Raises:
        CheckpointError: the data is not what the checkpoint was trained on.
    """
    if checkpoint.record["corpus"] != run.corpus.fingerprint:
        raise CheckpointError(
            "the checkpoint was trained on other data or another tokenizer: restore them, or set train.resume=never"
        )
    model = inner_model(run.model)
    checkpoint.states.fill("model", model.state_dict())
    if checkpoint.states.names("optimizer"):
        checkpoint.states.fill("optimizer", initial_optimizer_state(model, run.optimizer))
    run.balancing.load_state(checkpoint.states["balancing"])
    run.interval.load_state(checkpoint.states.get("interval", {}), run.layout.device)
    run.monitor.load_state(checkpoint.states.get("monitor", {}), run.layout.is_main)
    if run.panel is not None:
        run.panel.load_state(checkpoint.states.get("panel", {}))
    if run.probes is not None:
        run.probes.history.load_state(checkpoint.states.get("probes", {}))
        run.probes.relations.load_state(checkpoint.states.get("relations", {}))
    run.tokens_trained = checkpoint.record["tokens_trained"]
    run.met = stream_tokens(run.stream, len(run.met), 0, checkpoint.step)
    run.guards.load_state(checkpoint.record["guards"], run.layout.device)
    run.monitor.not_finite = checkpoint.record["not_finite"] if run.layout.is_main else 0
    return checkpoint.step


def stop_diverged(run: Run, folder: Path) -> None:
    """End a run that skips every update, with a dump to replay: the model as it is, and the rows of the last such step.

    Raises:
        TrainingDivergedError: always; it names the dump.
    """
    step = run.guards.last_skipped
    dump = folder / "dumps" / f"step_{step:08d}"
    see = f"see why with python tools/replay_step.py {dump}"
    with unsharded_copy(run.model) as model:
        if run.layout.is_main and not dump.exists():  # a run that was run again comes to the same
            try:
                _dump(replace(run, model=model), dump, step)
            except OSError as error:
                see = f"no dump was written ({error})"
    run.layout.barrier()  # none may end before the dump stands
    raise TrainingDivergedError(
        f"step {step}: the loss or the gradient was not finite in {run.guards.skipped_in_a_row} steps in a row; {see}; "
        "lower optim.learning_rate, or set train.precision=fp32"
    )


def _dump(run: Run, dump: Path, step: int) -> None:
    rows = run.stream.batch(step - 1, 0, run.settings.train.batch_rows)
    samples = rows.samples_BS[rows.samples_BS >= 0].numpy()
    named = {
        "domain": [run.corpus.domains[number].name for number in run.stream.samples.domain[samples]],
        "document": run.stream.samples.document[samples].tolist(),
        "piece": run.stream.samples.piece[samples].tolist(),
    }
    states = {"model": inner_model(run.model).state_dict(), "balancing": run.balancing.state(), "batch": vars(rows)}
    record = {"tokens_trained": run.tokens_trained, "corpus": run.corpus.fingerprint, "samples": named}
    write_checkpoint(dump, step, states, record, {})


def finish(run: Run, outputs: Outputs) -> None:
    """Write the summary, whose presence says that the run is finished, and print its table.

    The run's model has to be whole, see `unsharded_copy`: the main process comes here alone.
    """
    every, active = inner_model(run.model).parameter_counts()
    if run.panel is not None:
        for domain, memorized in memorization_summary(run.panel).items():
            outputs.domains[domain]["memorized"] = memorized
            outputs.memorized(run.steps, domain, {"rule": "finished run", **memorized})
    if run.probes is not None:
        for name, task in outputs.tasks.items():
            task["generalized"] = run.probes.history.group_sizes(name)
        for domain in outputs.domains:
            outputs.domains[domain]["correlations"] = run.probes.relations.as_dict(domain)
        for domain, delay in delays(run).items():
            outputs.delay(run.steps, domain, delay.mean.steps if delay.mean else None, delay.as_dict())
    share, memory = run.clock.share(*MONITORING), peak_memory(run.layout.device)
    summary = {
        "domains": outputs.domains,
        "probes": outputs.tasks,
        "correlations_of_the_paper": CORRELATIONS,
        "data": data_summary(run.corpus, run.stream, run.steps, run.settings),
        "steps": run.steps,
        "tokens": run.tokens_trained,
        "tokens_per_second": run.clock.rate(),
        "monitor_share": share,
        "parameters": {"all": every, "active": active},
        "rows_full": run.stream.fullness(),
        "skipped_updates": run.guards.skipped,
        "samples_not_finite": run.monitor.not_finite,
        "peak_memory_bytes": memory,
        "seconds": dict(run.clock.seconds),
        "version": __version__,
    }
    outputs.close()  # before the summary, whose presence says that all else stands
    write_summary(outputs.folder, summary)
    columns = {"bits_per_byte": "bits/byte", "validation_loss": "held-out loss", "train_loss": "train loss"}
    columns |= {"stream/d_path": "D_path", "stream/cosine": "cosine"}
    run.terminal.table("result", ["domain", *columns.values()], summary_rows(outputs.domains, columns))
    run.terminal.note(
        f"{run.tokens_trained:,} tokens, {run.clock.rate():,.0f} tokens/s, monitoring {share:.2%} "
        f"of the time, peak memory {memory / 2**30:.2f} GiB; all of it is in {outputs.folder}"
    )
    if run.settings.run.report:
        report_or_say_why(outputs.folder, run.terminal)
