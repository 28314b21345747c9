"""AdamW, with no weight decay on norms and embeddings."""

from __future__ import annotations

import torch
from torch import nn

from moetrain.config import OptimSettings


def make_optimizer(model: nn.Module, settings: OptimSettings) -> torch.optim.AdamW:
    """AdamW over the model's parameters in two groups; the learning rate is set anew at every step."""
    plain: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (plain if "norm" in name or "embed_tokens" in name else decayed).append(parameter)
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        fused=True,
    )


def optimizer_state(model: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, torch.Tensor]:
    """AdamW's state by parameter name, so that it does not depend on the order of groups."""
    return {
        f"{name}.{key}": torch.as_tensor(value)
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_state(model: nn.Module, optimizer: torch.optim.AdamW, state: dict[str, torch.Tensor]) -> None:
    """Put a state from `optimizer_state` back.

    Raises:
        ValueError: a parameter whose state is missing although others have one.
    """
    for name, parameter in model.named_parameters():
        found = {key: state[f"{name}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq") if f"{name}.{key}" in state}
        if state and len(found) != 3:
            raise ValueError(f"the optimizer state of {name} is missing from the checkpoint")
        if found:
            optimizer.state[parameter] = {
                "step": found["step"].to(parameter.device).clone(),  # where a fused update reads it
                "exp_avg": found["exp_avg"].to(parameter.device).clone(),
                "exp_avg_sq": found["exp_avg_sq"].to(parameter.device).clone(),
            }
