"""What watching costs: recording and streaming metrics as a share of training, a panel reading, and a table of costs.

The share comes from blocks of steps with the monitor and without it, in turns in one process, through the functions of
`moetrain.train` themselves. A block with the monitor ends when all it queued is done; one without it sums no routing by
sample in the model either.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from benchmarks import monitor_costs
from benchmarks.configs import add_configs, load_configs, open_run
from benchmarks.timing import Timing, clock, share_with_interval, take_turns
from moetrain.config import Settings, SettingsError
from moetrain.loggers.run_logger import RunLogger
from moetrain.trainer import Trainer

PARTS = ("share", "sums", "panel", "costs", "distances")
_WARMUP = 100  # steps within which every domain's window has to be full


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_configs(parser, "quickstart", "wide_routing")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure (default all)")
    parser.add_argument("--pairs", type=int, default=4, help="pairs of blocks with and without (default 4)")
    parser.add_argument("--steps", type=int, default=50, help="steps of a block (default 50)")
    parser.add_argument("--samples", type=int, default=1000, help="samples of the distances (default 1000)")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """What the command line asks for, by part."""
    result: dict[str, Any] = {}
    for settings in load_configs(options) if {"share", "sums", "panel"} & set(options.parts) else ():
        name = settings.run.name
        if "share" in options.parts:
            result.setdefault("share", {})[name] = share(settings, options.pairs, options.steps)
        if "sums" in options.parts:
            result.setdefault("sums", {})[name] = sums(settings, 2 * options.steps)
        if "panel" in options.parts:
            result.setdefault("panel", {})[name] = panel(settings)
    if "costs" in options.parts:
        result["costs"] = monitor_costs.costs()
    if "distances" in options.parts:
        result["distances"] = monitor_costs.distances(options.samples)
    return result


def share(settings: Settings, pairs: int = 4, steps: int = 50) -> dict[str, Any]:
    """What recording and streaming metrics add to training, as a share of it, once the domains' windows are full.

    Returns ``wall`` and ``cpu``: by how much the median block with the monitor exceeds the median one without, with a
    95% interval; ``inside``: seconds that the monitor's own functions took over those of training, in blocks with it;
    and the seconds of the blocks.

    Raises:
        SettingsError: no routing to watch, too little data, or a domain whose window does not fill.
    """
    if not settings.watches_routing:
        raise SettingsError(f"{settings.run.name}: nothing is watched: set monitor.enabled=true and experts to record")
    silence = settings.monitor.model_copy(update={"enabled": False})
    with open_run(settings, _WARMUP + 2 * pairs * steps) as watched, logging(watched):
        silent = replace(watched, settings=settings.model_copy(update={"monitor": silence}))
        step = _fill_windows(watched)
        inside = {"train": 0.0, "record": 0.0, "stream": 0.0}

        def block(which: Trainer) -> None:
            nonlocal step
            for _ in range(steps):
                step += 1
                which.train_step(step)
                if which.settings.watches_routing and step % settings.monitor.every == 0:
                    which.monitor.measure_stream(which.model, step)
            if which.settings.watches_routing:
                which.monitor.publish(wait=True)  # a block pays for what it queued

        def with_monitor(turn: int) -> None:
            watched.clock.seconds.clear()
            block(watched)
            for name in inside:
                inside[name] += watched.clock.spent(name)

        timings = take_turns(
            {"with": with_monitor, "without": lambda turn: block(silent)}, pairs, watched.layout.device, warmup=0
        )
    watching, alone = timings["with"], timings["without"]
    return {
        "shape": settings.model.model_dump(),
        "window": settings.monitor.window,
        "domains": len(settings.data.domains),
        "steps_between_readings": settings.monitor.every,
        "steps_of_a_block": steps,
        "wall": share_with_interval(watching.wall, alone.wall),
        "cpu": share_with_interval(watching.cpu, alone.cpu),
        "inside": (inside["record"] + inside["stream"]) / inside["train"],
        "with": watching.summary(),
        "without": alone.summary(),
    }


def sums(settings: Settings, turns: int = 100) -> dict[str, Any]:
    """What summing routing by sample adds within the model: passes over the same batches with it and without, in turns.

    Far finer than `share`, of which it is a part: the two sides differ in nothing else and take their turn within a
    second. Returns ``wall`` and ``cpu`` as `share` does, of one forward and backward pass.

    Raises:
        SettingsError: too little data.
    """
    with open_run(settings, turns + 2) as run:

        def passes(turn: int, recorded: bool) -> None:
            batch = run.stream.batch(turn, 0, settings.train.micro_batch_rows or settings.train.batch_rows)
            batch = batch.to(run.layout.device)
            inputs = batch.model_input(by_sample=recorded)
            if not recorded:
                inputs = replace(inputs, recorded_BT=torch.full_like(inputs.recorded_BT, -1))
            run.model(inputs).loss_sum.backward()
            run.optimizer.zero_grad(set_to_none=True)

        sides = {"with": lambda turn: passes(turn, True), "without": lambda turn: passes(turn, False)}
        timings = take_turns(sides, turns, run.layout.device, warmup=2)
    both = timings["with"], timings["without"]
    return {
        "wall": share_with_interval(both[0].wall, both[1].wall),
        "cpu": share_with_interval(both[0].cpu, both[1].cpu),
        "with": both[0].summary(),
        "without": both[1].summary(),
    }


def _fill_windows(run: Trainer) -> int:
    """Train until every domain has a full window; returns the step."""
    domains, size = len(run.settings.data.domains), run.settings.monitor.window
    for step in range(1, _WARMUP + 1):
        run.train_step(step)
        if sum(len(window) == size for window in run.state.monitor.stream.windows().values()) == domains:
            return step
    raise SettingsError(
        f"{run.settings.run.name}: after {_WARMUP} steps a domain has fewer samples than monitor.window ({size}): "
        "lower monitor.window or panel.tokens, or give it more text"
    )


def panel(settings: Settings, readings: int = 3) -> dict[str, Any]:
    """Seconds of one panel reading: that the training waits, until its metrics are shown, and of processor time.

    Raises:
        SettingsError: a run without a panel, or with too little data.
    """
    waits, shown = Timing(), Timing()
    with open_run(settings, readings + 1) as run, logging(run):
        if run.state.monitor.panel is None:
            raise SettingsError(f"{settings.run.name}: no panel: texts have to be as long as panel.tokens")
        for step in range(readings + 1):  # the first one warms up
            if step:
                run.train_step(step)
            began = clock(run.layout.device)
            run.monitor.read_panel(run.model, step, run.context)
            trains_on = clock(run.layout.device)
            run.monitor.publish(wait=True)
            done = clock(run.layout.device)
            if step:
                waits.add(trains_on[0] - began[0], trains_on[1] - began[1])
                shown.add(done[0] - began[0], done[1] - began[1])
        samples = len(run.state.monitor.panel.panel)
    return {
        "shape": settings.model.model_dump(),
        "samples": samples,
        "tokens_of_a_sample": settings.panel.tokens,
        "training_waits_seconds": waits.seconds,
        "until_shown_seconds": shown.seconds,
        "cpu_seconds": shown.cpu_seconds,
        "readings": readings,
    }


@contextmanager
def logging(run: Trainer) -> Iterator[None]:
    """Have the run log into a folder that is removed afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        logger = RunLogger(Path(folder), list(run.settings.data.domains), None, run.terminal)
        run.monitor.open(Path(folder), logger)
        try:
            yield
        finally:
            logger.close()


def tables(result: dict[str, Any]) -> Iterator[Table]:
    """One table a part."""
    if "share" in result:
        table = Table("recording and streaming metrics", "by wall time", "by processor time", "in its own functions")
        for name, found in result["share"].items():
            cells = (f"{p['share']:.2%} ({p['low']:.2%} to {p['high']:.2%})" for p in (found["wall"], found["cpu"]))
            table.add_row(name, *cells, f"{found['inside']:.2%}")
        yield table
    if "sums" in result:
        table = Table("summing routing by sample", "by wall time", "by processor time")
        for name, found in result["sums"].items():
            cells = (f"{p['share']:.2%} ({p['low']:.2%} to {p['high']:.2%})" for p in (found["wall"], found["cpu"]))
            table.add_row(name, *cells)
        yield table
    if "panel" in result:
        table = Table("a panel reading", "samples", "training waits, s", "until shown, s", "processor, s")
        for name, found in result["panel"].items():
            seconds = (found[key] for key in ("training_waits_seconds", "until_shown_seconds", "cpu_seconds"))
            table.add_row(name, str(found["samples"]), *(f"{value:.2f}" for value in seconds))
        yield table
    if "costs" in result:
        yield monitor_costs.cost_table(result["costs"])
    if "distances" in result:
        yield monitor_costs.distance_table(result["distances"])


def draw(result: dict[str, Any], path: Path) -> None:
    """Cost against samples, experts and layers.

    Raises:
        SettingsError: the costs were not measured.
    """
    if "costs" not in result:
        raise SettingsError("the figure shows costs against samples, experts and layers: add costs to --parts")
    monitor_costs.draw(result["costs"], path)
