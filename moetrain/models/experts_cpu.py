"""The experts on CPU: a tile of them at a time, so that activations between the matmuls stay in the cache.

A pass over rows in main memory takes several times as long as over rows in the cache. Each tile of experts goes through
all steps, forward or backward, before the next one starts. Only the output of the first matmul is kept for backward.
Weights are cast, and their gradients widened, tile by tile too.

Shapes: N tokens, D hidden size, E experts, K experts per token, F expert width, M rows sent to experts; R rows and C
experts of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain.models.compilation import uncompiled
from moetrain.models.experts_grouped import Arrangement, gather_weights, grouped_matmul, scatter_weights

# Rows of a tile, about. Measured (4,096 tokens x 256, 32 experts of 128, top 4): a step takes 1.01 times as long with
# 4,096 rows, 1.04 with 8,192 and 1.13 with all rows in one tile.
_TILE_ROWS = 2048
_ROW_MULTIPLE = 32  # each expert's rows are padded to a multiple


@uncompiled
def cpu_experts(x_ND: Tensor, index_NK: Tensor, weight_NK: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor) -> Tensor:
    """See `moetrain.models.experts.experts`."""
    return _CPUExperts.apply(x_ND, weight_NK, gate_up_E2FD, down_EDF, _arrange(index_NK, len(gate_up_E2FD)))


class _Tile(NamedTuple):
    """Consecutive experts and their rows."""

    experts: slice
    rows: slice
    ends_C: Tensor  # int32, where each expert's rows end within the tile


def _arrange(index_NK: Tensor, num_experts: int) -> Arrangement:
    """The arrangement with each expert's rows padded to a multiple of 32.

    A matmul of a new height needs a new kernel, and without padding the heights are new at every step. A padding row
    holds token 0 and has routing weight 0, so it adds nothing to the output or to a gradient.
    """
    expert_M, choice_M = index_NK.flatten().sort(stable=True)
    counts_E = torch.bincount(expert_M, minlength=num_experts)
    padded_E = (counts_E + _ROW_MULTIPLE - 1) // _ROW_MULTIPLE * _ROW_MULTIPLE
    ends_E = padded_E.cumsum(0)
    shift_E = (ends_E - padded_E) - (counts_E.cumsum(0) - counts_E)
    row_M = torch.arange(len(expert_M)) + shift_E[expert_M]
    return Arrangement(
        row_NK=torch.empty_like(expert_M).index_copy_(0, choice_M, row_M).view_as(index_NK),
        token_M=expert_M.new_zeros(int(ends_E[-1])).index_copy_(0, row_M, choice_M // index_NK.shape[1]),
        ends_E=ends_E,
    )


def _tiles(ends_E: Tensor) -> Iterator[_Tile]:
    ends = [0, *ends_E.tolist()]
    experts = len(ends_E)
    width = max(1, _TILE_ROWS * experts // max(1, ends[-1]))
    for first in range(0, experts, width):
        last = min(first + width, experts)
        within_C = (ends_E[first:last] - ends[first]).to(torch.int32)
        yield _Tile(slice(first, last), slice(ends[first], ends[last]), within_C)


class _CPUExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, weight_NK: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, arranged: Arrangement
    ) -> Tensor:
        row_NK, token_M, tiles = arranged.row_NK, arranged.token_M, list(_tiles(arranged.ends_E))
        weight_M1 = scatter_weights(weight_NK, row_NK, len(token_M), x_ND.dtype)
        output_MD, kept = x_ND.new_empty(len(token_M), x_ND.shape[1]), []
        for experts, rows, ends_C in tiles:
            sent_RD = x_ND.index_select(0, token_M[rows])
            gate_up_R2F = grouped_matmul(sent_RD, gate_up_E2FD[experts].transpose(1, 2), ends_C)
            gate_RF, up_RF = gate_up_R2F.chunk(2, dim=-1)
            # Weighted before the last matmul: backward then needs no output of it for the weights' gradient.
            hidden_RF = F.silu(gate_RF).mul_(up_RF).mul_(weight_M1[rows])
            output_MD[rows] = grouped_matmul(hidden_RF, down_EDF[experts].transpose(1, 2), ends_C)
            kept.append(gate_up_R2F)
        ctx.save_for_backward(x_ND, weight_M1, gate_up_E2FD, down_EDF, row_NK, token_M, *kept)
        ctx.tiles, ctx.weight_dtype = tiles, weight_NK.dtype
        return sum_choices(output_MD, row_NK)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, weight_M1, gate_up_E2FD, down_EDF, row_NK, token_M, *kept = ctx.saved_tensors
        grad_gate_up, grad_down = torch.empty_like(gate_up_E2FD), torch.empty_like(down_EDF)
        grad_rows_MD, grad_weight_M = x_ND.new_empty(len(token_M), x_ND.shape[1]), torch.empty_like(weight_M1[:, 0])
        for (experts, rows, ends_C), gate_up_R2F in zip(ctx.tiles, kept, strict=True):
            gate_RF, up_RF = gate_up_R2F.chunk(2, dim=-1)
            activated_RF = F.silu(gate_RF)
            unweighted_RF = activated_RF * up_RF
            grad_RD = grad_ND.index_select(0, token_M[rows])
            grad_down[experts] = grouped_matmul(grad_RD.T, unweighted_RF * weight_M1[rows], ends_C)
            grad_RF = grouped_matmul(grad_RD, down_EDF[experts], ends_C)
            grad_weight_M[rows] = torch.linalg.vecdot(grad_RF, unweighted_RF)
            grad_RF.mul_(weight_M1[rows])
            grad_R2F = torch.empty_like(gate_up_R2F)
            grad_gate_RF, grad_up_RF = grad_R2F.chunk(2, dim=-1)
            torch.mul(grad_RF, activated_RF, out=grad_up_RF)
            torch.ops.aten.silu_backward.grad_input(grad_RF.mul_(up_RF), gate_RF, grad_input=grad_gate_RF)
            grad_gate_up[experts] = grouped_matmul(grad_R2F.T, x_ND.index_select(0, token_M[rows]), ends_C)
            grad_rows_MD[rows] = grouped_matmul(grad_R2F, gate_up_E2FD[experts], ends_C)
        grad_weight_NK = gather_weights(grad_weight_M, row_NK, ctx.weight_dtype)
        return sum_choices(grad_rows_MD, row_NK), grad_weight_NK, grad_gate_up, grad_down, None


def sum_choices(rows_MD: Tensor, row_NK: Tensor) -> Tensor:
    """The sum of each token's rows, [N, D], accumulated in float32."""
    # One pass. Measured (4,096 x 256, top 4, bf16): 0.7 ms; a gather and a sum take 4.7 ms.
    return F.embedding_bag(row_NK, rows_MD, mode="sum")
