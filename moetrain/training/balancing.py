"""Load balancing: what the auxiliary loss compares with, and the bias that balances without a loss.

Shapes: L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from moetrain.config import ModelSettings
from moetrain.models.router import Router
from moetrain.models.transformer import Routing, Transformer


class Balancing:
    """The auxiliary loss of a micro-batch and, after each step, the selection bias.

    By layer the loss is E * sum_e f_e P_e, with f the share of choices that went to each expert and P the mean router
    probability; it is 1 at perfect balance (Switch Transformer, 2101.03961), and layers are averaged. f carries no
    gradient. With scope ``micro_batch`` it is counted over the micro-batch. With ``global`` it is the whole previous
    step's, over all processes: the step's own load is known only after its last micro-batch, and a count that grows
    from one micro-batch to the next would make the loss depend on how a step is split. Load moves little from one
    step to the next. Before the first step it is uniform, so that step has no balancing gradient.
    """

    def __init__(self, model: Transformer, settings: ModelSettings) -> None:
        self.settings = settings
        self._routers = [module for module in model.modules() if isinstance(module, Router)]
        device = next(model.parameters()).device
        self.share_LE = torch.full((len(self._routers), settings.num_experts), 1 / settings.num_experts, device=device)

    def loss(self, routing: Routing, real_tokens: int) -> torch.Tensor:
        """This micro-batch's part of the step's balancing loss; the parts of a step of ``real_tokens`` sum to it."""
        share_LE = self.share_LE
        if self.settings.balance_scope == "micro_batch":
            # A micro-batch of padding alone, at the end of a stream, has no load.
            share_LE = routing.load_LE / routing.load_LE.sum(-1, keepdim=True).clamp(min=1)
        return self.value(share_LE, routing.probs_LE, real_tokens)

    def value(self, share_LE: torch.Tensor, probs_LE: torch.Tensor, real_tokens: int) -> torch.Tensor:
        """E * sum_e f_e P_e, averaged over layers."""
        return self.settings.num_experts * (share_LE * (probs_LE / real_tokens)).sum(-1).mean()

    @torch.no_grad()
    def after_step(self, load_LE: torch.Tensor, made: torch.Tensor) -> None:
        """Take note of a whole step's load, and move the selection bias towards experts with less than the mean.

        Args:
            made: whether the step's update was made, on the device; after one that was not, nothing changes.
        """
        share_LE = (load_LE / load_LE.sum(-1, keepdim=True)).to(self.share_LE)
        self.share_LE = torch.where(made, share_LE, self.share_LE)
        if self.settings.balancing != "bias":
            return
        for router, share_E in zip(self._routers, self.share_LE, strict=True):
            assert router.selection_bias is not None
            towards = (1 / len(share_E) - share_E).sign() * made
            router.selection_bias += self.settings.bias_update_rate * towards

    def state(self) -> dict[str, torch.Tensor]:
        return {"share_LE": self.share_LE}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        self.share_LE = state["share_LE"].to(self.share_LE.device)
