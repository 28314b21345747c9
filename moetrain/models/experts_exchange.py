"""Expert parallelism inside a layer: each rank of a group holds some of the experts, and tokens travel to them.

A row is sent for each choice of a token, in the order of experts, so that the rows for one rank are contiguous. The
routing weight of each row is sent with it. The backend of the experts gets one choice per received row; its weighted
outputs travel back, and are summed there over the choices of each token. No row is dropped, so the result is that of
one rank that holds all experts, up to rounding.

Collectives of a layer: the numbers of rows for each expert, then rows and weights, then outputs; in backward the
gradients of outputs, then those of rows and weights. All ranks of the group must make each pass together. **The host
waits for the device once per layer and forward pass**, since the sizes of the received tensors depend on the routing.

Rows travel by `dist.all_to_all_single` in autograd functions: torch's differentiable versions are private or
deprecated, and these keep no row for backward on the rank that sent it.

Shapes: N tokens, D hidden size, E experts of the group, C experts of this rank, K experts per token, M = N * K rows
sent, R rows received, G ranks of the group.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from moetrain.models import experts_cpu, experts_grouped
from moetrain.models.compilation import uncompiled
from moetrain.models.experts import Backend, experts
from moetrain.models.experts_grouped import Arrangement, arrange, gather_weights, scatter_weights


class _Route(NamedTuple):
    """How many rows each rank of the group gets from this one, and sends to it."""

    group: dist.ProcessGroup
    sent_G: list[int]
    received_G: list[int]

    def to_experts(self, rows_M: Tensor) -> Tensor:
        """Send rows to the ranks of their experts; returns those received, ordered by sender, then by expert."""
        return self._exchange(rows_M, self.sent_G, self.received_G)

    def to_tokens(self, rows_R: Tensor) -> Tensor:
        """The way back."""
        return self._exchange(rows_R, self.received_G, self.sent_G)

    def _exchange(self, rows: Tensor, out_G: list[int], in_G: list[int]) -> Tensor:
        received = rows.new_empty(sum(in_G), *rows.shape[1:])
        dist.all_to_all_single(received, rows.contiguous(), in_G, out_G, group=self.group)
        return received


@uncompiled
def exchanged_experts(
    x_ND: Tensor, index_NK: Tensor, weight_NK: Tensor, gate_up_E2FD: DTensor, down_EDF: DTensor, backend: Backend
) -> Tensor:
    """`moetrain.models.experts.experts` with experts that are split over a group. All its ranks must call this.

    Args:
        gate_up_E2FD, down_EDF: split along the first dimension over a mesh of one dimension, the group.
    """
    group, ranks = gate_up_E2FD.device_mesh.get_group(), gate_up_E2FD.device_mesh.size()
    gate_up_C2FD, down_CDF = gate_up_E2FD.to_local(), down_EDF.to_local()
    arranged = arrange(index_NK, len(gate_up_E2FD))
    sent_GC = arranged.ends_E.diff(prepend=arranged.ends_E.new_zeros(1)).view(ranks, -1)
    received_GC = torch.empty_like(sent_GC)
    dist.all_to_all_single(received_GC, sent_GC, group=group)
    sent_G, received_G = torch.stack([sent_GC, received_GC]).sum(-1).tolist()  # the host waits for the device here
    route = _Route(group, sent_G, received_G)
    x_RD, weight_R1 = _ToExperts.apply(x_ND, weight_NK, arranged, route)
    numbers_GC = torch.arange(received_GC.shape[1], device=x_ND.device).expand_as(received_GC)
    index_R1 = numbers_GC.flatten().repeat_interleave(received_GC.flatten(), output_size=len(x_RD))[:, None]
    # A rank that gets no row computes one of zeros. Kernels need not accept matmuls without rows, and the experts get
    # gradients of zero, which data parallelism waits for.
    padding = 0 if len(x_RD) else 1
    x_RD, weight_R1, index_R1 = (F.pad(each, (0, 0, 0, padding)) for each in (x_RD, weight_R1, index_R1))
    out_RD = experts(x_RD, index_R1, weight_R1, gate_up_C2FD, down_CDF, backend)
    return _ToTokens.apply(out_RD[: len(out_RD) - padding], arranged, route)


class _ToExperts(torch.autograd.Function):
    """Rows and routing weights of all choices, on the ranks of their experts: [R, D] and float32 [R, 1]."""

    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, weight_NK: Tensor, arranged: Arrangement, route: _Route
    ) -> tuple[Tensor, Tensor]:
        ctx.arranged, ctx.route, ctx.weight_dtype = arranged, route, weight_NK.dtype
        x_RD = route.to_experts(x_ND.index_select(0, arranged.token_M))
        weight_M1 = scatter_weights(weight_NK, arranged.row_NK, len(arranged.token_M), torch.float32)
        return x_RD, route.to_experts(weight_M1)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor, grad_weight_R1: Tensor) -> tuple[Tensor | None, ...]:
        row_NK = ctx.arranged.row_NK
        grad_ND = _sum_choices(ctx.route.to_tokens(grad_RD), row_NK)
        grad_weight_NK = gather_weights(ctx.route.to_tokens(grad_weight_R1)[:, 0], row_NK, ctx.weight_dtype)
        return grad_ND, grad_weight_NK, None, None


class _ToTokens(torch.autograd.Function):
    """The outputs of the experts, back on the ranks of their tokens and summed over the choices of each: [N, D]."""

    @staticmethod
    def forward(ctx: Any, out_RD: Tensor, arranged: Arrangement, route: _Route) -> Tensor:
        ctx.arranged, ctx.route = arranged, route
        return _sum_choices(route.to_tokens(out_RD), arranged.row_NK)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.route.to_experts(grad_ND.index_select(0, ctx.arranged.token_M)), None, None


def _sum_choices(rows_MD: Tensor, row_NK: Tensor) -> Tensor:
    module = experts_cpu if rows_MD.device.type == "cpu" else experts_grouped
    return module.sum_choices(rows_MD, row_NK)
