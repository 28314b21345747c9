"""Resource plan of a larger run: memory, throughput, days, network and disk, from measurements and assumptions.

Memory is predicted from the model (see `benchmarks.memory`), what ranks send from the program's collectives (see
`benchmarks.communication`), and time on the network from the speed of its links (see `benchmarks.links`). Throughput of
one GPU follows from the utilization of the matmul rate that `bench.py train` or `peers` measured, or is given. The
result lists all other assumptions.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from common.figures import new_figure, save
from rich.table import Table

from benchmarks.communication import RankLayout, step_collectives
from benchmarks.configs import add_configs, load_configs
from benchmarks.flops import step_flops
from benchmarks.links import Links
from benchmarks.memory import Memory, count_parameters, optimizer_bytes, predict
from benchmarks.monitor_traffic import monitor_plan
from moetrain.config import Settings, SettingsError
from moetrain.distributed.mesh import Sharding
from moetrain.models.transformer import Transformer
from moetrain.routing.panel import most_samples

_ROW_BYTES = 54  # of a panel sample besides its routing: ids, loss, domain, cell


@dataclass(frozen=True)
class Rate:
    """Throughput of one GPU, and its source."""

    tokens_per_second: float
    source: str


@dataclass(frozen=True)
class Cluster:
    """GPUs, the memory of each in bytes, and the links between them."""

    gpus: int
    memory: float
    links: Links


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_configs(parser, "peers")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1], help="numbers of GPUs to plan for (default 1)")
    parser.add_argument(
        "--rows-per-gpu", type=int, help="rows of a step on each GPU (default: train.batch_rows in all)"
    )
    parser.add_argument("--domains", type=int, help="plan for so many domains like the configuration's first")
    parser.add_argument("--tokens", type=float, default=1e9, help="training tokens (default 1e9)")
    parser.add_argument("--gpu-memory", type=float, default=141, help="memory of a GPU in GB (default 141, an H200)")
    parser.add_argument("--gpus-per-machine", type=int, default=8, help="(default 8)")
    within = "GB/s into and out of a GPU from those of its machine (default 450, NVLink 4)"
    parser.add_argument("--machine-network", type=float, default=450, help=within)
    between = "GB/s into and out of a GPU from other machines (default 50, 400 Gbit/s)"
    parser.add_argument("--network", type=float, default=50, help=between)
    parser.add_argument("--vocab-size", type=int, help="(default: tokenizer.vocab_size)")
    rate = parser.add_mutually_exclusive_group(required=True)
    rate.add_argument("--measured", type=Path, metavar="FILE", help="a result of `bench.py train` or `peers`")
    rate.add_argument("--tokens-per-second", type=float, help="throughput of one GPU with this configuration")
    parser.add_argument("--matrix-flops", type=float, help="matmul rate of the GPU in FLOP/s (default: as measured)")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Plans of the one configuration that the command line names, for each number of GPUs.

    Raises:
        SettingsError: rows or experts do not divide over the GPUs.
    """
    settings = load_configs(options)[0]
    if settings.tokenizer.model is not None and options.vocab_size is None:
        raise SettingsError(f"tokenizer.model is {settings.tokenizer.model}: give its number of ids by --vocab-size")
    vocab_size = settings.tokenizer.rows(options.vocab_size or settings.tokenizer.vocab_size)
    if options.domains:
        first = next(iter(settings.data.domains.values()))
        domains = {f"domain_{number}": first for number in range(options.domains)}
        settings = settings.model_copy(update={"data": settings.data.model_copy(update={"domains": domains})})
    if options.measured:
        rate = scaled_rate(settings, vocab_size, read_measured(options.measured), options.matrix_flops)
    else:
        rate = Rate(options.tokens_per_second, "throughput of one GPU as given on the command line")
    links = Links(options.gpus_per_machine, options.machine_network * 1e9, options.network * 1e9)
    plans = []
    for gpus in options.gpus:
        rows = options.rows_per_gpu and options.rows_per_gpu * gpus
        plans.append(
            make_plan(
                with_rows(settings, rows) if rows else settings,
                vocab_size,
                rate,
                options.tokens,
                Cluster(gpus, options.gpu_memory * 1e9, links),
            )
        )
    parameters, _ = count_parameters(settings, vocab_size)
    return {
        "shape": settings.model.model_dump(),
        "domains": len(settings.data.domains),
        "expert_parallel": settings.train.expert_parallel,
        "optimizer": settings.optim.name,
        "tokens": options.tokens,
        "parameters": parameters,
        "one_gpu_tokens_per_second": rate.tokens_per_second,
        "plans": plans,
        "disk_bytes": disk_bytes(settings, parameters, optimizer_bytes(settings, vocab_size), options.tokens),
        "assumptions": assumptions(settings, rate, links, options.gpu_memory),
    }


def with_rows(settings: Settings, rows: int) -> Settings:
    """The same settings with another number of rows in a step."""
    return settings.model_copy(update={"train": settings.train.model_copy(update={"batch_rows": rows})})


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
    settings: Settings, vocab_size: int, rate: Rate, tokens: float, cluster: Cluster, itemsize: int = 2
) -> dict[str, Any]:
    """Memory, communication, throughput and days of a run of ``tokens`` tokens, by `train.sharding`; and its monitor's.

    Args:
        itemsize: bytes of an element in matmuls.

    Raises:
        SettingsError: the rows or experts do not divide over the GPUs.
    """
    gpus, train = cluster.gpus, settings.train
    if gpus % train.expert_parallel:
        raise SettingsError(f"train.expert_parallel {train.expert_parallel} does not divide {gpus} GPUs")
    step_tokens = train.batch_rows * settings.data.seq_len
    compute = step_tokens / gpus / rate.tokens_per_second
    layouts: dict[str, Any] = {}
    for name in get_args(Sharding):
        try:
            layout = RankLayout(gpus, cluster.links.machine, name, train.expert_parallel)
        except SettingsError as error:
            layouts[name] = {"impossible": str(error)}
            continue
        try:
            memory = predict(settings, vocab_size, devices=gpus, shards=None if name == "none" else layout.shards)
        except ValueError as error:
            remedy = "set it to a multiple, or give --rows-per-gpu, and train.micro_batch_rows to a divisor of that"
            raise SettingsError(f"{error}: {remedy}") from None
        collectives = step_collectives(settings, vocab_size, layout, itemsize)
        every = sum(map(cluster.links.seconds, collectives))
        waits = [every, cluster.links.exposed(collectives, compute, memory.micro_batches)]
        speeds = [step_tokens / (compute + wait) for wait in waits]
        layouts[name] = {
            "memory": as_dict(memory, cluster.memory),
            "collectives": [
                asdict(each) | {"sent": each.sent, "seconds": cluster.links.seconds(each)} for each in collectives
            ],
            "sent_a_step": sum(each.sent for each in collectives),
            "tokens_per_second": speeds,
            "days": [tokens / speed / 86400 for speed in reversed(speeds)],
            "network_share": [wait / (compute + wait) for wait in reversed(waits)],
        }
    steps = tokens / step_tokens
    return {
        "gpus": gpus,
        "steps": steps,
        "tokens_a_step": step_tokens,
        "step_seconds_of_computation": compute,
        "layouts": layouts,
        "monitor": monitor_plan(settings, gpus, steps, tokens, rate.tokens_per_second, cluster.links.between),
    }


def assumptions(settings: Settings, rate: Rate, links: Links, gpu_memory: float) -> list[str]:
    """What the plan takes for granted."""
    return [
        rate.source,
        "every GPU computes at that rate, at the rows of the plan; no GPU is slower than the others",
        f"{links.machine} GPUs on a machine, {links.within / 1e9:g} GB/s into and out of each from the others there, "
        f"{links.between / 1e9:g} GB/s from other machines, used fully; ring collectives, and trees for all-reduces "
        "where their latency is lower",
        "a range is from no overlap of communication and computation to this: DDP's and FSDP's gradients are reduced "
        "during the last micro-batch's backward pass, FSDP gathers weights of layers during the whole step; nothing "
        "else overlaps, exchanges of tokens neither",
        *["split experts: every rank gets as many rows"] * (settings.train.expert_parallel > 1),
        f"{gpu_memory:g} GB of memory, including the allocator's and the driver's share (not counted, often 5%)",
        "disk: panel readings before compression; one sample per row where the routing of all samples is stored",
        "validation, checkpoints and probes take no time; on CUDA the panel's metrics are computed by a thread",
    ]


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


def tables(result: dict[str, Any]) -> Iterator[Table]:
    """Memory and throughput by layout, and collectives with a single number of GPUs; the monitor, disk, assumptions."""
    for plan in result["plans"]:
        layouts = {name: each for name, each in plan["layouts"].items() if "impossible" not in each}
        for name, each in plan["layouts"].items():
            if "impossible" in each:
                yield Table(f"train.sharding={name} is not possible: {each['impossible']}")
        title = f"{plan['gpus']:,} GPUs, {result['tokens']:.3g} tokens, train.sharding"
        table = Table(title, *layouts)
        for part in next(iter(layouts.values()))["memory"]:
            label = "memory fits" if part == "fits" else f"{part}, GB on each GPU"
            table.add_row(label, *(_shown(each["memory"][part]) for each in layouts.values()))
        table.add_row("sent by each GPU, GB/step", *(f"{each['sent_a_step'] / 1e9:.2f}" for each in layouts.values()))
        for label, key, form in (
            ("tokens/s", "tokens_per_second", lambda ends: f"{ends[0]:,.0f} to {ends[1]:,.0f}"),
            ("days", "days", lambda ends: f"{ends[0]:.2f} to {ends[1]:.2f}"),
            ("waiting for the network", "network_share", lambda ends: f"{ends[0]:.1%} to {ends[1]:.1%}"),
        ):
            table.add_row(label, *(form(each[key]) for each in layouts.values()))
        yield table
        if len(result["plans"]) > 1:
            continue
        table = Table("sharding", "collectives of a step", "kind", "GPUs", "number", "GB put in", "seconds")
        for name, each in layouts.items():
            for one in each["collectives"]:
                row = one["purpose"], one["kind"], f"{one['group']:,}", str(one["count"])
                table.add_row(name, *row, f"{one['nbytes'] / 1e9:.3g}", f"{one['seconds']:.2g}")
        yield table
    table = Table(
        f"the monitor, {result['domains']:,} domains", *(f"{plan['gpus']:,} GPUs" for plan in result["plans"])
    )
    monitors = [plan["monitor"] for plan in result["plans"]]
    for name in monitors[0]["received_bytes"]:
        each_rank = name == "agreement"
        label = f"{name}, MB " + ("put in by each rank" if each_rank else "to the main rank")
        table.add_row(label, *(f"{each['received_bytes'][name] / 1e6:,.2f}" for each in monitors))
    for label, key, form in (
        ("MB a step to the main rank, mean", "received_a_step", lambda value: f"{value / 1e6:.3g}"),
        ("time in which the main rank receives", "receiving_share", lambda value: f"{value:.3%}"),
        ("a reading of the panel, seconds", "panel_seconds", lambda value: f"{value:.3g}"),
        ("the panel's share of FLOPs", "panel_share", lambda value: f"{value:.4%}"),
        ("measuring repeats, seconds", "repeats_seconds", lambda ends: f"{ends[0]:.3g}, {ends[1]:.3g} if sharded"),
        ("their share of time", "repeats_share", lambda ends: f"{ends[0]:.4%}, {ends[1]:.4%} if sharded"),
    ):
        table.add_row(label, *(form(each[key]) for each in monitors))
    yield table
    table = Table("on disk", "GB")
    for name, size in result["disk_bytes"].items():
        table.add_row(name, f"{size / 1e9:.3f}")
    yield table
    table = Table("assumptions")
    for line in result["assumptions"]:
        table.add_row(line)
    yield table


def _shown(value: int | bool) -> str:
    return ("yes" if value else "no") if isinstance(value, bool) else f"{value / 1e9:.2f}"


def draw(result: dict[str, Any], path: Path) -> None:
    """Memory of each GPU by purpose, with the first number of GPUs."""
    figure, (axis,) = new_figure()
    layouts = result["plans"][0]["layouts"]
    memory = {name: each["memory"] for name, each in layouts.items() if "impossible" not in each}
    base = [0.0] * len(memory)
    for part in ("parameters", "optimizer", "gradients", "kept", "passing"):
        sizes = [each[part] / 1e9 for each in memory.values()]
        axis.bar(list(memory), sizes, bottom=base, label=part)
        base = [below + size for below, size in zip(base, sizes, strict=True)]
    axis.set(ylabel="GB on each GPU; with one micro-batch, gradients and kept do not coincide")
    axis.legend(frameon=False)
    save(figure, path)
