"""The experts: each token goes through its top-k SwiGLU experts, none is dropped.

One function, several backends, chosen by name; `loop` is the plain reference the others are compared with.

Shapes: N tokens, D hidden size, E experts, K experts a token, F width of an expert, M rows sent to experts.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F

from moetrain.model.elementwise import swiglu, weighted_swiglu
from moetrain.model.megablocks import megablocks_experts
from moetrain.model.tiled import tiled_experts

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
    compute = _loop if backend == "loop" else megablocks_experts if backend == "megablocks" else _grouped
    if compute is _grouped and x_ND.dtype != torch.bfloat16:
        compute = _grouped_apart  # torch.compile takes grouped_mm in bf16 only
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


def _grouped(
    x_ND: torch.Tensor,
    index_NK: torch.Tensor,
    weight_NK: torch.Tensor,
    gate_up_E2FD: torch.Tensor,
    down_EDF: torch.Tensor,
) -> torch.Tensor:
    arranged = _arrange(index_NK, len(gate_up_E2FD))
    ways = arranged.place_NK, arranged.source_M
    sent_MD = _Dispatch.apply(x_ND, *ways)
    gate_up_M2F = F.grouped_mm(sent_MD, gate_up_E2FD.transpose(1, 2), offs=arranged.ends_E)
    # The weight goes in before the last product: what combining needs for its gradient is then kept anyway.
    hidden_MF = weighted_swiglu(gate_up_M2F, weight_NK, arranged.place_NK)
    output_MD = F.grouped_mm(hidden_MF, down_EDF.transpose(1, 2), offs=arranged.ends_E)
    return _Combine.apply(output_MD, *ways)


_grouped_apart = _grouped  # what torch.compile calls and does not take: `moetrain.model.backends.call_uncompiled`


class Arrangement(NamedTuple):
    """Which row each (token, choice) is sent to; each expert's rows lie together."""

    place_NK: torch.Tensor  # int64, the row of each choice
    source_M: torch.Tensor  # int64, the token of each row
    ends_E: torch.Tensor  # int32, where each expert's rows end


def _arrange(index_NK: torch.Tensor, num_experts: int) -> Arrangement:
    """As many rows as there are choices: their number does not depend on data, so the host does not wait for it."""
    chosen, order_M = index_NK.flatten().sort(stable=True)
    rows = torch.arange(len(order_M), device=order_M.device)
    place_M = torch.empty_like(order_M).index_copy_(0, order_M, rows)
    # Counted without atomic additions, so in a fixed order.
    ends_E = torch.searchsorted(chosen, torch.arange(num_experts, device=chosen.device), right=True)
    return Arrangement(place_M.view_as(index_NK), order_M // index_NK.shape[1], ends_E.to(torch.int32))


class _Dispatch(torch.autograd.Function):
    """Copies of tokens in the experts' rows.

    Plain indexing's backward adds into places one by one, and on CUDA in no fixed order; here it is a gather.
    """

    @staticmethod
    def forward(ctx: Any, x_ND: torch.Tensor, place_NK: torch.Tensor, source_M: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(place_NK)
        return x_ND.index_select(0, source_M)

    @staticmethod
    def backward(ctx: Any, grad_MD: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (place_NK,) = ctx.saved_tensors
        return _sum_rows(grad_MD, place_NK), None, None


class _Combine(torch.autograd.Function):
    """The inverse: each token's rows summed."""

    @staticmethod
    def forward(ctx: Any, output_MD: torch.Tensor, place_NK: torch.Tensor, source_M: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(source_M)
        return _sum_rows(output_MD, place_NK)

    @staticmethod
    def backward(ctx: Any, grad_ND: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (source_M,) = ctx.saved_tensors
        return grad_ND.index_select(0, source_M), None, None


def _sum_rows(rows_MD: torch.Tensor, place_NK: torch.Tensor) -> torch.Tensor:
    """The sums of each token's rows, [N, D], added in float32."""
    return rows_MD.index_select(0, place_NK.flatten()).view(*place_NK.shape, -1).sum(1)
