"""How the cost of training and of watching grows: with layers, experts, top-k, sequence length, domains, panel size.

One quantity varies at a time, the others are those of a small base. Each size is measured in a process of its own:
seconds of a step, of recording its routing, and of a panel reading with its metrics. The growth of a cost is the slope
of its logarithm over that of the size, between the two largest sizes: 1 is proportional. The last part keeps the
streaming windows over a simulated stream and reports the memory they hold.
"""

from __future__ import annotations

import argparse
import json
import math
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from common import CODE_AND_MATH
from common.figures import new_figure, save
from rich.table import Table

from benchmarks.configs import open_run
from benchmarks.monitor import logging
from benchmarks.subprocess_bench import call_in_subprocess
from benchmarks.timing import clock
from moetrain.config import Settings, load_settings
from moetrain.data.builtin import documents
from moetrain.routing.recorder import SampleRouting
from moetrain.routing.stream import StreamMonitor

STEP_TOKENS = 2048
BASE: dict[str, int] = {
    "layers": 4,
    "experts": 16,
    "top-k": 2,
    "sequence length": 256,
    "domains": 2,
    "panel samples": 64,
}
VARIED: dict[str, tuple[int, ...]] = {
    "layers": (2, 4, 8, 16),
    "experts": (16, 64, 256),
    "top-k": (1, 2, 4, 8),
    "sequence length": (128, 256, 512, 1024),
    "domains": (2, 8, 32, 64),
    "panel samples": (16, 64, 256),
}
COSTS = {"step": "step", "record": "recording, per step", "reading": "panel reading"}
_COLORS = {"step": "#636363", "record": "#d95f02", "reading": "#3182bd"}
_SIMULATED = {"domains": 4, "layers": 4, "experts": 16, "window": 64, "samples_a_step": 8}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", nargs="+", choices=[*VARIED, "memory"], help="only these quantities")
    parser.add_argument("--steps", type=int, default=12, help="timed steps of each size (default 12)")
    parser.add_argument("--readings", type=int, default=3, help="timed panel readings of each size (default 3)")
    parser.add_argument("--stream", type=int, default=100_000, metavar="STEPS", help="steps of the simulated stream")
    parser.add_argument("--most", type=int, help="leave out larger sizes")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """A row per size of each quantity, the growth of each cost, and the memory of the windows over the stream."""
    rows = []
    for quantity, sizes in VARIED.items():
        if options.only and quantity not in options.only:
            continue
        for size in sizes:
            if options.most and size > options.most and size != sizes[0]:
                continue
            shape = BASE | {quantity: size}
            measured = call_in_subprocess(measure, shape, options.steps, options.readings)
            rows.append({"varied": quantity, "size": size, **measured})
    result: dict[str, Any] = {"base": BASE, "rows": rows, "growth": growth(rows)}
    if not options.only or "memory" in options.only:
        result["memory"] = call_in_subprocess(stream_memory, options.stream)
    return result


def write_texts(shape: dict[str, int], folder: Path) -> None:
    """A file of arithmetic for each domain, all of different texts."""
    size = max(30_000, 20_000 * shape["panel samples"] // shape["domains"])
    texts = documents("math", size=2 * size * shape["domains"], seed=0)
    for number in range(shape["domains"]):
        written = 0
        with (folder / f"d{number}.jsonl").open("w", encoding="utf-8") as file:
            while written < size:
                text = str(next(texts))
                written += len(text)
                file.write(json.dumps({"text": text}) + "\n")


def overrides(shape: dict[str, int], folder: Path) -> list[str]:
    """The settings of a run of a shape on the texts in a folder, 2,048 tokens a step."""
    return [
        "run.name=growth",
        "data.domains={}",
        f"data.root={folder}",
        f"data.cache_dir={folder / 'cache'}",
        *(f"data.domains.d{number}.path=d{number}.jsonl" for number in range(shape["domains"])),
        "data.heldout_share=0.2",
        f"data.seq_len={shape['sequence length']}",
        "tokenizer.vocab_size=512",
        "model.hidden_size=128",
        f"model.num_hidden_layers={shape['layers']}",
        f"model.num_experts={shape['experts']}",
        f"model.num_experts_per_tok={shape['top-k']}",
        "model.intermediate_size=64",
        f"train.batch_rows={STEP_TOKENS // shape['sequence length']}",
        f"panel.samples={shape['panel samples']}",
        "panel.tokens=20",
        "probes.builtin=false",
        "probes.tasks=[]",
    ]


def measure(shape: dict[str, int], steps: int, readings: int) -> dict[str, Any]:
    """Median seconds of a step, of recording its routing, and of a panel reading until it is logged; tokens/s."""
    with TemporaryDirectory() as folder:
        write_texts(shape, Path(folder))
        settings = load_settings(CODE_AND_MATH, overrides(shape, Path(folder)))
        return _measure(settings, steps, readings)


def _measure(settings: Settings, steps: int, readings: int) -> dict[str, Any]:
    with open_run(settings, 4 + steps + readings) as made, logging(made):
        panel = made.state.monitor.panel
        assert panel is not None
        seconds: dict[str, list[float]] = {name: [] for name in COSTS}
        for step in range(1, 4 + steps):
            before = {name: made.clock.spent(name) for name in ("train", "record")}
            made.train_step(step)
            if step > 3:
                for cost, name in (("step", "train"), ("record", "record")):
                    seconds[cost].append(made.clock.spent(name) - before[name])
        for reading in range(readings + 1):  # the first one is the warm-up
            step = 4 + steps + reading
            made.train_step(step)
            start = clock(made.layout.device)[0]
            made.monitor.read_panel(made.model, step, made.context)
            made.monitor.publish(wait=True)
            if reading:
                seconds["reading"].append(clock(made.layout.device)[0] - start)
        found = {name: median(each) for name, each in seconds.items()}
        tokens = float(np.mean([made.stream.real_tokens(step) for step in range(3, 3 + steps)]))
        return found | {"tokens_per_second": tokens / found["step"], "panel": len(panel.panel)}


def growth(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Per quantity and cost, the slope of log seconds over log size between the two largest sizes."""
    found: dict[str, dict[str, float]] = {}
    for quantity in dict.fromkeys(row["varied"] for row in rows):
        own = sorted((row for row in rows if row["varied"] == quantity), key=lambda row: row["size"])
        if len(own) > 1:
            low, high = own[-2:]
            ratio = math.log(high["size"] / low["size"])
            found[quantity] = {cost: math.log(high[cost] / low[cost]) / ratio for cost in COSTS}
    return found


def stream_memory(steps: int) -> dict[str, Any]:
    """Bytes that Python holds for the streaming windows at ten points of a stream of random routing."""
    shape = _SIMULATED
    rng = np.random.default_rng(0)
    monitor = StreamMonitor([f"d{number}" for number in range(shape["domains"])], shape["window"], 0.7)
    count, places = shape["samples_a_step"], []
    tracemalloc.start()
    for step in range(1, steps + 1):
        logits = rng.normal(size=(count, shape["layers"], shape["experts"]))
        weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        domains = rng.integers(0, shape["domains"], count)
        monitor.add(SampleRouting.from_weights(weights, np.arange(count), domains, step * count))
        if step % max(1, steps // 10) == 0:
            places.append({"step": step, "bytes": tracemalloc.get_traced_memory()[0]})
    tracemalloc.stop()
    return {**shape, "steps": steps, "points": places}


def tables(result: dict[str, Any]) -> Iterator[Table]:
    """Costs by size, their growth, and memory over the stream."""
    table = Table("varied", "size", "tokens/s", *(f"{title}, ms" for title in COSTS.values()), "readings as steps")
    for row in result["rows"]:
        costs = (f"{row[cost] * 1e3:.2f}" for cost in COSTS)
        table.add_row(
            row["varied"],
            str(row["size"]),
            f"{row['tokens_per_second']:,.0f}",
            *costs,
            f"{row['reading'] / row['step']:.1f}",
        )
    yield table
    slopes = Table("growth (1: proportional)", *COSTS.values())
    for quantity, found in result["growth"].items():
        slopes.add_row(quantity, *(f"{found[cost]:.2f}" for cost in COSTS))
    yield slopes
    if "memory" in result:
        memory = Table("steps of a simulated stream", "kB held")
        for point in result["memory"]["points"]:
            memory.add_row(f"{point['step']:,}", f"{point['bytes'] / 1e3:.0f}")
        yield memory


def draw(result: dict[str, Any], path: Path) -> None:
    """Seconds over each quantity."""
    quantities = list(dict.fromkeys(row["varied"] for row in result["rows"]))
    figure, axes = new_figure(len(quantities), width=3.4)
    for axis, quantity in zip(axes, quantities, strict=True):
        own = [row for row in result["rows"] if row["varied"] == quantity]
        sizes = [row["size"] for row in own]
        for cost, title in COSTS.items():
            axis.plot(sizes, [row[cost] for row in own], "o-", color=_COLORS[cost], label=title)
        axis.set(xscale="log", yscale="log", xlabel=quantity)
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.minorticks_off()
    axes[0].set(ylabel="seconds")
    axes[0].legend(frameon=False)
    save(figure, path)
