"""Resource plan of a larger run: memory, throughput, days, network and disk, from measurements and assumptions.

Memory is predicted from the model (see `benchmarks.memory`). Throughput follows from the utilization of the matmul rate
that `bench.py train` or `peers` measured, or is given. The result lists all other assumptions.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common.figures import new_figure, save
from rich.table import Table

from benchmarks.configs import add_configs, load_configs
from benchmarks.flops import step_flops
from benchmarks.memory import Memory, count_parameters, optimizer_bytes, predict, routed_parameters
from moetrain.config import Settings, SettingsError
from moetrain.models.transformer import Transformer
from moetrain.routing.panel import most_samples

_ROW_BYTES = 54  # of a panel sample besides its routing: ids, loss, domain, cell


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_configs(parser, "peers")
    parser.add_argument("--gpus", type=int, default=1, help="number of GPUs (default 1)")
    parser.add_argument("--tokens", type=float, default=1e9, help="training tokens (default 1e9)")
    parser.add_argument("--gpu-memory", type=float, default=141, help="memory of a GPU in GB (default 141, an H200)")
    parser.add_argument("--network", type=float, default=50, help="GB/s into and out of a GPU (default 50, 400 Gbit/s)")
    parser.add_argument("--vocab-size", type=int, help="(default: tokenizer.vocab_size)")
    rate = parser.add_mutually_exclusive_group(required=True)
    rate.add_argument("--measured", type=Path, metavar="FILE", help="a result of `bench.py train` or `peers`")
    rate.add_argument("--tokens-per-second", type=float, help="throughput of one GPU with this configuration")
    parser.add_argument("--matrix-flops", type=float, help="matmul rate of the GPU in FLOP/s (default: as measured)")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """`make_plan` of the one configuration that the command line names."""
    settings = load_configs(options)[0]
    if settings.tokenizer.model is not None and options.vocab_size is None:
        raise SettingsError(f"tokenizer.model is {settings.tokenizer.model}: give its number of ids by --vocab-size")
    vocab_size = settings.tokenizer.rows(options.vocab_size or settings.tokenizer.vocab_size)
    if options.measured:
        rate = scaled_rate(settings, vocab_size, read_measured(options.measured), options.matrix_flops)
    else:
        rate = Rate(options.tokens_per_second, "throughput of one GPU as given on the command line")
    return make_plan(
        settings, vocab_size, rate, options.gpus, options.tokens, options.gpu_memory * 1e9, options.network * 1e9
    )


@dataclass(frozen=True)
class Rate:
    """Throughput of one GPU, and its source."""

    tokens_per_second: float
    source: str


def read_measured(path: Path) -> dict[str, Any]:
    """A result of `bench.py train` or `peers`.

    Raises:
        SettingsError: the file is not such a result.
    """
    try:
        measured = json.loads(path.read_text())
        measured["utilization"]["with_attention"], measured["matrix_flops"], measured["machine"]["device"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        remedy = "write one with python tools/bench.py train --json FILE"
        raise SettingsError(f"{path}: not a result of train or peers ({error!r}): {remedy}") from None
    return measured


def scaled_rate(
    settings: Settings, vocab_size: int, measured: dict[str, Any], matrix_flops: float | None = None
) -> Rate:
    """Throughput of this configuration at the measured utilization of the matmul rate."""
    utilization, flops = measured["utilization"]["with_attention"], matrix_flops or measured["matrix_flops"]
    rate = utilization * flops / flops_per_token(settings, vocab_size)
    same = "the same shape" if measured["shape"] == settings.model.model_dump() else "another shape"
    return Rate(
        rate,
        f"utilization of {utilization:.1%} (FLOPs with attention) as measured on {measured['machine']['device']}"
        f" ({measured['machine']['processor']}) with {same}, of {flops / 1e12:.3g} TFLOP/s",
    )


def flops_per_token(settings: Settings, vocab_size: int) -> float:
    """Training FLOPs per token, with attention over samples as long as a row."""
    length = settings.data.seq_len
    with torch.device("meta"):
        model = Transformer(settings.model, vocab_size, torch.bfloat16)
    return step_flops(model, length, torch.tensor([[0, length]])).both / length


def make_plan(
    settings: Settings, vocab_size: int, rate: Rate, gpus: int, tokens: float, gpu_memory: float, network: float
) -> dict[str, Any]:
    """Memory, throughput, time, network and disk of a run of ``tokens`` tokens on ``gpus`` GPUs.

    Args:
        gpu_memory: bytes per GPU.
        network: bytes per second into and out of a GPU.

    Raises:
        SettingsError: the rows do not divide over the GPUs.
    """
    parameters, _ = count_parameters(settings, vocab_size)
    if gpus % (ranks := settings.train.expert_parallel):
        raise SettingsError(f"train.expert_parallel {ranks} does not divide {gpus} GPUs: give --gpus a multiple")
    rows = settings.train.batch_rows
    try:
        memory = {
            name: predict(settings, vocab_size, devices=gpus, sharded=name == "sharded")
            for name in ("replicated", "sharded")
        }
    except ValueError as error:
        remedy = "set it to a multiple, and train.micro_batch_rows to a divisor of the rows per GPU"
        raise SettingsError(f"{error}: {remedy}") from None
    micro_batches = memory["replicated"].micro_batches
    step_tokens = rows * settings.data.seq_len
    compute = step_tokens / gpus / rate.tokens_per_second
    speed = {}
    for name, size in network_bytes(settings, parameters, gpus, micro_batches).items():
        hidden, exposed = (step_tokens / second for second in (max(compute, size / network), compute + size / network))
        speed[name] = {
            "network_bytes_a_step": size,
            "tokens_per_second": [exposed, hidden],
            "days": [tokens / hidden / 86400, tokens / exposed / 86400],
        }
    return {
        "shape": settings.model.model_dump(),
        "gpus": gpus,
        "expert_parallel": settings.train.expert_parallel,
        "tokens": tokens,
        "steps": tokens / step_tokens,
        "tokens_a_step": step_tokens,
        "parameters": parameters,
        "one_gpu_tokens_per_second": rate.tokens_per_second,
        "memory": {name: as_dict(part, gpu_memory) for name, part in memory.items()},
        "speed": speed,
        "disk_bytes": disk_bytes(settings, parameters, optimizer_bytes(settings, vocab_size), tokens),
        "panel_share": panel_share(settings, tokens),
        "assumptions": [
            rate.source,
            "every GPU reaches the throughput of one GPU, at this batch size",
            "replicated: ring all-reduce of float32 gradients once per step; sharded: all-gather of bf16 parameters "
            "for forward and backward, once per micro-batch, and reduce-scatter of float32 gradients once per step",
            *["split experts: every rank gets as many rows, in bf16"] * (settings.train.expert_parallel > 1),
            "ranges: from no overlap of communication and computation to full overlap",
            f"{network / 1e9:g} GB/s into and out of each GPU; {gpu_memory / 1e9:g} GB of memory, including the "
            "allocator's and the driver's share (not counted, often 5%)",
            "disk: panel readings before compression; one sample per row where the routing of all samples is stored",
            "validation, checkpoints and probes take no time",
        ],
    }


def network_bytes(settings: Settings, parameters: int, gpus: int, micro_batches: int) -> dict[str, float]:
    """Bytes that a GPU sends in a step, by what is done with the weights."""
    ranks, routed = settings.train.expert_parallel, routed_parameters(settings)
    replicas = gpus // ranks  # of each expert
    reduced = (gpus - 1) / gpus * (parameters - routed) + (replicas - 1) / replicas * (routed / ranks)
    tokens = settings.train.batch_rows * settings.data.seq_len // gpus
    travelling = (ranks - 1) / ranks * exchanged_bytes(settings, tokens, micro_batches)
    return {
        "replicated": 2 * 4 * reduced + travelling,
        "sharded": (micro_batches * (2 + 2) + 4) * reduced + travelling,
    }


def exchanged_bytes(settings: Settings, tokens: int, micro_batches: int, itemsize: int = 2) -> int:
    """Bytes that a rank puts into the all-to-alls of a step, with what stays on it; see `models.experts_exchange`.

    Args:
        tokens: of the rank in all micro-batches, padding included.
        itemsize: bytes of an element of a row.
    """
    model = settings.model
    row, weight, counts = model.hidden_size * itemsize, 4, 4 * model.num_experts * micro_batches
    rows = tokens * model.num_experts_per_tok
    both = rows * 2 * (2 * row + weight) + counts
    if settings.train.activation_checkpointing:
        # The forward pass is repeated up to the last tensor that backward needs: outputs are not sent again unless the
        # shared expert comes after them.
        both += rows * (row + weight + (row if model.num_shared_experts else 0)) + counts
    return model.num_hidden_layers * both


def as_dict(memory: Memory, gpu_memory: float) -> dict[str, Any]:
    """Bytes by purpose, and whether they fit."""
    parts = ("parameters", "optimizer", "gradients", "kept", "passing", "peak")
    return {**{part: getattr(memory, part) for part in parts}, "fits": memory.peak <= gpu_memory}


def disk_bytes(settings: Settings, parameters: int, optimizer: int, tokens: float) -> dict[str, int]:
    """Bytes on disk: panel readings, routing of training samples where it is stored, checkpoints.

    Args:
        optimizer: bytes of the optimizer's state.
    """
    model = settings.model
    layers, experts = model.num_hidden_layers, model.recorded_experts
    members = most_samples(settings.panel.samples) * len(settings.data.domains) if settings.watches_routing else 0
    a_sample = settings.monitor.store_top * layers * (3 if experts <= 256 else 4) + 28
    samples = tokens / settings.data.seq_len if settings.monitor.store_top and settings.watches_routing else 0
    return {
        "panel": settings.panel.readings * reading_bytes(settings, members) if members else 0,
        "samples": round(samples * a_sample),
        "checkpoints": (settings.train.keep_checkpoints + 1) * (4 * parameters + optimizer),
    }


def reading_bytes(settings: Settings, members: int) -> int:
    """Bytes of one panel reading.

    Per sample, layer and expert: both halves in float16 and a count in uint16. Per router: its Gram block and that with
    the next router, in float32.
    """
    layers, experts = settings.model.num_hidden_layers, settings.model.recorded_experts
    inputs = 2 * layers * settings.model.hidden_size if settings.panel.linear_kernel else 0
    return members * (6 * layers * experts + inputs + _ROW_BYTES) + 8 * layers * experts**2


def panel_share(settings: Settings, tokens: float) -> float:
    """The panel's share of training FLOPs: its forward passes cost a third of a training step per token."""
    if not settings.watches_routing:
        return 0.0
    read = sum(
        most_samples(settings.panel.samples) * (settings.panel_tokens(name) + 2) for name in settings.data.domains
    )
    return settings.panel.readings * read / 3 / tokens


def tables(result: dict[str, Any]) -> Iterator[Table]:
    """Memory, throughput, disk, and assumptions."""
    table = Table("GB on each GPU", *result["memory"])
    for part in next(iter(result["memory"].values())):
        table.add_row(part, *(_shown(column[part]) for column in result["memory"].values()))
    yield table
    table = Table(f"{result['gpus']} GPUs, {result['tokens']:.3g} tokens", *result["speed"])
    for label, key, form in (
        ("network, GB/step", "network_bytes_a_step", lambda size: f"{size / 1e9:.2f}"),
        ("tokens/s", "tokens_per_second", lambda ends: f"{ends[0]:,.0f} to {ends[1]:,.0f}"),
        ("days", "days", lambda ends: f"{ends[0]:.2f} to {ends[1]:.2f}"),
    ):
        table.add_row(label, *(form(column[key]) for column in result["speed"].values()))
    yield table
    table = Table("on disk", "GB")
    for name, size in result["disk_bytes"].items():
        table.add_row(name, f"{size / 1e9:.3f}")
    table.add_row("the panel's share of FLOPs", f"{result['panel_share']:.2%}")
    yield table
    table = Table("assumptions")
    for line in result["assumptions"]:
        table.add_row(line)
    yield table


def _shown(value: int | bool) -> str:
    return ("yes" if value else "no") if isinstance(value, bool) else f"{value / 1e9:.2f}"


def draw(result: dict[str, Any], path: Path) -> None:
    """Memory of each GPU by purpose."""
    figure, (axis,) = new_figure()
    names = list(result["memory"])
    base = [0.0] * len(names)
    for part in ("parameters", "optimizer", "gradients", "kept", "passing"):
        sizes = [result["memory"][name][part] / 1e9 for name in names]
        axis.bar(names, sizes, bottom=base, label=part)
        base = [below + size for below, size in zip(base, sizes, strict=True)]
    axis.set(ylabel="GB on each GPU; with one micro-batch, gradients and kept do not coincide")
    axis.legend(frameon=False)
    save(figure, path)
