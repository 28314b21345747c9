"""Our training step: throughput, time per component, memory, and utilization of the machine's matmul rate.

Unmodified steps, which give the throughput, alternate with steps whose functions are timed: data (assembling rows),
forward, backward (with losses and reductions), optimizer (clipping and update), monitor (recording, and one step's
share of a streaming reading, which a run computes in the background).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from common.figures import draw_bars
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from benchmarks.configs import add_configs, load_configs, mesh_of_one, open_run
from benchmarks.flops import MatrixRate, format_utilization, step_flops
from benchmarks.timing import Timing, clock, take_turns
from moetrain import trainer
from moetrain.config import Settings
from moetrain.distributed.launch import compute_dtype
from moetrain.distributed.mesh import ParallelLayout
from moetrain.distributed.sharding import inner_model
from moetrain.monitoring.monitor import router_rows
from moetrain.trainer import Trainer
from moetrain.training.throughput import peak_memory

PARTS = ("data", "forward", "backward", "optimizer", "monitor")
_WARMUP = 6  # turns of two steps: on CPU the heap grows during the first ten to fifteen steps


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_configs(parser, "peers")
    parser.add_argument("--turns", type=int, default=10, help="counted steps of each kind (default 10)")
    parser.add_argument("--warmup", type=int, default=_WARMUP, help="warm-up turns of two steps (default %(default)s)")
    parser.add_argument("--mesh-of-one", action="store_true", help="shard the model over this one rank, with FSDP2")
    parser.add_argument("--operators", type=int, default=12, help="most expensive operators to list (default 12)")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """`measure_steps` of the one configuration that the command line names."""
    settings = load_configs(options)[0]
    with mesh_of_one(settings) if options.mesh_of_one else nullcontext() as layout:
        return measure_steps(settings, options.turns, options.operators, options.warmup, layout)


def measure_steps(
    settings: Settings,
    turns: int = 10,
    operators: int = 12,
    warmup: int = _WARMUP,
    layout: ParallelLayout | None = None,
) -> dict[str, Any]:
    """Throughput, seconds of each component, bytes, utilization, and the most expensive operators.

    Args:
        layout: of ranks that were started; None: they are started as for training.

    Raises:
        SettingsError: too little data.
    """
    needed = 2 * (turns + warmup) + 1
    with open_run(settings, needed, layout) as run:
        device = run.layout.device
        before = peak_memory(device)
        split: list[dict[str, float]] = []
        rate = MatrixRate(device, compute_dtype(settings, device))
        sides: dict[str, Callable[[int], object]] = {
            "plain": lambda turn: run.train_step(2 * turn + 1),
            "instrumented": lambda turn: split.append(instrumented_step(run, 2 * turn + 2)),
            "matrix rate": lambda turn: rate.turn(),
        }
        timings = take_turns(sides, turns, device, warmup)
        memory = {"before": before, "peak": peak_memory(device), "state": state_bytes(run)}
        expensive = expensive_operators(run, needed, operators) if operators else []
        batch = run.stream.batch(0, 0, settings.train.batch_rows)
        tokens = settings.train.batch_rows * settings.data.seq_len
        flops = step_flops(inner_model(run.model), tokens, batch.spans_N2)
        counts = inner_model(run.model).parameter_counts()
    seconds = timings["plain"].seconds
    parts = {name: Timing([step[name] for step in split[warmup:]]).seconds for name in PARTS}
    return {
        "shape": settings.model.model_dump(),
        "sharded": layout is not None and layout.sharded,
        "precision": str(compute_dtype(settings, device)).removeprefix("torch."),
        "tokens_a_step": tokens,
        "samples_a_row": float((batch.samples_BS >= 0).sum() / len(batch.samples_BS)),
        "parameters": dict(zip(("all", "active"), counts, strict=True)),
        "tokens_per_second": tokens / seconds,
        "step": timings["plain"].summary(),
        "parts_seconds": parts,
        "memory_bytes": memory,
        "matrix_flops": rate.flops,
        "utilization": flops.utilization(seconds, rate.flops),
        "operators": expensive,
    }


def instrumented_step(run: Trainer, step: int) -> dict[str, float]:
    """A step by `Trainer.train_step`; returns the seconds of each of `PARTS`."""
    device, settings = run.layout.device, run.settings
    seconds = dict.fromkeys(PARTS, 0.0)
    functions = (
        (run.stream, "batch", "data"),
        (inner_model(run.model), "forward", "forward"),
        (trainer, "forward_backward", "backward"),
        (trainer, "update", "optimizer"),
        (run.recorder, "record", "monitor"),
    )
    with ExitStack() as stack:
        for owner, name, part in functions:
            call = _timed_call(getattr(owner, name), seconds, part, device)
            stack.enter_context(patch.object(owner, name, call))
        run.train_step(step)
    seconds["backward"] -= seconds["forward"] + seconds["data"]
    if settings.watches_routing:
        start, _ = clock(device)
        run.state.monitor.stream.measure(router_rows(run.model))
        seconds["monitor"] += (clock(device)[0] - start) / settings.monitor.every
    return seconds


def _timed_call(call: Callable[..., Any], seconds: dict[str, float], part: str, device: torch.device) -> Any:
    """A function that adds the seconds of each call to ``seconds[part]``."""

    def timed(*arguments: Any, **options: Any) -> Any:
        start, _ = clock(device)
        try:
            return call(*arguments, **options)
        finally:
            seconds[part] += clock(device)[0] - start

    return timed


def state_bytes(run: Trainer) -> int:
    """Bytes of parameters and optimizer state."""
    parameters = sum(p.nbytes for p in run.model.parameters())
    states = run.optimizer.state.values()
    return parameters + sum(v.nbytes for state in states for v in state.values() if isinstance(v, torch.Tensor))


def expensive_operators(run: Trainer, step: int, count: int) -> list[dict[str, Any]]:
    """The operators of one step with the most self time, in descending order."""
    device = run.layout.device
    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=kinds) as profiled:
        run.train_step(step)
        clock(device)
    name = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    events = sorted(profiled.key_averages(), key=lambda event: -getattr(event, name))
    total = sum(getattr(event, name) for event in events)
    return [
        {
            "operator": event.key,
            "seconds": getattr(event, name) / 1e6,
            "share": getattr(event, name) / total,
            "calls": event.count,
        }
        for event in events[:count]
    ]


def tables(result: dict[str, Any]) -> Iterator[Table]:
    """Throughput and memory, components, operators."""
    table = Table("tokens/s", "seconds/step", "matmul rate, GFLOP/s", "6N", "with attention", "peak memory, GiB")
    speed = (f"{result['tokens_per_second']:,.0f}", f"{result['step']['seconds']:.3f}")
    memory = f"{result['memory_bytes']['peak'] / 2**30:.2f}"
    table.add_row(*speed, *format_utilization(result), memory)
    yield table
    total = sum(result["parts_seconds"].values())
    table = Table("component", "seconds", "share")
    for name, seconds in result["parts_seconds"].items():
        table.add_row(name, f"{seconds:.4f}", f"{seconds / total:.1%}")
    yield table
    if result["operators"]:
        table = Table("operator", "self time, s", "share", "calls")
        for row in result["operators"]:
            table.add_row(row["operator"], f"{row['seconds']:.4f}", f"{row['share']:.1%}", str(row["calls"]))
        yield table


def draw(result: dict[str, Any], path: Path) -> None:
    """Seconds of each component."""
    draw_bars(path, dict(reversed(result["parts_seconds"].items())), "seconds per step")
