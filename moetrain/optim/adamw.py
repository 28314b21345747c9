"""AdamW whose two moments may be kept in bf16."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.adamw import adamw


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW; meets `moetrain.optim.builder.Optimizer`.

    With ``state_dtype`` bf16 the moments take 4 bytes per parameter instead of 8. A step then widens the moments of one
    parameter at a time, updates in float32, and rounds them again, which costs a few more passes over memory per step.
    The parameters stay float32.
    """

    found_inf: torch.Tensor | None = None

    def __init__(
        self, params: Iterable[nn.Parameter] | Iterable[dict[str, Any]], state_dtype: torch.dtype, **options: Any
    ) -> None:
        super().__init__(params, fused=True, **options)
        self._state_dtype = state_dtype

    def initial_state(self, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
        """A parameter's state before the first step."""
        return {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),  # where a fused step reads it
            "exp_avg": torch.zeros_like(parameter, dtype=self._state_dtype),
            "exp_avg_sq": torch.zeros_like(parameter, dtype=self._state_dtype),
        }

    @torch.no_grad()
    def direction(self, parameter: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient divided by the root of its second moment, of which it becomes a part as in a step."""
        group = next(group for group in self.param_groups if any(each is parameter for each in group["params"]))
        state, beta2 = self.state.get(parameter), group["betas"][1]
        second = gradient.float() ** 2
        if state:
            correction = 1 - beta2 ** (float(state["step"]) + 1)
            second = (beta2 * state["exp_avg_sq"].float() + (1 - beta2) * second) / correction
        return gradient / (second.sqrt() + group["eps"])

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update, skipped on the device where ``found_inf`` is 1."""
        if self._state_dtype == torch.float32:
            super().step()
            return
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state.update(self.initial_state(parameter))
                moments = [state[key].float() for key in ("exp_avg", "exp_avg_sq")]
                adamw(
                    [parameter],
                    [parameter.grad],
                    [moments[0]],
                    [moments[1]],
                    [],
                    [state["step"]],
                    fused=True,
                    found_inf=self.found_inf,
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
