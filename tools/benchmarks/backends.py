"""One part of a layer, forward and backward, by each of its backends in turns, with fresh shapes at every step.

Experts' row counts and samples' lengths are new at every step of a training run; a benchmark that repeats them hides
what a new shape costs. The work is a layer's: tokens of a step, widths of the configuration, its precision. A backend
that cannot run here is listed with the reason.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from benchmarks.configs import add_configs, load_configs
from benchmarks.figures import new_figure, save
from benchmarks.machine import this_device
from benchmarks.timing import ratio, take_turns
from moetrain.distributed.launch import compute_dtype

_WARMUP = 2
Step = Callable[[int], object]
"""Forward and backward once; given the number of the turn."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_configs(parser, "peers")
    parser.add_argument("--turns", type=int, default=10, help="steps of each backend that count (default 10)")
    parser.add_argument("--tokens", type=int, help="tokens of a step (default: the configuration's)")


def compare(options: argparse.Namespace, names: Sequence[str], make_step: Callable[..., Step]) -> dict[str, Any]:
    """Seconds of each backend's step in turns, and how many times as long as the fastest's it is.

    make_step: of settings, tokens, backend, device and number of turns, the step that is timed; see `Step`.
    """
    settings, device = load_configs(options)[0], this_device()
    if settings.train.threads:
        torch.set_num_threads(settings.train.threads)
    tokens = options.tokens or settings.train.batch_rows * settings.data.seq_len
    steps: dict[str, Step] = {}
    left_out: dict[str, str] = {}
    for name in names:
        try:
            step = make_step(settings, tokens, name, device, options.turns + _WARMUP)
            step(0)
        except (ImportError, RuntimeError, NotImplementedError, ValueError) as error:
            left_out[name] = str(error).strip().partition("\n")[0].partition(". ")[0]
        else:
            steps[name] = step
    timings = take_turns(steps, options.turns, device, _WARMUP)
    fastest = min(timings, key=lambda name: timings[name].seconds)
    return {
        "shape": settings.model.model_dump(),
        "precision": str(compute_dtype(settings, device)).removeprefix("torch."),
        "tokens_a_step": tokens,
        "fastest": fastest,
        "backends": {
            name: {**timing.summary(), "times_the_fastest": ratio(timing.wall, timings[fastest].wall)["ratio"]}
            for name, timing in timings.items()
        },
        "left_out": left_out,
    }


def tables(result: dict[str, Any]) -> Iterator[Table]:
    """Backends by speed, and those that cannot run here."""
    table = Table("backend", "ms, forward and backward", "processor ms", "times the fastest")
    for name, row in sorted(result["backends"].items(), key=lambda item: item[1]["seconds"]):
        seconds = (f"{row[key] * 1e3:.1f}" for key in ("seconds", "cpu_seconds"))
        table.add_row(name, *seconds, f"{row['times_the_fastest']:.2f}")
    for name, reason in result["left_out"].items():
        table.add_row(name, reason, "", "")
    yield table


def draw(result: dict[str, Any], path: Path) -> None:
    """Seconds of each backend."""
    figure, (axis,) = new_figure(1, 1)
    rows = sorted(result["backends"].items(), key=lambda item: -item[1]["seconds"])
    axis.barh([name for name, _ in rows], [row["seconds"] for _, row in rows], color="#3182bd")
    axis.set(xlabel="seconds, forward and backward")
    save(figure, path)
