"""Training metrics summed between two logged points.

The sums are part of a checkpoint, so that a run resumed between two points logs the same values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from moetrain.training.step import StepStatistics


class TrainMetrics:
    """Sums over the steps since the last point, on the device: the host synchronizes only in `points`.

    Args:
        domains: names by number.
        expert_ranks: ranks over which the experts of each layer are split.
    """

    def __init__(self, domains: Sequence[str], expert_ranks: int = 1) -> None:
        self.domains, self.expert_ranks = list(domains), expert_ranks
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, statistics: StepStatistics, grad_norm: torch.Tensor, applied: torch.Tensor) -> None:
        """Add one step; a step whose update was skipped does not count."""
        step = {
            "loss_D": statistics.loss_D,
            "tokens_D": statistics.tokens_D,
            "balance": statistics.balance,
            "z": statistics.z,
            "load_LE": statistics.load_LE,
            "grad_norm": grad_norm.double(),
            "steps": torch.ones_like(grad_norm, dtype=torch.float64),
        }
        for name, every_value in step.items():
            value = torch.where(applied, every_value, 0.0)
            self._sums[name] = self._sums[name] + value if name in self._sums else value.detach()

    def points(self) -> dict[str, float]:
        """The values of the next point by tag, and reset; empty without an update. Domains without tokens have none."""
        sums = {name: value.double().cpu() for name, value in self._sums.items()}
        self._sums = {}
        steps = float(sums["steps"])
        if not steps:
            return {}
        points = {
            "loss/train": float(sums["loss_D"].sum() / sums["tokens_D"].sum()),
            "optim/grad_norm": float(sums["grad_norm"]) / steps,
        }
        for name, loss, tokens in zip(self.domains, sums["loss_D"].tolist(), sums["tokens_D"].tolist(), strict=True):
            if tokens:
                points[f"loss/train/{name}"] = loss / tokens
        if sums["load_LE"].numel():
            points["loss/balance"] = float(sums["balance"]) / steps
            points["loss/z"] = float(sums["z"]) / steps
            points |= expert_load(sums["load_LE"])
            if self.expert_ranks > 1:
                points |= rank_load(sums["load_LE"], self.expert_ranks)
        return points

    def state(self) -> dict[str, torch.Tensor]:
        return dict(self._sums)

    def load_state(self, state: Mapping[str, torch.Tensor], device: torch.device) -> None:
        """Restore what `state` returned; domains that were added since then have no sums."""
        self._sums = {name: value.to(device) for name, value in state.items()}
        for name in ("loss_D", "tokens_D"):
            if name in self._sums:
                added = len(self.domains) - len(self._sums[name])
                self._sums[name] = torch.nn.functional.pad(self._sums[name], (0, added))


def expert_load(load_LE: torch.Tensor) -> dict[str, float]:
    """How evenly the experts were used, from tokens sent to each: mean over layers, and the worst layer.

    ``load_cv``: standard deviation over mean. ``entropy``: of the shares, divided by log E. ``dead``: experts that got
    no token.
    """
    share_LE = load_LE / load_LE.sum(-1, keepdim=True)
    experts = load_LE.shape[-1]
    cv_L = share_LE.std(-1, correction=0) * experts
    entropy_L = -torch.special.xlogy(share_LE, share_LE).sum(-1) / torch.log(torch.tensor(float(max(experts, 2))))
    dead_L = (load_LE == 0).sum(-1).double()
    return {
        "experts/load_cv": float(cv_L.mean()),
        "experts/load_cv/worst": float(cv_L.max()),
        "experts/entropy": float(entropy_L.mean()),
        "experts/entropy/worst": float(entropy_L.min()),
        "experts/dead": float(dead_L.mean()),
        "experts/dead/worst": float(dead_L.max()),
    }


def rank_load(load_LE: torch.Tensor, ranks: int) -> dict[str, float]:
    """How evenly the ranks were used over which each layer's experts are split, from tokens sent to each expert.

    ``rank_load_cv``: standard deviation over mean of the rows sent to each rank, mean over layers, and the worst layer.
    """
    load_LG = load_LE.view(len(load_LE), ranks, -1).sum(-1)
    cv_L = load_LG.std(-1, correction=0) / load_LG.mean(-1)
    return {"experts/rank_load_cv": float(cv_L.mean()), "experts/rank_load_cv/worst": float(cv_L.max())}
