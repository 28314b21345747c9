"""Our training step against transformers' and against dense models, alternately and on the same fresh data.

Each side runs in its own process, as training does, and waits while another takes its turn.

Our side is the training step of a run, including data and the recording of routing. transformers' OLMoE gets prepared
batches and its fastest configuration on this machine: every experts implementation, its own attention or torch's, and
weights and optimizer state in float32 under autocast, as ours, or all in bfloat16. Every variant is tried; the fastest
of either precision and the fastest dense model are compared. All use fused AdamW, clipping and a balancing loss.

`ratio_to_transformers` (the fastest variant), `ratio_to_transformers_float32_weights` (the fastest at our precision)
and `ratio_to_dense` (our dense model of equal active size) are ratios of throughput, ours over theirs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from common.figures import draw_bars
from rich.table import Table

from benchmarks.configs import add_configs, load_configs, open_run
from benchmarks.flops import MatrixRate, format_utilization, step_flops
from benchmarks.subprocess_bench import Maker, call_in_subprocess, in_subprocesses
from benchmarks.timing import clocked, ratio, take_clocked_turns
from benchmarks.transformers_peers import Peer, Variant, memory_refusal, variants
from moetrain.config import Settings, SettingsError
from moetrain.data.batch import Batch
from moetrain.distributed.launch import compute_dtype
from moetrain.distributed.sharding import inner_model
from moetrain.models.transformer import Transformer

OURS, OUR_DENSE = "moetrain", "moetrain dense"
_TRIED = 3  # steps per variant of transformers to choose the fastest; the last one counts
_WARMUP = 12  # the heap grows, and matmuls of new shapes are compiled, during the first ten to fifteen steps


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_configs(parser, "peers")
    parser.add_argument("--turns", type=int, default=8, help="counted steps of each side (default 8)")
    parser.add_argument("--warmup", type=int, default=_WARMUP, help=f"warm-up steps (default {_WARMUP})")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """`compare` of the one configuration that the command line names."""
    return compare(load_configs(options)[0], options.turns, options.warmup)


def compare(settings: Settings, turns: int = 8, warmup: int = _WARMUP) -> dict[str, Any]:
    """Seconds per step of each side, ratios of their medians, and utilization of the machine's matmul rate.

    Raises:
        SettingsError: too little data, or no transformers.
    """
    dense = settings.model_copy(update={"model": settings.model.model_copy(update={"experts": "dense"})})
    with open_run(settings, turns + warmup) as ours:
        device, rows = ours.layout.device, settings.train.batch_rows
        batches = [ours.stream.batch(step, 0, rows) for step in range(turns + warmup)]
        vocab_size = settings.tokenizer.rows(ours.corpus.tokenizer.vocab_size)
        tokens = rows * settings.data.seq_len
        flops = step_flops(inner_model(ours.model), tokens, batches[0].spans_N2)
    dtype = compute_dtype(settings, device)
    olmoes, denses = variants(dtype, dense=False), variants(dtype, dense=True)
    tried = call_in_subprocess(_try, [*olmoes, *denses], settings, vocab_size, device, batches[:_TRIED])
    baselines = {
        weights: _fastest([variant for variant in olmoes if variant.weights == weights], tried)
        for weights in sorted({variant.weights for variant in olmoes}, reverse=True)
    }
    dense_baseline = _fastest(denses, tried)
    rate = MatrixRate(device, dtype)
    makers: dict[str, tuple[Maker, tuple[Any, ...]]] = {
        OURS: (_our_steps, (settings, len(batches))),
        OUR_DENSE: (_our_steps, (dense, len(batches))),
    }
    for variant in (*baselines.values(), dense_baseline):
        makers[variant.name] = _transformers_steps, (variant, settings, vocab_size, device, batches)
    with in_subprocesses(makers, device) as sides:
        timings = take_clocked_turns({**sides, "matrix rate": clocked(lambda _: rate.turn(), device)}, turns, warmup)
    del timings["matrix rate"]
    olmoe = min((v.name for v in baselines.values()), key=lambda name: timings[name].seconds)
    against = {
        "ratio_to_transformers": olmoe,
        "ratio_to_transformers_float32_weights": baselines["float32"].name,
        "ratio_to_dense": OUR_DENSE,
        "ratio_to_transformers_dense": dense_baseline.name,
    }
    ratios = {key: ratio(timings[side].wall, timings[OURS].wall) for key, side in against.items()}
    return {
        "shape": settings.model.model_dump(),
        "precision": str(dtype).removeprefix("torch."),
        "warmup": warmup,
        "tokens_a_step": tokens,
        "samples_a_row": float((torch.stack([batch.samples_BS for batch in batches]) >= 0).sum() / len(batches) / rows),
        "parameters": {OURS: _parameters(settings, vocab_size), OUR_DENSE: _parameters(dense, vocab_size)},
        **{key: spread["ratio"] for key, spread in ratios.items()},
        "quartiles_by_turn": {key: spread["quartiles_by_turn"] for key, spread in ratios.items()},
        "transformers_fastest": olmoe,
        "sides": {
            name: {"tokens_per_second": tokens / timing.seconds, **timing.summary()} for name, timing in timings.items()
        },
        "matrix_flops": rate.flops,
        "utilization": flops.utilization(timings[OURS].seconds, rate.flops),
        "tried": [{"name": variant.name, **found} for variant, found in tried.items()],
    }


@contextmanager
def _our_steps(settings: Settings, steps: int) -> Iterator[Callable[[int], object]]:
    with open_run(settings, steps) as run:
        yield lambda turn: run.train_step(turn + 1)


@contextmanager
def _transformers_steps(
    variant: Variant, settings: Settings, vocab_size: int, device: torch.device, batches: list[Batch]
) -> Iterator[Callable[[int], object]]:
    peer = Peer(variant, settings, vocab_size, device)
    yield lambda turn: peer.step(batches[turn])


def _parameters(settings: Settings, vocab_size: int) -> dict[str, int]:
    with torch.device("meta"):
        counts = Transformer(settings.model, vocab_size, torch.float32).parameter_counts()
    return dict(zip(("all", "active"), counts, strict=True))


def _try(
    choices: list[Variant], settings: Settings, vocab_size: int, device: torch.device, batches: list[Batch]
) -> dict[Variant, dict[str, Any]]:
    """The seconds of the last of a few steps of each variant, or why it was not run."""
    found: dict[Variant, dict[str, Any]] = {}
    for variant in choices:
        refusal, seconds = memory_refusal(variant, settings, device), None
        if refusal is None:
            with _transformers_steps(variant, settings, vocab_size, device, batches) as step:
                for turn in range(len(batches)):
                    seconds, _ = clocked(step, device)(turn)
        found[variant] = {"seconds": seconds, "left_out": refusal}
    return found


def _fastest(choices: list[Variant], tried: dict[Variant, dict[str, Any]]) -> Variant:
    """The fastest of these variants.

    Raises:
        SettingsError: none of them fits into memory.
    """
    ran = [variant for variant in choices if tried[variant]["seconds"] is not None]
    if not ran:
        raise SettingsError(f"none of transformers' {len(choices)} variants fits into memory: make the model smaller")
    return min(ran, key=lambda variant: tried[variant]["seconds"])


def tables(result: dict[str, Any]) -> Iterator[Table]:
    """Sides by throughput, then ratios and utilization."""
    table = Table("step", "tokens/s", "seconds", "CPU seconds")
    for name, side in sorted(result["sides"].items(), key=lambda item: item[1]["seconds"]):
        table.add_row(name, f"{side['tokens_per_second']:,.0f}", f"{side['seconds']:.3f}", f"{side['cpu_seconds']:.3f}")
    yield table
    table = Table("moetrain against", "times as fast", "quartiles over turns")
    for name, spread in result["quartiles_by_turn"].items():
        shown = name.removeprefix("ratio_to_").replace("_", " ")
        table.add_row(shown, f"{result[name]:.2f}", f"{spread[0]:.2f} to {spread[1]:.2f}")
    yield table
    table = Table("machine", "matmul rate, GFLOP/s", "6N", "with attention")
    table.add_row(result["machine"]["processor"], *format_utilization(result))
    yield table


def draw(result: dict[str, Any], path: Path) -> None:
    """Throughput of each side."""
    sides = sorted(result["sides"].items(), key=lambda item: -item[1]["seconds"])
    rates = {name: side["tokens_per_second"] for name, side in sides}
    draw_bars(path, rates, "tokens per second", width=9, highlighted=OURS)
