"""AdamW, with no weight decay on norms and embeddings."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.adamw import adamw

from moetrain.config import OptimSettings


class AdamWithSmallState(torch.optim.AdamW):
    """AdamW whose two moments are kept in bf16: 4 bytes a parameter instead of 8.

    A step widens one parameter's moments at a time, updates in float32 as ever, and rounds them again; on a device, a
    few more passes over memory once a step. The parameters stay float32.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update, left out where ``found_inf`` is 1, as in torch's fused AdamW."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                    for key in ("exp_avg", "exp_avg_sq"):
                        state[key] = torch.zeros_like(parameter, dtype=torch.bfloat16)
                moments = [state[key].float() for key in ("exp_avg", "exp_avg_sq")]
                adamw(
                    [parameter],
                    [parameter.grad],
                    [moments[0]],
                    [moments[1]],
                    [],
                    [state["step"]],
                    fused=True,
                    found_inf=getattr(self, "found_inf", None),
                    amsgrad=False,
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    lr=group["lr"],
                    weight_decay=group["weight_decay"],
                    eps=group["eps"],
                    maximize=False,
                )
                state["exp_avg"].copy_(moments[0])
                state["exp_avg_sq"].copy_(moments[1])


def make_optimizer(model: nn.Module, settings: OptimSettings) -> torch.optim.AdamW:
    """AdamW over the model's parameters in two groups; the learning rate is set anew at every step."""
    plain: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (plain if "norm" in name or "embed_tokens" in name else decayed).append(parameter)
    kind = torch.optim.AdamW if settings.state_precision == "fp32" else AdamWithSmallState
    return kind(
        [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        fused=True,
    )


def optimizer_state(model: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, torch.Tensor]:
    """AdamW's state by parameter name, so that it does not depend on the order of groups."""
    return {
        f"{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def start_optimizer_state(model: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, torch.Tensor]:
    """Give the optimizer a state for every parameter, as after no step, to be filled; returns it by parameter name."""
    kept = torch.bfloat16 if isinstance(optimizer, AdamWithSmallState) else torch.float32
    for parameter in model.parameters():
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),  # where a fused update reads it
            "exp_avg": torch.zeros_like(parameter, dtype=kept),
            "exp_avg_sq": torch.zeros_like(parameter, dtype=kept),
        }
    return optimizer_state(model, optimizer)
