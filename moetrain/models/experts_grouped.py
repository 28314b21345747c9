"""The experts on CUDA: all rows at once by torch's grouped product, with little kept for backward.

Of a layer's tensors those with a row for every choice are by far the largest. Kept is the first product's output alone;
what is sent to the experts is gathered again from the tokens, what lies between the products is computed again, and
weights are cast again: passes over memory, a small part of the products' time.

The host does not wait for the device: no shape depends on data.

Shapes: N tokens, D hidden size, E experts, K experts a token, F width of an expert, M = N * K rows sent to experts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


def grouped_experts(
    x_ND: torch.Tensor,
    index_NK: torch.Tensor,
    weight_NK: torch.Tensor,
    gate_up_E2FD: torch.Tensor,
    down_EDF: torch.Tensor,
) -> torch.Tensor:
    """Each token's experts' outputs, summed by its routing weights, [N, D]; products run in the type of x."""
    return _GroupedExperts.apply(x_ND, weight_NK, gate_up_E2FD, down_EDF, *_arrange(index_NK, len(gate_up_E2FD)))


def _arrange(index_NK: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Each expert's rows side by side: the row of each choice [N, K], the token of each row [M], where each expert's
    rows end [E].
    """
    chosen, order_M = index_NK.flatten().sort(stable=True)
    rows = torch.arange(len(order_M), device=order_M.device)
    place_M = torch.empty_like(order_M).index_copy_(0, order_M, rows)
    # Counted without atomic additions, so in a fixed order.
    ends_E = torch.searchsorted(chosen, torch.arange(num_experts, device=chosen.device), right=True)
    return place_M.view_as(index_NK), order_M // index_NK.shape[1], ends_E.to(torch.int32)


class _GroupedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: torch.Tensor,
        weight_NK: torch.Tensor,
        gate_up_E2FD: torch.Tensor,
        down_EDF: torch.Tensor,
        place_NK: torch.Tensor,
        source_M: torch.Tensor,
        ends_E: torch.Tensor,
    ) -> torch.Tensor:
        weight_M1 = weights_of_rows(weight_NK, place_NK, len(source_M), x_ND.dtype)
        gate_up_M2F = product(x_ND.index_select(0, source_M), gate_up_E2FD.transpose(1, 2), ends_E)
        gate_MF, up_MF = gate_up_M2F.chunk(2, dim=-1)
        # The weight goes in before the last product: what combining needs for its gradient is then at hand.
        hidden_MF = F.silu(gate_MF).mul_(up_MF).mul_(weight_M1)
        output_MD = product(hidden_MF, down_EDF.transpose(1, 2), ends_E)
        ctx.save_for_backward(x_ND, weight_M1, gate_up_E2FD, down_EDF, place_NK, source_M, ends_E, gate_up_M2F)
        ctx.weight_dtype = weight_NK.dtype
        return _sum_rows(output_MD, place_NK)

    @staticmethod
    def backward(ctx: Any, grad_ND: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_ND, weight_M1, gate_up_E2FD, down_EDF, place_NK, source_M, ends_E, gate_up_M2F = ctx.saved_tensors
        gate_MF, up_MF = gate_up_M2F.chunk(2, dim=-1)
        activated_MF = F.silu(gate_MF)
        unweighted_MF = activated_MF * up_MF
        grad_MD = grad_ND.index_select(0, source_M)
        grad_down = product(grad_MD.T, unweighted_MF * weight_M1, ends_E).to(down_EDF.dtype)
        grad_MF = product(grad_MD, down_EDF, ends_E)
        del grad_MD
        grad_weight_M = torch.linalg.vecdot(grad_MF, unweighted_MF)
        del unweighted_MF
        grad_MF.mul_(weight_M1)
        grad_gate_MF = torch.ops.aten.silu_backward(grad_MF * up_MF, gate_MF)
        grad_M2F = torch.cat([grad_gate_MF, activated_MF.mul_(grad_MF)], dim=-1)
        del grad_gate_MF, grad_MF, activated_MF
        grad_gate_up = product(grad_M2F.T, x_ND.index_select(0, source_M), ends_E).to(gate_up_E2FD.dtype)
        grad_sent_MD = product(grad_M2F, gate_up_E2FD, ends_E)
        grad_weight_NK = grad_weight_M.index_select(0, place_NK.flatten()).view_as(place_NK).to(ctx.weight_dtype)
        return _sum_rows(grad_sent_MD, place_NK), grad_weight_NK, grad_gate_up, grad_down, None, None, None


def weights_of_rows(weight_NK: torch.Tensor, place_NK: torch.Tensor, rows: int, dtype: torch.dtype) -> torch.Tensor:
    """The routing weight of the choice in each row, [rows, 1]; 0 in rows without one."""
    weight_M = torch.zeros(rows, dtype=dtype, device=weight_NK.device)
    return weight_M.index_copy_(0, place_NK.flatten(), weight_NK.flatten().to(dtype))[:, None]


def product(a: torch.Tensor, b: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """Each expert's product, in the type of a."""
    return F.grouped_mm(a, b.to(a.dtype), offs=ends_E)


def _sum_rows(rows_MD: torch.Tensor, place_NK: torch.Tensor) -> torch.Tensor:
    """The sums of each token's rows, [N, D], added in float32."""
    return rows_MD.index_select(0, place_NK.flatten()).view(*place_NK.shape, -1).sum(1)
