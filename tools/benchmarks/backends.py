"""One layer's experts or attention, forward and backward, by backend, with new shapes at every step.

In training, the row counts of experts and the lengths of samples change at every step; a benchmark that repeats one
shape hides the cost of a new one. The work is one layer's: tokens of a step, sizes and precision of the configuration.
Backends that cannot run here are listed with the reason; attention's reference is not run: its mask fills memory.

Shapes: N tokens, D hidden size, E experts, K experts per token.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from common.figures import draw_bars
from rich.table import Table

from benchmarks.configs import add_configs, load_configs
from benchmarks.machine import this_device
from benchmarks.timing import ratio, take_turns
from moetrain.config import ModelSettings, Settings
from moetrain.distributed.launch import compute_dtype
from moetrain.models import attention, experts

_WARMUP = 2
Step = Callable[[int], object]
"""One forward and backward pass, given the number of the turn."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_configs(parser, "peers")
    parser.add_argument("--turns", type=int, default=10, help="counted steps per backend (default 10)")
    parser.add_argument("--tokens", type=int, help="tokens per step (default: as configured)")


def run_experts(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a layer's experts by backend."""
    return _compare(options, [name for name in get_args(experts.Backend) if name != "dense"], expert_step)


def run_attention(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a layer's attention by backend."""
    return _compare(options, [name for name in get_args(attention.Backend) if name != "reference"], attention_step)


def _compare(options: argparse.Namespace, names: list[str], make_step: Callable[..., Step]) -> dict[str, Any]:
    """Seconds of each backend, and their ratio to the fastest.

    Args:
        make_step: returns the `Step` of settings, tokens, backend, device and number of turns.
    """
    settings, device = load_configs(options)[0], this_device()
    if settings.train.threads:
        torch.set_num_threads(settings.train.threads)
    tokens = options.tokens or settings.train.batch_rows * settings.data.seq_len
    steps: dict[str, Step] = {}
    failed: dict[str, str] = {}
    for name in names:
        try:
            step = make_step(settings, tokens, name, device, options.turns + _WARMUP)
            step(0)
        except (ImportError, RuntimeError, NotImplementedError, ValueError) as error:
            failed[name] = str(error).strip().partition("\n")[0].partition(". ")[0]
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
        "left_out": failed,
    }


def expert_step(settings: Settings, tokens: int, backend: experts.Backend, device: torch.device, turns: int) -> Step:
    """Forward and backward of a layer's experts, with another routing at every turn, drawn in advance."""
    model = settings.model
    shapes = (
        (tokens, model.hidden_size),
        (model.num_experts, 2 * model.intermediate_size, model.hidden_size),
        (model.num_experts, model.hidden_size, model.intermediate_size),
    )
    x_ND, gate_up, down = _random(shapes, (1.0, model.initializer_range, model.initializer_range), settings, device)
    routings = [[part.to(device) for part in draw_routing(model, tokens, turn)] for turn in range(turns)]

    def step(turn: int) -> None:
        index_NK, weight_NK = routings[turn]
        weight_NK = weight_NK.requires_grad_()
        out_ND = experts.experts(x_ND, index_NK, weight_NK, gate_up, down, backend)
        torch.autograd.grad(out_ND, (x_ND, weight_NK, gate_up, down), out_ND.detach())

    return step


def attention_step(
    settings: Settings, tokens: int, backend: attention.Backend, device: torch.device, turns: int
) -> Step:
    """Forward and backward of a layer's attention, with other samples at every turn.

    Their layout is made in advance: a training step makes it once for all layers.
    """
    model, row = settings.model, settings.data.seq_len
    width = model.hidden_size // model.num_attention_heads
    heads = (model.num_attention_heads, model.key_value_heads, model.key_value_heads)
    q, k, v = _random([(tokens, number, width) for number in heads], (1.0, 1.0, 1.0), settings, device)
    spans = (draw_spans(tokens, row, turn) for turn in range(turns))
    layouts = [attention.make_layout(spans_N2, backend, device, longest=row) for spans_N2 in spans]

    def step(turn: int) -> None:
        out = attention.attention(q, k, v, layouts[turn], backend)
        torch.autograd.grad(out, (q, k, v), out.detach())

    return step


def _random(shapes: Any, scales: tuple[float, ...], settings: Settings, device: torch.device) -> list[torch.Tensor]:
    """Leaf tensors of normal numbers, in the dtype of computation."""
    generator, dtype = torch.Generator().manual_seed(0), compute_dtype(settings, device)
    drawn = (torch.randn(shape, generator=generator) * scale for shape, scale in zip(shapes, scales, strict=True))
    return [tensor.to(device, dtype).requires_grad_() for tensor in drawn]


def draw_routing(model: ModelSettings, tokens: int, turn: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Expert indices and weights [N, K] of a turn; the load of the experts is uneven."""
    generator = torch.Generator().manual_seed(turn)
    logits_NE = torch.randn(tokens, model.num_experts, generator=generator)
    logits_NE += 0.5 * torch.randn(model.num_experts, generator=generator)
    weight_NK, index_NK = logits_NE.softmax(-1).topk(model.num_experts_per_tok, dim=-1)
    return index_NK, weight_NK


def draw_spans(tokens: int, row: int, turn: int) -> torch.Tensor:
    """Samples (start, length) that fill rows of ``row`` tokens: a row has one sample, or up to four or seven."""
    rng = np.random.default_rng(turn)
    edges = [0]
    while edges[-1] < tokens:
        end = min(edges[-1] + row, tokens)
        cuts = rng.integers(edges[-1] + 1, end + 1, size=rng.choice([0, 3, 6]))
        edges += np.unique([*cuts, end]).tolist()
    starts = torch.tensor(edges[:-1])
    return torch.stack([starts, torch.tensor(edges).diff()], dim=1)


def tables(result: dict[str, Any]) -> Iterator[Table]:
    """Backends by speed, then those that cannot run here."""
    table = Table("backend", "ms, forward and backward", "CPU ms", "times the fastest")
    for name, row in sorted(result["backends"].items(), key=lambda item: item[1]["seconds"]):
        seconds = (f"{row[key] * 1e3:.1f}" for key in ("seconds", "cpu_seconds"))
        table.add_row(name, *seconds, f"{row['times_the_fastest']:.2f}")
    for name, reason in result["left_out"].items():
        table.add_row(name, reason, "", "")
    yield table


def draw(result: dict[str, Any], path: Path) -> None:
    """Seconds of each backend."""
    rows = sorted(result["backends"].items(), key=lambda item: -item[1]["seconds"])
    draw_bars(path, {name: row["seconds"] for name, row in rows}, "seconds, forward and backward")
