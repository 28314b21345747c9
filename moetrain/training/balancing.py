"""Load balancing of experts: the auxiliary loss, and the selection bias that balances without a loss.

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

    Per layer the loss is E * sum_e f_e P_e, with f_e the share of choices that went to expert e and P_e its mean router
    probability (Switch Transformer, 2101.03961). It is 1 at perfect balance; layers are averaged; f carries no
    gradient. With scope ``micro_batch``, f is that of the micro-batch. With ``global``, f is that of the whole previous
    step over all ranks: the step's own f is known only after its last micro-batch, and a running count would make the
    loss depend on how a step is split. Load changes little between steps. Before the first step f is uniform, so the
    first step has no balancing gradient.
    """

    def __init__(self, model: Transformer, settings: ModelSettings) -> None:
        self.settings = settings
        self._routers = [module for module in model.modules() if isinstance(module, Router)]
        device = next(model.parameters()).device
        self.share_LE = torch.full((len(self._routers), settings.num_experts), 1 / settings.num_experts, device=device)

    def loss(self, routing: Routing, real_tokens: int) -> torch.Tensor:
        """This micro-batch's part of the balancing loss of a step of ``real_tokens`` tokens; the parts sum to it."""
        share_LE = self.share_LE
        if self.settings.balance_scope == "micro_batch":
            # A micro-batch of padding alone, at the end of a stream, has no load.
            share_LE = routing.load_LE / routing.load_LE.sum(-1, keepdim=True).clamp(min=1)
        return self.value(share_LE, routing.probs_LE, real_tokens)

    def value(self, share_LE: torch.Tensor, probs_LE: torch.Tensor, real_tokens: int) -> torch.Tensor:
        """E * sum_e f_e P_e, averaged over layers."""
        return self.settings.num_experts * (share_LE * (probs_LE / real_tokens)).sum(-1).mean()

    @torch.no_grad()
    def after_step(self, load_LE: torch.Tensor, applied: torch.Tensor) -> None:
        """Store a step's load, and with ``balancing: bias`` raise the selection bias of experts below the mean load.

        Args:
            applied: whether the update was applied, on the device; a skipped update changes nothing here.
        """
        share_LE = (load_LE / load_LE.sum(-1, keepdim=True)).to(self.share_LE)
        self.share_LE = torch.where(applied, share_LE, self.share_LE)
        if self.settings.balancing != "bias":
            return
        for router, share_E in zip(self._routers, self.share_LE, strict=True):
            assert router.selection_bias is not None
            towards = (1 / len(share_E) - share_E).sign() * applied
            router.selection_bias += self.settings.bias_update_rate * towards

    def state(self) -> dict[str, torch.Tensor]:
        return {"share_LE": self.share_LE}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        self.share_LE = state["share_LE"].to(self.share_LE.device)
