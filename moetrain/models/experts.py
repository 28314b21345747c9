"""The experts: each token goes through its top-k SwiGLU experts, none is dropped.

One function, several backends, chosen by name; `loop` is the plain reference the others are compared with.

Shapes: N tokens, D hidden size, E experts, K experts a token, F width of an expert.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

from moetrain.models.elementwise import swiglu
from moetrain.models.experts_cpu import tiled_experts
from moetrain.models.experts_grouped import grouped_experts
from moetrain.models.experts_megablocks import megablocks_experts

Backend = Literal["megablocks", "grouped_mm", "loop", "dense"]


def experts(
    x_ND: torch.Tensor,
    index_NK: torch.Tensor,
    weight_NK: torch.Tensor,
    gate_up_E2FD: torch.Tensor,
    down_EDF: torch.Tensor,
    backend: Backend,
) -> torch.Tensor:
    """Each token's experts' outputs, summed by its routing weights, [N, D] in the type of x, which products run in."""
    if backend == "grouped_mm" and x_ND.device.type == "cpu":
        return tiled_experts(x_ND, index_NK, weight_NK, gate_up_E2FD, down_EDF)
    if backend == "grouped_mm":
        # torch.compile takes grouped_mm in bf16 only.
        compute = grouped_experts if x_ND.dtype == torch.bfloat16 else _grouped_apart
        return compute(x_ND, index_NK, weight_NK, gate_up_E2FD, down_EDF)
    compute = _loop if backend == "loop" else megablocks_experts
    return compute(x_ND, index_NK, weight_NK, gate_up_E2FD.to(x_ND.dtype), down_EDF.to(x_ND.dtype))


def _loop(
    x_ND: torch.Tensor,
    index_NK: torch.Tensor,
    weight_NK: torch.Tensor,
    gate_up_E2FD: torch.Tensor,
    down_EDF: torch.Tensor,
) -> torch.Tensor:
    out_ND = torch.zeros(x_ND.shape, dtype=torch.float32, device=x_ND.device)
    for expert in range(len(gate_up_E2FD)):
        token, choice = torch.where(index_NK == expert)
        hidden = swiglu(F.linear(x_ND[token], gate_up_E2FD[expert]))
        output = F.linear(hidden, down_EDF[expert]).float() * weight_NK[token, choice, None]
        out_ND = out_ND.index_add(0, token, output)
    return out_ND.to(x_ND.dtype)


_grouped_apart = (
    grouped_experts  # what torch.compile calls and does not take: `moetrain.models.backends.call_uncompiled`
)
