"""What is measured while a run trains, and shown: routing, panel, held-out loss, training curves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import nn

from moetrain.data.stream import Batch
from moetrain.distributed.sharding import full_tensor, inner_model, unsharded_copy
from moetrain.grokking import gram_blocks
from moetrain.loggers.run_logger import Outputs
from moetrain.models.router import Router
from moetrain.models.transformer import Output
from moetrain.monitoring.build import Run
from moetrain.optim.schedule import learning_rate
from moetrain.probes.probe_monitor import ProbeMonitor, write_scores
from moetrain.probes.scoring import TaskScore, score
from moetrain.routing.panel import read_panel
from moetrain.routing.panel_monitor import PanelPoints
from moetrain.routing.recorder import start_record
from moetrain.routing.store import to_stored, write_reading
from moetrain.routing.stream import StreamPoints, stream_points
from moetrain.training.evaluation import heldout_losses
from moetrain.training.guards import Heard, Incident
from moetrain.training.incident_samples import merge, suspects
from moetrain.training.throughput import peak_memory

MONITORING = ("record", "stream", "panel", "probes")
"""What of the clock's entries is the monitor's."""


def record(run: Run, step: int, recorded: list[tuple[Batch, Output]]) -> None:
    """Put the routing of this process's rows of a step into the windows, and on disk where it is asked for."""
    before = run.monitor.not_finite
    rows, slots = run.settings.train.batch_rows, run.stream.most_samples
    row = (step - 1) * rows + run.layout.row_range(rows)[0]
    for batch, output in recorded:
        routing = output.routing
        assert routing is not None
        coming = start_record(
            routing.sums_LBRE, routing.counts_LBRE, batch.samples_BS, batch.domains_BS, batch.compared_BS, row * slots
        )
        run.monitor.add(coming)
        row += len(batch.samples_BS)
    store(run, step)
    if lost := run.monitor.not_finite - before:
        said = f"the routing of {lost} samples was not finite: they are left out of the streaming metrics"
        run.troubles.append(Incident(step, "not_finite", said))


def note(run: Run, heard: Heard) -> None:
    """Note what the guards have heard of, the same on all processes, with the samples that were most involved."""
    count = run.settings.guard.samples
    for incident, recorded in heard:
        mine = suspects(incident, recorded, run.stream.samples, list(run.settings.data.domains), count)
        worst = merge(run.layout.all_gather_objects(mine), count)
        if run.layout.is_main:
            run.troubles.append(replace(incident, details=incident.details | {"samples": worst}))


def tell_troubles(run: Run, outputs: Outputs | None) -> None:
    """Tell what went wrong and was survived, as far as the main process knows: `gather_troubles` brings it the rest."""
    if outputs is not None:
        for incident in run.troubles:
            outputs.guard(incident.step, incident.problem, kind=incident.kind, **incident.details)
        run.troubles.clear()


def gather_troubles(run: Run) -> None:
    """Give the main process what the others ran into, each by itself, since this was last called; all come here."""
    gathered = run.layout.all_gather_objects((run.troubles, run.monitor.not_finite))
    run.troubles = []
    run.monitor.not_finite = 0
    if run.layout.is_main:
        for process, (troubles, not_finite) in enumerate(gathered):
            where = f"process {process}: " if process else ""
            run.troubles += [replace(each, problem=where + each.problem) for each in troubles]
            run.monitor.not_finite += not_finite


def store(run: Run, step: int, everything: bool = False) -> None:
    """Routing of training samples onto disk, where it is asked for; with ``everything``, to the last sample."""
    if run.sample_store is None:
        return
    if everything:
        run.monitor.settle()
    for records in run.monitor.kept():
        run.sample_store.add(records)
    try:
        run.sample_store.write(everything)
    except OSError as error:
        said = f"routing of training samples was not stored ({error}): it is tried again"
        run.troubles.append(Incident(step, "storage", said))


def router_rows(model: nn.Module) -> np.ndarray:
    """The routers' weights, [L, E, D]; all ranks must call this."""
    return np.stack(
        [full_tensor(m.weight.detach()).cpu().numpy() for m in inner_model(model).modules() if isinstance(m, Router)]
    )


def _comparable_rows(run: Run, step: int, outputs: Outputs | None) -> np.ndarray | None:
    """`router_rows`; None, which is told, where products of them overflow, as in a run that diverges."""
    rows_LED = router_rows(run.model)
    if np.abs(rows_LED).max() < 1e18 / rows_LED.shape[-1] ** 0.5:  # a sum of squares of float32 stays finite
        return rows_LED
    if outputs is not None:
        outputs.guard(step, "the routers' weights are too large to compare: their metrics are left out")
    return None


def stored_blocks(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """The Gram blocks of the routers now, as a reading is stored with them."""
    return gram_blocks(router_rows(run.model))


def measure(run: Run, step: int, outputs: Outputs | None) -> None:
    """Have the streaming metrics of each domain computed beside the training."""
    if not run.settings.watches_routing:
        return
    with run.clock.measure("stream"):
        rows_LED = _comparable_rows(run, step, outputs)
        if rows_LED is None:
            return
        snapshot = run.monitor.snapshot(rows_LED)
        if outputs is None:
            return
        run.beside.submit(stream_points, step, snapshot)
    show(run, outputs)


def read(run: Run, folder: Path, step: int, outputs: Outputs | None) -> None:
    """Read the panel, keep the reading, and have its metrics computed beside the training."""
    if run.panel is None:
        return
    with run.clock.measure("panel"):
        rows_LED = _comparable_rows(run, step, outputs)
        if rows_LED is None:
            return
        inputs = run.settings.panel.linear_kernel
        with unsharded_copy(run.model) as model:
            reading = read_panel(model, run.panel.panel, step, run.layout, inputs)
        if outputs is None:
            return
        stored = to_stored(run.panel.panel, reading, run.panel.domains, gram_blocks(rows_LED), run.surroundings)
        try:
            write_reading(folder, stored)
        except OSError as error:
            outputs.guard(step, f"the panel reading was not stored ({error}); its metrics are shown")
        run.beside.submit(run.panel.take, stored)
    show(run, outputs)


def show(run: Run, outputs: Outputs, wait: bool = False) -> None:
    """Log what has been computed beside the training; with ``wait``, all of it."""
    with run.clock.measure("panel"), run.layout.progress.busy():  # streaming metrics are not worth waiting for
        done = run.beside.results(wait)
    for result in done:
        match result.value:
            case StreamPoints(step, readings):
                run.clock.add_beside("stream", result.seconds)
                outputs.streaming(step, readings)
            case PanelPoints() as points:
                run.clock.add_beside("panel", result.seconds)
                outputs.panel(points)


def ask(run: Run, probes: ProbeMonitor) -> dict[str, TaskScore]:
    """What the model makes of all tasks now, each process its share of them."""
    settings = run.settings.probes
    answers = settings.max_new_tokens if settings.generate else 0
    with unsharded_copy(run.model) as model:
        return score(model, probes.prepared, run.layout, answers)


def probe(run: Run, folder: Path, step: int, outputs: Outputs | None) -> None:
    """Score all tasks, keep the answers, and relate accuracy to what the router says by now."""
    if run.probes is None:
        return
    probes = run.probes
    with run.clock.measure("probes"):
        scores = ask(run, probes)
        probes.history.add(step, run.tokens_trained, scores)
    if outputs is None:
        return
    show(run, outputs, wait=True)  # correlations take the newest values: which ones those are must not depend on time
    with run.clock.measure("probes"):
        try:
            write_scores(folder, step, scores)
        except OSError as error:
            outputs.guard(step, f"the answers of the probes were not stored ({error}); their scores are shown")
        outputs.probes(step, scores)
        probes.relations.add(outputs.domains)
        for domain in outputs.domains:
            found = probes.relations.correlations(domain)
            points = {name: each["raw", "spearman"].value for name, each in found.items()}
            outputs.correlations(step, domain, {name: value for name, value in points.items() if value == value})


def validate(run: Run, step: int, outputs: Outputs | None) -> None:
    """Held-out loss of each domain."""
    with run.clock.measure("validate"), unsharded_copy(run.model) as model:
        losses = heldout_losses(run.layout, model, run.validation, run.token_bytes)
    if outputs is not None:
        outputs.validation(step, losses)


def log(run: Run, step: int, outputs: Outputs | None) -> None:
    """The training curves since the last point; none where every update since then was skipped."""
    run.clock.settle()
    points = run.interval.points()
    if outputs is None or not points:
        return
    points["optim/learning_rate"] = learning_rate(step, run.steps, run.settings.optim)
    points |= {f"data/tokens/{domain.name}": float(n) for domain, n in zip(run.corpus.domains, run.met, strict=True)}
    rate = run.clock.rate_since_last()
    system = {
        "system/tokens_per_second": rate,
        "system/mfu": rate * inner_model(run.model).flops_per_token() / run.matrix_rate,
        "system/monitor_share": run.clock.share(*MONITORING),
        "system/monitor_panel": run.clock.share("panel"),
        "system/monitor_probes": run.clock.share("probes"),
        "system/monitor_stream": run.clock.share("record", "stream"),
        "system/memory": float(peak_memory(run.layout.device)),
    }
    outputs.training(step, points, system)
