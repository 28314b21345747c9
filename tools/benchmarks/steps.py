"""Our own training step: tokens a second, where its time goes, memory, and utilization of the machine's matrix rate.

Whole steps and steps taken apart take turns; tokens a second are the whole ones'. A step is taken apart by hooks on the
same functions, so the parts add up to it: data (rows put together), forward, backward (with losses and sums), optimizer
(clipping, update), monitor (recording, and one step's share of a streaming
reading, which a run computes on a thread beside the training).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from benchmarks.configs import add_configs, load_configs, open_run
from benchmarks.figures import new_figure, save
from benchmarks.flops import step_flops
from benchmarks.machine import MatrixRate
from benchmarks.timing import Timing, clock, take_turns
from moetrain.config import Settings
from moetrain.data.stream import Batch
from moetrain.distributed.launch import compute_dtype
from moetrain.distributed.sharding import inner_model
from moetrain.models.transformer import Output
from moetrain.monitoring.monitor import router_rows
from moetrain.optim.schedule import learning_rate
from moetrain.trainer import Trainer
from moetrain.training.step import forward_backward, update
from moetrain.training.throughput import peak_memory

PARTS = ("data", "forward", "backward", "optimizer", "monitor")
_WARMUP = 6  # turns of two steps: on CPU the heap grows for the first ten to fifteen


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_configs(parser, "peers")
    parser.add_argument("--turns", type=int, default=10, help="steps that count, of each kind (default 10)")
    parser.add_argument("--warmup", type=int, default=_WARMUP, help="turns of two steps before (default %(default)s)")
    parser.add_argument("--operators", type=int, default=12, help="costliest operators to list (default 12)")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """`measure_steps` of the one configuration that the command line names."""
    return measure_steps(load_configs(options)[0], options.turns, options.operators, options.warmup)


def measure_steps(settings: Settings, turns: int = 10, operators: int = 12, warmup: int = _WARMUP) -> dict[str, Any]:
    """Tokens a second, seconds of each part of a step, bytes, operations, and the costliest operators.

    Raises:
        SettingsError: too little data.
    """
    needed = 2 * (turns + warmup) + 1
    with open_run(settings, needed) as run:
        device = run.layout.device
        before = peak_memory(device)
        split: list[dict[str, float]] = []
        rate = MatrixRate(device, compute_dtype(settings, device))
        sides: dict[str, Callable[[int], object]] = {
            "whole": lambda turn: run.train_step(2 * turn + 1),
            "apart": lambda turn: split.append(step_apart(run, 2 * turn + 2)),
            "matrix rate": lambda turn: rate.turn(),
        }
        timings = take_turns(sides, turns, device, warmup)
        memory = {"before": before, "peak": peak_memory(device), "state": state_bytes(run)}
        costliest = costliest_operators(run, needed, operators) if operators else []
        batch = run.stream.batch(0, 0, settings.train.batch_rows)
        tokens = settings.train.batch_rows * settings.data.seq_len
        flops = step_flops(inner_model(run.model), tokens, batch.spans_N2)
        every, active = inner_model(run.model).parameter_counts()
    seconds = timings["whole"].seconds
    parts = {name: Timing([step[name] for step in split[warmup:]]).seconds for name in PARTS}
    return {
        "shape": settings.model.model_dump(),
        "precision": str(compute_dtype(settings, device)).removeprefix("torch."),
        "tokens_a_step": tokens,
        "samples_a_row": float((batch.samples_BS >= 0).sum() / len(batch.samples_BS)),
        "parameters": {"all": every, "active": active},
        "tokens_per_second": tokens / seconds,
        "step": timings["whole"].summary(),
        "parts_seconds": parts,
        "memory_bytes": memory,
        "matrix_flops": rate.flops,
        "utilization": {
            "6n": flops.parameters / seconds / rate.flops,
            "with_attention": flops.both / seconds / rate.flops,
        },
        "operators": costliest,
    }


def step_apart(run: Trainer, step: int) -> dict[str, float]:
    """A training step as `Trainer.train_step` takes it; returns the seconds of each of `PARTS`."""
    device, settings = run.layout.device, run.settings
    seconds = dict.fromkeys(PARTS, 0.0)
    recorded: list[tuple[Batch, Output]] = []
    with timed(seconds, "backward", device), ExitStack() as hooks:
        began = [0.0]
        model = inner_model(run.model)
        for handle in (
            model.register_forward_pre_hook(lambda *_: began.append(clock(device)[0])),
            model.register_forward_hook(lambda *_: _add(seconds, "forward", clock(device)[0] - began[-1])),
        ):
            hooks.callback(handle.remove)
        hooks.enter_context(patch.object(run.stream, "batch", _timed_call(run.stream.batch, seconds, "data", device)))
        statistics = forward_backward(
            run.layout,
            run.model,
            run.stream,
            step - 1,
            run.state.balancing,
            settings,
            lambda batch, output: recorded.append((batch, output)),
        )
    seconds["backward"] -= seconds["forward"] + seconds["data"]
    with timed(seconds, "optimizer", device):
        rate = learning_rate(step, run.steps, settings.optim)
        _, made = update(run.layout, run.model, run.optimizer, rate, settings.optim.grad_clip, statistics.loss)
        run.state.balancing.after_step(statistics.load_LE, made)
    if settings.watches_routing:
        with timed(seconds, "monitor", device):
            run.state.monitor.stream.measure(router_rows(run.model))
        seconds["monitor"] /= settings.monitor.every
        with timed(seconds, "monitor", device):
            run.recorder.record(step, recorded)
    return seconds


@contextmanager
def timed(seconds: dict[str, float], name: str, device: torch.device) -> Iterator[None]:
    began, _ = clock(device)
    yield
    _add(seconds, name, clock(device)[0] - began)


def _timed_call(call: Callable[..., Any], seconds: dict[str, float], name: str, device: torch.device) -> Any:
    def inside(*arguments: Any) -> Any:
        with timed(seconds, name, device):
            return call(*arguments)

    return inside


def _add(seconds: dict[str, float], name: str, more: float) -> None:
    seconds[name] += more


def state_bytes(run: Trainer) -> int:
    """Bytes of parameters and of the optimizer's state."""
    parameters = sum(p.nbytes for p in run.model.parameters())
    states = run.optimizer.state.values()
    return parameters + sum(v.nbytes for state in states for v in state.values() if isinstance(v, torch.Tensor))


def costliest_operators(run: Trainer, step: int, count: int) -> list[dict[str, Any]]:
    """Operators of one step by the time they take themselves, the costliest first."""
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
    """Speed and memory, parts of a step, operators."""
    table = Table("tokens/s", "seconds a step", "matrix rate, GFLOP/s", "6N", "with attention", "peak memory, GiB")
    shares = (f"{result['utilization'][key]:.1%}" for key in ("6n", "with_attention"))
    speed = (f"{result['tokens_per_second']:,.0f}", f"{result['step']['seconds']:.3f}")
    memory = f"{result['memory_bytes']['peak'] / 2**30:.2f}"
    table.add_row(*speed, f"{result['matrix_flops'] / 1e9:,.0f}", *shares, memory)
    yield table
    total = sum(result["parts_seconds"].values())
    table = Table("part of a step", "seconds", "share")
    for name, seconds in result["parts_seconds"].items():
        table.add_row(name, f"{seconds:.4f}", f"{seconds / total:.1%}")
    yield table
    if result["operators"]:
        table = Table("operator", "seconds of its own", "share", "calls")
        for row in result["operators"]:
            table.add_row(row["operator"], f"{row['seconds']:.4f}", f"{row['share']:.1%}", str(row["calls"]))
        yield table


def draw(result: dict[str, Any], path: Path) -> None:
    """The parts of a step."""
    figure, (axis,) = new_figure(1, 1)
    parts = result["parts_seconds"]
    axis.barh(list(parts)[::-1], list(parts.values())[::-1], color="#3182bd")
    axis.set(xlabel="seconds of a step")
    save(figure, path)
