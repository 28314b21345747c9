"""The optimizer of a run: what training asks of one, its parameter groups, and its state by parameter name."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any, Protocol

import torch
from torch import nn

from moetrain.config import OptimSettings
from moetrain.models.transformer import Experts, Linear, RMSNorm, Transformer
from moetrain.optim.adamw import AdamW
from moetrain.optim.muon import MatrixParameter, Muon

_UNDECAYED = (RMSNorm, nn.Embedding)
_GATE_AND_UP = "gate_up_proj"  # in the name of a parameter that holds two matrices, gate above up


class Optimizer(Protocol):
    """What training and checkpoints ask of an optimizer.

    Training decides on the device whether an update is applied, since the host would have to wait for the whole step to
    decide. So an optimizer must be able to skip a step there.
    """

    param_groups: list[dict[str, Any]]
    """Groups as in `torch.optim.Optimizer`; training sets each group's ``lr`` before a step."""
    found_inf: torch.Tensor | None
    """Float32 [] on the device; where it is 1, `step` must change neither parameters nor state. None means 0. Torch's
    fused optimizers read it under this name, which gradient scalers set."""

    @property
    def state(self) -> MutableMapping[torch.Tensor, Any]:
        """Tensors by parameter and by name: all that a checkpoint holds of the optimizer."""

    def step(self) -> None:
        """Apply one update, or skip it; must not synchronize with the host."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients."""

    def direction(self, parameter: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """Where a gradient alone, without momentum, would move a parameter: minus the update at a rate of 1."""

    def initial_state(self, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
        """A parameter's state before the first step, with the dtypes and sharding that later steps keep."""


def make_optimizer(model: Transformer, settings: OptimSettings) -> Optimizer:
    """The optimizer of ``optim.name`` over the model's parameters, without weight decay on norms and embeddings.

    ``muon`` updates the matrices of attention and experts, and AdamW the embeddings, the head, routers and norms. The
    learning rate is a placeholder: training sets that of each step.
    """
    # Fused steps need parameters of one mesh: split experts have another than the rest.
    groups: dict[tuple[bool, Any], list[nn.Parameter]] = {}
    matrices: list[MatrixParameter] = []
    seen: set[nn.Parameter] = set()  # a tied output layer has the embeddings' parameter, which comes first
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter in seen:
                continue
            seen.add(parameter)
            if settings.name == "muon" and isinstance(module, Linear | Experts) and module is not model.lm_head:
                stacked = 2 if _GATE_AND_UP in f"{path}.{name}" else 1
                matrices.append(MatrixParameter(parameter, stacked))
            else:
                key = isinstance(module, _UNDECAYED), getattr(parameter, "device_mesh", None)
                groups.setdefault(key, []).append(parameter)
    state_dtype = torch.float32 if settings.state_precision == "fp32" else torch.bfloat16
    adamw = AdamW(
        [
            {"params": parameters, "weight_decay": 0.0 if undecayed else settings.weight_decay}
            for (undecayed, _), parameters in sorted(groups.items(), key=lambda group: group[0][0])
        ],
        state_dtype=state_dtype,
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
    )
    if settings.name == "adamw":
        return adamw
    rates = settings.learning_rate, settings.weight_decay, settings.momentum
    return Muon(matrices, adamw, *rates, dtype=model.dtype, state_dtype=state_dtype)


def optimizer_state(model: nn.Module, optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state as ``PARAMETER.KEY``, which does not depend on the order of groups."""
    return {
        f"{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def initial_optimizer_state(model: nn.Module, optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """Give every parameter its initial state, to be filled from a checkpoint; returns `optimizer_state`."""
    for parameter in model.parameters():
        optimizer.state[parameter] = optimizer.initial_state(parameter)
    return optimizer_state(model, optimizer)
