"""The experts on CUDA: all of them at once by torch's grouped matmul.

Activation memory: the tensors with one row per choice are by far a layer's largest. Only the output of the first
matmul is kept for backward. Rows are gathered again from the tokens, the activation is computed again and weights are
cast again: passes over memory, a small part of the matmuls' time.

The host never waits for the device: no shape depends on the data.

Shapes: N tokens, D hidden size, E experts, K experts per token, F expert width, M = N * K rows sent to experts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain.config import ModelSettings

ROW_BYTES = 16  # `torch.nn.functional.grouped_mm` takes matrices whose rows are a multiple of it


def unaligned_width(settings: ModelSettings, dtype: torch.dtype) -> str | None:
    """The setting whose value makes rows that torch's grouped matmul refuses in ``dtype``, or None."""
    for width in ("hidden_size", "intermediate_size"):
        if getattr(settings, width) * dtype.itemsize % ROW_BYTES:
            return width
    return None


class Arrangement(NamedTuple):
    """Which row each (token, choice) is sent to. The rows of an expert are contiguous."""

    row_NK: Tensor  # int64, the row of each choice
    token_M: Tensor  # int64, the token of each row
    ends_E: Tensor  # where each expert's rows end


def grouped_experts(
    x_ND: Tensor, index_NK: Tensor, weight_NK: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor
) -> Tensor:
    """See `moetrain.models.experts.experts`."""
    arranged = arrange(index_NK, len(gate_up_E2FD))
    return _GroupedExperts.apply(
        x_ND, weight_NK, gate_up_E2FD, down_EDF, arranged.row_NK, arranged.token_M, arranged.ends_E
    )


def arrange(index_NK: Tensor, num_experts: int) -> Arrangement:
    """The rows of all choices ordered by expert, then by token."""
    expert_M, choice_M = index_NK.flatten().sort(stable=True)
    rows = torch.arange(len(choice_M), device=choice_M.device)
    row_M = torch.empty_like(choice_M).index_copy_(0, choice_M, rows)
    # Counted without atomic additions: deterministic.
    ends_E = torch.searchsorted(expert_M, torch.arange(num_experts, device=expert_M.device), right=True)
    return Arrangement(
        row_NK=row_M.view_as(index_NK), token_M=choice_M // index_NK.shape[1], ends_E=ends_E.to(torch.int32)
    )


class _GroupedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weight_NK: Tensor,
        gate_up_E2FD: Tensor,
        down_EDF: Tensor,
        row_NK: Tensor,
        token_M: Tensor,
        ends_E: Tensor,
    ) -> Tensor:
        weight_M1 = scatter_weights(weight_NK, row_NK, len(token_M), x_ND.dtype)
        gate_up_M2F = grouped_matmul(x_ND.index_select(0, token_M), gate_up_E2FD.transpose(1, 2), ends_E)
        gate_MF, up_MF = gate_up_M2F.chunk(2, dim=-1)
        # Weighted before the last matmul: backward then needs no output of it for the weights' gradient.
        hidden_MF = F.silu(gate_MF).mul_(up_MF).mul_(weight_M1)
        output_MD = grouped_matmul(hidden_MF, down_EDF.transpose(1, 2), ends_E)
        ctx.save_for_backward(x_ND, weight_M1, gate_up_E2FD, down_EDF, row_NK, token_M, ends_E, gate_up_M2F)
        ctx.weight_dtype = weight_NK.dtype
        return sum_choices(output_MD, row_NK)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, weight_M1, gate_up_E2FD, down_EDF, row_NK, token_M, ends_E, gate_up_M2F = ctx.saved_tensors
        gate_MF, up_MF = gate_up_M2F.chunk(2, dim=-1)
        activated_MF = F.silu(gate_MF)
        unweighted_MF = activated_MF * up_MF
        grad_MD = grad_ND.index_select(0, token_M)
        grad_down = grouped_matmul(grad_MD.T, unweighted_MF * weight_M1, ends_E).to(down_EDF.dtype)
        grad_MF = grouped_matmul(grad_MD, down_EDF, ends_E)
        del grad_MD
        grad_weight_M = torch.linalg.vecdot(grad_MF, unweighted_MF)
        del unweighted_MF
        grad_MF.mul_(weight_M1)
        grad_gate_MF = torch.ops.aten.silu_backward(grad_MF * up_MF, gate_MF)
        grad_M2F = torch.cat([grad_gate_MF, activated_MF.mul_(grad_MF)], dim=-1)
        del grad_gate_MF, grad_MF, activated_MF
        grad_gate_up = grouped_matmul(grad_M2F.T, x_ND.index_select(0, token_M), ends_E).to(gate_up_E2FD.dtype)
        grad_rows_MD = grouped_matmul(grad_M2F, gate_up_E2FD, ends_E)
        grad_weight_NK = gather_weights(grad_weight_M, row_NK, ctx.weight_dtype)
        return sum_choices(grad_rows_MD, row_NK), grad_weight_NK, grad_gate_up, grad_down, None, None, None


def scatter_weights(weight_NK: Tensor, row_NK: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """The routing weight of the choice in each row, [rows, 1]; 0 in rows without a choice."""
    weight_M = torch.zeros(rows, dtype=dtype, device=weight_NK.device)
    return weight_M.index_copy_(0, row_NK.flatten(), weight_NK.flatten().to(dtype))[:, None]


def gather_weights(weight_M: Tensor, row_NK: Tensor, dtype: torch.dtype) -> Tensor:
    """The transpose of `scatter_weights`: the value in each choice's row, [N, K]."""
    return weight_M.index_select(0, row_NK.flatten()).view_as(row_NK).to(dtype)


def grouped_matmul(a: Tensor, b: Tensor, ends_E: Tensor) -> Tensor:
    """The matmul of each expert, in a's dtype; the rows of a (or its columns) are grouped by expert."""
    return F.grouped_mm(a, b.to(a.dtype), offs=ends_E)


def sum_choices(rows_MD: Tensor, row_NK: Tensor) -> Tensor:
    """The sum of each token's rows, [N, D], accumulated in float32."""
    return rows_MD.index_select(0, row_NK.flatten()).view(*row_NK.shape, -1).sum(1)
