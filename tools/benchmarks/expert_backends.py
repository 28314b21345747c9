"""A layer's experts by backend, forward and backward, with a routing that is new at every step.

Shapes: N tokens, D hidden size, E experts, K experts a token.
"""

from __future__ import annotations

import argparse
from typing import Any, get_args

import torch

from benchmarks.backends import Step, add_arguments, compare, draw, tables
from moetrain.config import ModelSettings, Settings
from moetrain.distributed.launch import compute_dtype
from moetrain.models.experts import Backend, experts

__all__ = ["add_arguments", "draw", "run", "tables"]


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a layer's experts by backend."""
    return compare(options, [name for name in get_args(Backend) if name != "dense"], expert_step)


def expert_step(settings: Settings, tokens: int, backend: Backend, device: torch.device, turns: int) -> Step:
    """Forward and backward of a layer's experts; the routing is another one at every turn, drawn before."""
    model, dtype = settings.model, compute_dtype(settings, device)
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(tokens, model.hidden_size, generator=generator).to(device, dtype).requires_grad_()
    gate_up, down = (
        (torch.randn(shape, generator=generator) * model.initializer_range).to(device, dtype).requires_grad_()
        for shape in (
            (model.num_experts, 2 * model.intermediate_size, model.hidden_size),
            (model.num_experts, model.hidden_size, model.intermediate_size),
        )
    )
    routings = [[part.to(device) for part in draw_routing(model, tokens, turn)] for turn in range(turns)]

    def step(turn: int) -> None:
        index_NK, weight_NK = routings[turn]
        weight_NK = weight_NK.requires_grad_()
        out_ND = experts(x_ND, index_NK, weight_NK, gate_up, down, backend)
        torch.autograd.grad(out_ND, (x_ND, weight_NK, gate_up, down), out_ND.detach())

    return step


def draw_routing(model: ModelSettings, tokens: int, turn: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Choices and weights [N, K] of a turn; some experts are liked more than others."""
    generator = torch.Generator().manual_seed(turn)
    logits_NE = torch.randn(tokens, model.num_experts, generator=generator)
    logits_NE += 0.5 * torch.randn(model.num_experts, generator=generator)
    weight_NK, index_NK = logits_NE.softmax(-1).topk(model.num_experts_per_tok, dim=-1)
    return index_NK, weight_NK
