"""Muon for weight matrices, with AdamW for all other parameters.

Muon (Jordan and others 2024) moves a matrix along its momentum with all singular values brought near 1, by a few
Newton-Schulz iterations. With Moonlight's scale (2502.16982, section 2.2) an update has the root mean square of an
AdamW update, so one learning rate and one weight decay serve both.

`torch.optim.Muon` has the same update for 2-D parameters, and the tests compare the two. It is not used because it
cannot skip a step on the device, always iterates in bf16, and communicates at each matmul of a sharded matrix.

Shapes: N matrices of A rows and B columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.placement_types import Placement

from moetrain.dtensor import local_tensor
from moetrain.optim.adamw import AdamW

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic, as in Muon's reference and in torch
_ITERATIONS = 5
_LEAST_NORM = 1e-7  # so that a matrix of zeros stays one
_UPDATE_RMS = 0.2  # root mean square of an AdamW update, as Moonlight measured it


@dataclass(frozen=True)
class MatrixParameter:
    """A parameter that holds matrices in its last two dimensions.

    Attributes:
        stacked: matrices that its rows hold one above the other: 2 where a gate and an up projection are one weight.
    """

    parameter: nn.Parameter
    stacked: int = 1

    def matrices(self, values: Tensor) -> Tensor:
        """Values of the parameter's shape, or of some of its experts, as [N, A, B]."""
        rows, columns = values.shape[-2:]
        return values.reshape(-1, rows // self.stacked, columns)


class Muon:
    """Muon for matrices, AdamW for the rest; meets `moetrain.optim.builder.Optimizer`.

    Each expert's matrices are orthogonalized by themselves. Where a rank has whole matrices of a sharded parameter, as
    of experts, that needs no communication. Else they are gathered, one parameter at a time, and orthogonalized on each
    rank that shares them. Each rank applies its shard: the result is that of one rank.

    Args:
        matrices: what Muon updates.
        adamw: the optimizer of all other parameters. Both share one ``state``.
        dtype: of the iterations' matmuls.
        state_dtype: of the momentum, 4 or 2 bytes per parameter.
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        matrices: Sequence[MatrixParameter],
        adamw: AdamW,
        learning_rate: float,
        weight_decay: float,
        momentum: float,
        dtype: torch.dtype,
        state_dtype: torch.dtype,
    ) -> None:
        self._matrices: dict[Tensor, MatrixParameter] = {each.parameter: each for each in matrices}
        self._adamw, self._momentum, self._dtype, self._state_dtype = adamw, momentum, dtype, state_dtype
        self._group: dict[str, Any] = {"params": list(self._matrices), "lr": learning_rate}
        self._group["weight_decay"] = weight_decay
        self.param_groups: list[dict[str, Any]] = [*adamw.param_groups, self._group]
        self.state = adamw.state

    def initial_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """A parameter's state before the first step."""
        if parameter not in self._matrices:
            return self._adamw.initial_state(parameter)
        return {"momentum_buffer": torch.zeros_like(parameter, dtype=self._state_dtype)}

    @torch.no_grad()
    def direction(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        """What a step along the gradient alone, without earlier momentum, would subtract at a rate of 1."""
        if parameter not in self._matrices:
            return self._adamw.direction(parameter, gradient)
        local = self._orthogonal_update(self._matrices[parameter], local_tensor(gradient))
        return _as_sharded(local, parameter, parameter.placements) if isinstance(parameter, DTensor) else local

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients."""
        self._adamw.zero_grad(set_to_none)
        for parameter in self._matrices:
            if set_to_none:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.zero_()

    @torch.no_grad()
    def step(self) -> None:
        """One update, skipped on the device where ``found_inf`` is 1."""
        self._adamw.found_inf = self.found_inf
        self._adamw.step()
        rate, decay = self._group["lr"], self._group["weight_decay"]
        for matrix in self._matrices.values():
            parameter = matrix.parameter
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state.update(self.initial_state(parameter))
            weight, kept = local_tensor(parameter), local_tensor(state["momentum_buffer"])
            gradient = local_tensor(parameter.grad).float()
            skipped = torch.zeros((), device=weight.device) if self.found_inf is None else self.found_inf
            momentum = kept.float().lerp(gradient, 1 - self._momentum)
            update = self._orthogonal_update(matrix, gradient.lerp(momentum, self._momentum))  # Nesterov
            weight.mul_(1 - rate * decay * (1 - skipped))
            weight.sub_(torch.where(skipped > 0, 0.0, rate * update))  # the update may hold NaN
            kept.copy_(torch.where(skipped > 0, kept.float(), momentum))

    def _orthogonal_update(self, matrix: MatrixParameter, values: Tensor) -> Tensor:
        """This rank's shard of the scaled update, float32, from this rank's shard of momentum or gradient."""
        parameter, local = matrix.parameter, values.to(self._dtype)
        if not isinstance(parameter, DTensor):
            return self._scaled(matrix, local)
        held, whole = parameter.placements, _whole_matrices(parameter)
        if held == whole:
            return self._scaled(matrix, local)
        gathered = _as_sharded(local, parameter, held).redistribute(placements=whole).to_local()
        update = _as_sharded(self._scaled(matrix, gathered), parameter, whole)
        return update.redistribute(placements=held).to_local()

    @staticmethod
    def _scaled(matrix: MatrixParameter, values: Tensor) -> Tensor:
        matrices_NAB = matrix.matrices(values)
        scale = _UPDATE_RMS * math.sqrt(max(matrices_NAB.shape[1:]))
        return orthogonalize(matrices_NAB).float().mul_(scale).view(values.shape)


def orthogonalize(matrices_NAB: Tensor) -> Tensor:
    """Each matrix with its singular values brought near 1 (0.68 to 1.21), in its own dtype; [N, A, B].

    Newton-Schulz iterations of an odd quintic, which change singular values alone. Those below 2e-3 of the matrix's
    norm end lower; a matrix of zeros stays zero.
    """
    tall = matrices_NAB.shape[1] > matrices_NAB.shape[2]
    x = matrices_NAB.mT if tall else matrices_NAB  # the Gram matrix of the shorter side is the smaller
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=_LEAST_NORM)
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return (x.mT if tall else x).contiguous()


def _whole_matrices(parameter: DTensor) -> tuple[Placement, ...]:
    """Placements of the parameter with which each rank has whole matrices: sharded by experts, if at all."""
    by_experts = parameter.ndim > 2
    return tuple(p if by_experts and p.is_shard(0) else Replicate() for p in parameter.placements)


def _as_sharded(local: Tensor, parameter: DTensor, placements: Sequence[Placement]) -> DTensor:
    """This rank's part as a tensor of the parameter's shape with these placements."""
    return DTensor.from_local(
        local, parameter.device_mesh, placements, shape=parameter.shape, stride=parameter.stride()
    )
