"""Monitoring overhead: recording and streaming metrics as a share of training, a panel reading, and a cost table.

The share compares blocks of training steps with and without the monitor, alternately in one process, using the
functions of `moetrain.train`. A block with the monitor ends when its queue is empty. In a block without it the model
does not sum routing per sample.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from benchmarks import monitor_costs
from benchmarks.configs import add_configs, load_configs, open_run
from benchmarks.timing import Timing, clock, format_share, overhead, take_turns
from moetrain.config import Settings, SettingsError
from moetrain.loggers.run_logger import RunLogger
from moetrain.trainer import Trainer

PARTS = ("share", "sums", "panel", "costs", "distances")
_WARMUP = 100  # steps within which the window of every domain must be full


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_configs(parser, "code_and_math", "wide_routing")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure (default all)")
    parser.add_argument("--pairs", type=int, default=4, help="pairs of blocks with and without the monitor (default 4)")
    parser.add_argument("--steps", type=int, default=50, help="steps per block (default 50)")
    parser.add_argument("--samples", type=int, default=1000, help="samples for the distances (default 1000)")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The chosen parts, each of `share`, `sums` and `panel` by the name of the configuration."""
    result: dict[str, Any] = {}
    measured: dict[str, Callable[[Settings], dict[str, Any]]] = {
        "share": lambda settings: share(settings, options.pairs, options.steps),
        "sums": lambda settings: sums(settings, 2 * options.steps),
        "panel": panel,
    }
    chosen = [part for part in measured if part in options.parts]
    for settings in load_configs(options) if chosen else ():
        for part in chosen:
            result.setdefault(part, {})[settings.run.name] = measured[part](settings)
    if "costs" in options.parts:
        result["costs"] = monitor_costs.costs()
    if "distances" in options.parts:
        result["distances"] = monitor_costs.distances(options.samples)
    return result


def share(settings: Settings, pairs: int = 4, steps: int = 50) -> dict[str, Any]:
    """The overhead of recording and streaming metrics as a share of training, once the domains' windows are full.

    Returns ``wall`` and ``cpu``: the relative excess of the median block with the monitor over the median block
    without it, with a 95% interval; ``inside``: the seconds inside the monitor's functions over those inside training,
    in blocks with the monitor; and the seconds of the blocks.

    Raises:
        SettingsError: no routing to monitor, too little data, or a domain whose window does not fill.
    """
    if not settings.watches_routing:
        raise SettingsError(f"{settings.run.name}: no routing to monitor: set monitor.enabled=true, and model.experts")
    disabled = settings.monitor.model_copy(update={"enabled": False})
    with open_run(settings, _WARMUP + 2 * pairs * steps) as monitored, logging(monitored):
        plain = replace(monitored, settings=settings.model_copy(update={"monitor": disabled}))
        step = _fill_windows(monitored)
        inside = {"train": 0.0, "record": 0.0, "stream": 0.0}

        def block(run: Trainer) -> None:
            nonlocal step
            for _ in range(steps):
                step += 1
                run.train_step(step)
                if run.settings.watches_routing and step % settings.monitor.every == 0:
                    run.monitor.measure_stream(run.model, step)
            if run.settings.watches_routing:
                run.monitor.publish(wait=True)  # work queued in a block counts in that block

        def with_monitor(turn: int) -> None:
            monitored.clock.seconds.clear()
            block(monitored)
            for name in inside:
                inside[name] += monitored.clock.spent(name)

        sides = {"with": with_monitor, "without": lambda turn: block(plain)}
        timings = take_turns(sides, pairs, monitored.layout.device, warmup=0)
    return {
        "shape": settings.model.model_dump(),
        "window": settings.monitor.window,
        "domains": len(settings.data.domains),
        "steps_between_readings": settings.monitor.every,
        "steps_of_a_block": steps,
        "inside": (inside["record"] + inside["stream"]) / inside["train"],
        **overhead(timings["with"], timings["without"]),
    }


def sums(settings: Settings, turns: int = 100) -> dict[str, Any]:
    """The overhead of summing routing per sample in the model: passes over the same batches with and without it.

    This is a part of `share`, measured more precisely: the two sides differ in nothing else and alternate within a
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
    return overhead(timings["with"], timings["without"])


def _fill_windows(run: Trainer) -> int:
    """Train until the window of every domain is full; returns the step."""
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
    """Seconds of one panel reading: how long training waits, until its metrics are logged, and of CPU time.

    Raises:
        SettingsError: a run without a panel, or with too little data.
    """
    waits, shown = Timing(), Timing()
    with open_run(settings, readings + 1) as run, logging(run):
        if run.state.monitor.panel is None:
            raise SettingsError(f"{settings.run.name}: no panel: it needs texts of panel.tokens tokens")
        for step in range(readings + 1):  # the first one is the warm-up
            if step:
                run.train_step(step)
            start = clock(run.layout.device)
            run.monitor.read_panel(run.model, step, run.context)
            resumed = clock(run.layout.device)
            run.monitor.publish(wait=True)
            logged = clock(run.layout.device)
            if step:
                waits.add(resumed[0] - start[0], resumed[1] - start[1])
                shown.add(logged[0] - start[0], logged[1] - start[1])
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
    """One table per part."""
    for part, title in (("share", "recording and streaming metrics"), ("sums", "summing routing per sample")):
        if part in result:
            table = Table(title, "by wall time", "by CPU time", "in its own functions")
            for name, found in result[part].items():
                own = f"{found['inside']:.2%}" if "inside" in found else ""
                table.add_row(name, format_share(found["wall"]), format_share(found["cpu"]), own)
            yield table
    if "panel" in result:
        table = Table("a panel reading", "samples", "training waits, s", "until logged, s", "CPU, s")
        for name, found in result["panel"].items():
            seconds = (found[key] for key in ("training_waits_seconds", "until_shown_seconds", "cpu_seconds"))
            table.add_row(name, str(found["samples"]), *(f"{value:.2f}" for value in seconds))
        yield table
    if "costs" in result:
        yield monitor_costs.cost_table(result["costs"])
    if "distances" in result:
        yield monitor_costs.distance_table(result["distances"])


def draw(result: dict[str, Any], path: Path) -> None:
    """Cost over samples, experts and layers.

    Raises:
        SettingsError: the costs were not measured.
    """
    if "costs" not in result:
        raise SettingsError("the figure shows costs over samples, experts and layers: add costs to --parts")
    monitor_costs.draw(result["costs"], path)
