"""A training step beside transformers' and beside dense models, on the same fresh data, in turns in one process.

Ours is the step that a run takes, data and recording of routing included. transformers' OLMoE gets the batch ready made
and may run as it is fastest here: each of its experts implementations, with its own attention or torch's, with weights
in float32 under autocast or in bfloat16. Each is tried; the two fastest, and its fastest dense model, take the turns.
All have a fused AdamW, clipping and a balancing loss.

`ratio_to_transformers` and `ratio_to_dense` (our own dense twin) say how many times as many tokens a second we train.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from benchmarks.configs import add_configs, load_configs, open_run
from benchmarks.figures import new_figure, save
from benchmarks.flops import step_flops
from benchmarks.machine import MatrixRate
from benchmarks.timing import clock, ratio, take_turns
from benchmarks.transformers_peers import Peer, Variant, memory_refusal, variants
from moetrain.config import Settings
from moetrain.data.stream import Batch
from moetrain.train import train_step
from moetrain.training.parallel import compute_dtype
from moetrain.training.sharding import bare

OURS, OUR_DENSE = "moetrain", "moetrain dense"
_TRIED = 2  # steps of each of transformers' variants, the first to warm up, before the fastest are chosen
_WARMUP = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_configs(parser, "peers")
    parser.add_argument("--turns", type=int, default=8, help="steps of each side that count (default 8)")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """`compare` of the one configuration that the command line names."""
    return compare(load_configs(options)[0], options.turns)


def compare(settings: Settings, turns: int = 8) -> dict[str, Any]:
    """Seconds of a step of each side, ratios of their medians, and utilization of the machine's matrix rate.

    Raises:
        SettingsError: too little data, or no transformers.
    """
    dense = settings.model_copy(update={"model": settings.model.model_copy(update={"experts": "dense"})})
    with open_run(settings, turns + _WARMUP) as ours, open_run(dense, turns + _WARMUP) as twin:
        device, rows = ours.accelerator.device, settings.train.batch_rows
        batches = [ours.stream.batch(step, 0, rows) for step in range(turns + _WARMUP)]
        vocab_size = ours.corpus.tokenizer.vocab_size
        dtype = compute_dtype(settings, device)
        tried: list[dict[str, Any]] = []
        theirs = _fastest(variants(dtype, dense=False), 2, settings, vocab_size, device, batches, tried)
        their_dense = _fastest(variants(dtype, dense=True), 1, settings, vocab_size, device, batches, tried)
        peers = {variant.name: Peer(variant, settings, vocab_size, device) for variant in [*theirs, *their_dense]}
        rate = MatrixRate(device, dtype)
        sides: dict[str, Callable[[int], object]] = {
            OURS: lambda turn: train_step(ours, turn + 1),
            OUR_DENSE: lambda turn: train_step(twin, turn + 1),
            **{name: _stepper(peer, batches) for name, peer in peers.items()},
            "matrix rate": lambda turn: rate.turn(),
        }
        timings = take_turns(sides, turns, device, _WARMUP)
        tokens = rows * settings.data.seq_len
        flops = step_flops(bare(ours.model), tokens, batches[0].spans_N2)
        parameters = {OURS: bare(ours.model).parameter_counts(), OUR_DENSE: bare(twin.model).parameter_counts()}
    del timings["matrix rate"]
    olmoe = min((v.name for v in theirs), key=lambda name: timings[name].seconds)
    seconds = timings[OURS].wall
    to_transformers, to_dense = ratio(timings[olmoe].wall, seconds), ratio(timings[OUR_DENSE].wall, seconds)
    to_their_dense = ratio(timings[their_dense[0].name].wall, seconds)
    return {
        "shape": settings.model.model_dump(),
        "precision": str(dtype).removeprefix("torch."),
        "tokens_a_step": tokens,
        "samples_a_row": float((torch.stack([batch.samples_BS for batch in batches]) >= 0).sum() / len(batches) / rows),
        "parameters": {name: {"all": counts[0], "active": counts[1]} for name, counts in parameters.items()},
        "ratio_to_transformers": to_transformers["ratio"],
        "ratio_to_dense": to_dense["ratio"],
        "ratio_to_transformers_dense": to_their_dense["ratio"],
        "quartiles_by_turn": {
            "ratio_to_transformers": to_transformers["quartiles_by_turn"],
            "ratio_to_dense": to_dense["quartiles_by_turn"],
            "ratio_to_transformers_dense": to_their_dense["quartiles_by_turn"],
        },
        "transformers_fastest": olmoe,
        "sides": {
            name: {"tokens_per_second": tokens / timing.seconds, **timing.summary()} for name, timing in timings.items()
        },
        "matrix_flops": rate.flops,
        "utilization": {
            "6n": flops.parameters / timings[OURS].seconds / rate.flops,
            "with_attention": flops.both / timings[OURS].seconds / rate.flops,
        },
        "tried": tried,
    }


def _stepper(peer: Peer, batches: list[Batch]) -> Callable[[int], object]:
    return lambda turn: peer.step(batches[turn])


def _fastest(
    choices: list[Variant],
    keep: int,
    settings: Settings,
    vocab_size: int,
    device: torch.device,
    batches: list[Batch],
    tried: list[dict[str, Any]],
) -> list[Variant]:
    """Try each of transformers' variants for a few steps and note what each took; returns the fastest ones."""
    seconds: dict[Variant, float] = {}
    for variant in choices:
        refusal = memory_refusal(variant, settings, device)
        if refusal is None:
            peer = Peer(variant, settings, vocab_size, device)
            for batch in batches[:_TRIED]:
                began, _ = clock(device)
                peer.step(batch)
                seconds[variant] = clock(device)[0] - began
        tried.append({"name": variant.name, "seconds": seconds.get(variant), "left_out": refusal})
    return sorted(seconds, key=lambda variant: seconds[variant])[:keep]


def tables(result: dict[str, Any]) -> Iterator[Table]:
    """Sides by speed, then ratios and utilization."""
    table = Table("step", "tokens/s", "seconds", "processor seconds")
    for name, side in sorted(result["sides"].items(), key=lambda item: item[1]["seconds"]):
        table.add_row(name, f"{side['tokens_per_second']:,.0f}", f"{side['seconds']:.3f}", f"{side['cpu_seconds']:.3f}")
    yield table
    table = Table("moetrain against", "times as fast", "quartiles over turns")
    for name, spread in result["quartiles_by_turn"].items():
        shown = name.removeprefix("ratio_to_").replace("_", " ")
        table.add_row(shown, f"{result[name]:.2f}", f"{spread[0]:.2f} to {spread[1]:.2f}")
    yield table
    table = Table("machine", "matrix rate, GFLOP/s", "6N", "with attention")
    shares = (f"{result['utilization'][key]:.1%}" for key in ("6n", "with_attention"))
    table.add_row(result["machine"]["processor"], f"{result['matrix_flops'] / 1e9:,.0f}", *shares)
    yield table


def draw(result: dict[str, Any], path: Path) -> None:
    """Tokens a second of each side."""
    figure, (axis,) = new_figure(1, 1, width=9)
    sides = sorted(result["sides"].items(), key=lambda item: -item[1]["seconds"])
    colors = ["#3182bd" if name.startswith(OURS) else "#bbbbbb" for name, _ in sides]
    axis.barh([name for name, _ in sides], [side["tokens_per_second"] for _, side in sides], color=colors)
    axis.set(xlabel="tokens a second")
    save(figure, path)
