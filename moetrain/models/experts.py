"""The routed experts: each token passes through its top-k SwiGLU experts; no token is dropped.

One function with several backends, chosen by name. `loop` is the reference that the others are compared with. All have
one signature:

    x_ND, index_NK, weight_NK, gate_up_E2FD, down_EDF -> [N, D]

Shapes: N tokens, D hidden size, E experts, K experts per token, F expert width.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain.models.compilation import uncompiled
from moetrain.models.elementwise import swiglu
from moetrain.models.experts_cpu import cpu_experts
from moetrain.models.experts_grouped import grouped_experts
from moetrain.models.experts_megablocks import megablocks_experts

Backend = Literal["megablocks", "grouped_mm", "loop", "dense"]


def experts(
    x_ND: Tensor, index_NK: Tensor, weight_NK: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, backend: Backend
) -> Tensor:
    """The outputs of each token's experts, summed with its routing weights, [N, D].

    Args:
        x_ND: its dtype is that of the matmuls and of the result.
        index_NK: int64, the experts of each token.
        weight_NK: their routing weights.
        gate_up_E2FD, down_EDF: the experts' projections, of x's dtype or wider. In the first, gate precedes up.
    """
    if backend == "grouped_mm":
        if x_ND.device.type == "cpu":
            compute = cpu_experts
        else:
            compute = grouped_experts if x_ND.dtype == torch.bfloat16 else _uncompiled_grouped_experts
        return compute(x_ND, index_NK, weight_NK, gate_up_E2FD, down_EDF)
    compute = loop_experts if backend == "loop" else megablocks_experts
    return compute(x_ND, index_NK, weight_NK, gate_up_E2FD.to(x_ND.dtype), down_EDF.to(x_ND.dtype))


_uncompiled_grouped_experts = uncompiled(grouped_experts)  # torch.compile supports grouped_mm in bf16 only


@uncompiled
def loop_experts(x_ND: Tensor, index_NK: Tensor, weight_NK: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor) -> Tensor:
    """The reference: one expert at a time. Weights of x's dtype."""
    out_ND = torch.zeros(x_ND.shape, dtype=torch.float32, device=x_ND.device)
    for expert in range(len(gate_up_E2FD)):
        token, choice = torch.where(index_NK == expert)
        hidden = swiglu(F.linear(x_ND[token], gate_up_E2FD[expert]))
        output = F.linear(hidden, down_EDF[expert]).float() * weight_NK[token, choice, None]
        out_ND = out_ND.index_add(0, token, output)
    return out_ND.to(x_ND.dtype)
