"""What is measured while a run trains, and shown: routing, panel, held-out loss, training curves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import nn

from moetrain.dashboard.outputs import Outputs
from moetrain.data.stream import Batch
from moetrain.grokking import gram_blocks
from moetrain.model.router import Router
from moetrain.model.transformer import Routing
from moetrain.routing.panel import read_panel
from moetrain.routing.recorder import start_record
from moetrain.routing.store import as_stored, write_reading
from moetrain.run.build import Run
from moetrain.training.evaluation import heldout_losses
from moetrain.training.parallel import gather_objects
from moetrain.training.schedule import learning_rate
from moetrain.training.step import bare
from moetrain.training.throughput import peak_memory


def record(run: Run, step: int, recorded: list[tuple[Batch, Routing]]) -> None:
    """Put the routing of this process's rows of a step into the windows."""
    rows, slots = run.settings.train.batch_rows, run.stream.most_samples
    row = (step - 1) * rows + run.accelerator.process_index * (rows // run.accelerator.num_processes)
    for batch, routing in recorded:
        run.monitor.add(
            start_record(
                routing.sums_LBRE, routing.counts_LBRE, batch.samples_BS, batch.domains_BS, batch.whole_BS, row * slots
            )
        )
        row += len(batch.samples_BS)


def report_skipped(steps: list[int], outputs: Outputs | None) -> None:
    """Note steps whose update was skipped among the run's events."""
    if outputs is not None:
        for step in steps:
            outputs.guard(step, "the gradient was not finite; the update was skipped")


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
    run.clock.settle()
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
