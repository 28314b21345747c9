"""A layer's attention by backend, forward and backward, with samples whose lengths are new at every step.

The reference is left out: its mask over all tokens would fill memory.
"""

from __future__ import annotations

import argparse
from typing import Any, get_args

import numpy as np
import torch

from benchmarks.backends import Step, add_arguments, compare, draw, tables
from moetrain.config import Settings
from moetrain.distributed.launch import compute_dtype
from moetrain.models.attention import Backend, attention, make_layout

__all__ = ["add_arguments", "draw", "run", "tables"]


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a layer's attention by backend."""
    return compare(options, [name for name in get_args(Backend) if name != "reference"], attention_step)


def attention_step(settings: Settings, tokens: int, backend: Backend, device: torch.device, turns: int) -> Step:
    """Forward and backward of a layer's attention; samples are others at every turn, laid out before: a step does so
    once for all layers.
    """
    model, dtype = settings.model, compute_dtype(settings, device)
    width = model.hidden_size // model.num_attention_heads
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(tokens, heads, width, generator=generator).to(device, dtype).requires_grad_()
        for heads in (model.num_attention_heads, model.key_value_heads, model.key_value_heads)
    )
    row = settings.data.seq_len
    layouts = [make_layout(draw_spans(tokens, row, turn), backend, device, longest=row) for turn in range(turns)]

    def step(turn: int) -> None:
        out = attention(q, k, v, layouts[turn], backend)
        torch.autograd.grad(out, (q, k, v), out.detach())

    return step


def draw_spans(tokens: int, row: int, turn: int) -> torch.Tensor:
    """Samples (start, length) that cover rows of ``row`` tokens: some rows hold one sample, others four or seven."""
    rng = np.random.default_rng(turn)
    edges = [0]
    while edges[-1] < tokens:
        end = min(edges[-1] + row, tokens)
        cuts = rng.integers(edges[-1] + 1, end + 1, size=rng.choice([0, 3, 6]))
        edges += np.unique([*cuts, end]).tolist()
    starts = torch.tensor(edges[:-1])
    return torch.stack([starts, torch.tensor(edges).diff()], dim=1)
