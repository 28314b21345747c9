"""Panel readings turned into metrics: what is computed is a function of the readings alone, in their order."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from moetrain import grokking
from moetrain.grokking import Estimate, History, PhaseChange, PhaseThresholds, Verdict
from moetrain.routing.panel import SEEN, Panel
from moetrain.routing.panel_metrics import (
    dimension_by_layer,
    distance_by_layer,
    load_by_layer,
    panel_metrics,
    seen_members,
)
from moetrain.routing.store import StoredReading, TrainingContext


@dataclass(frozen=True)
class PanelPoints:
    """What one reading came to."""

    step: int
    metrics: dict[str, Estimate]  # by TensorBoard tag
    phases: dict[str, Verdict]  # by domain
    changes: dict[str, PhaseChange]  # by domain, where this reading changed its phase
    memorized: dict[str, Memorized]  # by domain, where this reading changed what counts as memorized
    matrices: dict[str, np.ndarray]  # by tag: what is shown as heat maps
    distributions: dict[str, np.ndarray]  # by tag: one value a sample
    broken: int  # panel samples whose routing or loss is not finite


@dataclass(frozen=True)
class Memorized:
    """Seen samples of a domain, by name, whose standing by the online rule a reading changed."""

    eps: float
    newly: list[str]
    undone: list[str]
    fraction: float  # of the seen samples, memorized now


class PanelMonitor:
    """Keeps the panel's losses and metrics over time, computes each reading's, and judges the domains' phases."""

    def __init__(
        self,
        panel: Panel,
        domains: Sequence[str],
        tau: float,
        steps: int,
        eps: Mapping[str, float | None],
        thresholds: PhaseThresholds | None = None,
    ) -> None:
        self.panel = panel
        self.domains = list(domains)
        self.tau = tau
        self.steps = steps
        self.eps = dict(eps)
        self.thresholds = thresholds or PhaseThresholds()
        self._history: dict[str, dict[str, list[tuple[float, float, float]]]] = {
            domain: {name: [] for name in _JUDGED} for domain in self.domains
        }
        self._tokens: list[int] = []
        self._by_layer: dict[str, list[np.ndarray]] = {domain: [] for domain in self.domains}
        self._dimension_by_layer: dict[str, list[np.ndarray]] = {domain: [] for domain in self.domains}
        self._read_at: list[int] = []
        self._losses: list[np.ndarray] = []

    def losses(self, domain: int) -> tuple[np.ndarray, np.ndarray]:
        """Steps of all readings [T], and the losses of a domain's seen samples [S, T]."""
        members = self.panel.members(domain, SEEN)
        return np.array(self._read_at), np.stack(self._losses, axis=1)[members] if self._losses else np.zeros((0, 0))

    @property
    def times(self) -> grokking.ReadingTimes:
        """Steps and tokens of the readings."""
        return grokking.ReadingTimes(tuple(self._read_at), tuple(self._tokens))

    def state(self) -> dict[str, torch.Tensor]:
        """The readings so far, for a checkpoint."""
        if not self._losses:
            return {}
        state = {
            "steps": torch.tensor(self._read_at),
            "tokens": torch.tensor(self._tokens),
            "losses": torch.from_numpy(np.stack(self._losses)),
        }
        for domain, history in self._history.items():
            state[f"by_layer.{domain}"] = torch.from_numpy(np.stack(self._by_layer[domain]))
            state[f"dimension_by_layer.{domain}"] = torch.from_numpy(np.stack(self._dimension_by_layer[domain]))
            for name, rows in history.items():
                state[f"{name}.{domain}"] = torch.tensor(rows, dtype=torch.float64)
        return state

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        if state:
            self._read_at = state["steps"].tolist()
            self._tokens = state["tokens"].tolist()
            self._losses = list(state["losses"].numpy())
            for domain, history in self._history.items():
                self._by_layer[domain] = list(state[f"by_layer.{domain}"].numpy())
                self._dimension_by_layer[domain] = list(state[f"dimension_by_layer.{domain}"].numpy())
                for name in history:
                    history[name] = [tuple(row) for row in state[f"{name}.{domain}"].tolist()]

    def take(self, stored: StoredReading) -> PanelPoints:
        """Take in the next reading; what it comes to, given those before."""
        self._read_at.append(stored.step)
        self._tokens.append(stored.training_context.tokens)
        # A loss that is not finite is the largest there is: nothing that has it is memorized.
        self._losses.append(np.where(np.isfinite(stored.loss), stored.loss, np.finfo(np.float32).max))
        metrics = panel_metrics(stored, self.domains, self.tau, self.steps)
        memorized = {}
        for number, domain in enumerate(self.domains):
            change = self._memorized(number, metrics)
            if change is not None:
                memorized[domain] = change
        verdicts, changed = self._judge(metrics, stored.training_context)
        matrices = {"experts/load_by_layer": load_by_layer(stored), "experts/load_by_domain": self._by_domain(stored)}
        distributions = {}
        for domain in self.domains:
            by_layer = self._by_layer[domain]
            by_layer.append(distance_by_layer(stored, domain, self.tau))
            matrices[f"pathway/d_path_by_layer/{domain}"] = np.stack(by_layer, axis=1)
            dimension = self._dimension_by_layer[domain]
            dimension.append(dimension_by_layer(stored, domain))
            matrices[f"kernel/d_eff_by_layer/{domain}"] = np.stack(dimension, axis=1)
            seen = seen_members(stored, domain)
            if len(seen):
                losses = stored.loss[seen]
                distributions[f"loss/panel_seen_by_sample/{domain}"] = losses[np.isfinite(losses)]
                cosine = grokking.cosine(stored.weights[seen], stored.blocks)
                distributions[f"pathway/cosine_by_sample/{domain}"] = cosine[np.isfinite(cosine)]
        broken = int((~stored.finite | ~np.isfinite(stored.loss)).sum())
        return PanelPoints(stored.step, metrics, verdicts, changed, memorized, matrices, distributions, broken)

    def _memorized(self, number: int, metrics: dict[str, Estimate]) -> Memorized | None:
        """Add a domain's memorized fraction to the metrics, if there is one; what changed, if anything did."""
        _, losses_ST = self.losses(number)
        eps = self.eps[self.domains[number]]
        if eps is None or not losses_ST.size or grokking.memorized_fraction(losses_ST, eps) is None:
            return None
        now = grokking.memorized_now(losses_ST, eps)
        fraction = grokking.mean_of_samples(now)
        metrics[f"memorized/fraction/{self.domains[number]}"] = fraction
        before = grokking.memorized_now(losses_ST[:, :-1], eps)
        if np.array_equal(now, before):
            return None
        members = self.panel.members(number, SEEN)
        newly, undone = (self.panel.names(members[which]) for which in (now & ~before, before & ~now))
        return Memorized(eps, newly, undone, fraction.mean)

    def _by_domain(self, stored: StoredReading) -> np.ndarray:
        """Share of each domain's tokens that go to each expert, over an even share; [domains, layers * experts]."""
        rows = []
        for domain in self.domains:
            counts = stored.counts[stored.domain == domain].sum(0, dtype=np.float64)
            rows.append((counts / np.maximum(counts.sum(-1, keepdims=True), 1) * counts.shape[-1]).ravel())
        return np.stack(rows)

    def _judge(
        self, metrics: Mapping[str, Estimate], training_context: TrainingContext
    ) -> tuple[dict[str, Verdict], dict[str, PhaseChange]]:
        verdicts, changed = {}, {}
        for domain, history in self._history.items():
            for name, tag in _JUDGED.items():
                history[name].append(_row(metrics.get(f"{tag}/{domain}")))
            history["router_entropy"][-1] = _number(training_context.router_entropy)
            history["load_cv"][-1] = _number(training_context.load_cv)
            for name, tag in _COUNTED.items():
                counted = metrics.get(f"{tag}/{domain}")
                history[name][-1] = _number(counted.samples if counted else 0)
            curves = {name: grokking.curve(np.array(rows)) for name, rows in history.items() if name not in _COUNTED}
            samples, answers = (np.array(history[name], float)[:, 0].astype(np.int64) for name in _COUNTED)
            so_far = History(
                steps=np.array(self._read_at),
                tokens=np.array(self._tokens),
                samples=samples,
                answers=answers,
                loss_seen=curves.pop("loss_seen"),
                left_out=curves.pop("left_out"),
                context=curves,
            )
            judged = grokking.phases(so_far, self.thresholds)
            verdicts[domain] = judged[-1]
            if last := [change for change in grokking.changes(judged) if change.verdict is judged[-1]]:
                changed[domain] = last[0]
        return verdicts, changed


_COUNTED = {"samples": "loss/panel_seen", "answers": "kernel/left_out"}
"""What counts the samples that a verdict rests on, and the tag whose samples they are."""

_JUDGED = {
    "loss_seen": "loss/panel_seen",
    "left_out": "kernel/left_out",
    "cosine": "pathway/cosine",
    "spread": "pathway/spread",
    "effective_rank": "kernel/effective_rank",
    "layer_cka": "pathway/layer_cka",
    "d_path_norm": "pathway/d_path_norm",
    "individuality": "pathway/individuality",
    "gap": "memorized/gap",
    "gap_heldout": "memorized/gap_heldout",
    "router_entropy": "",
    "load_cv": "",
    "samples": "",
    "answers": "",
}
"""What a verdict rests on or shows, and the tag it comes from; those without one come with the reading."""


def _row(estimate: Estimate | None) -> tuple[float, float, float]:
    return (math.nan, math.nan, math.nan) if estimate is None else (estimate.mean, estimate.low, estimate.high)


def _number(value: float | None) -> tuple[float, float, float]:
    return (math.nan if value is None else float(value), math.nan, math.nan)


def memorization_summary(monitor: PanelMonitor) -> dict[str, dict[str, object]]:
    """By domain, the paper's rule applied to the finished run: eps, the groups Pretrain@t*, and the online rule beside.

    ``eps`` is null where no threshold lets a fifth of the seen samples have an onset that is not censored.
    """
    found: dict[str, dict[str, object]] = {}
    for number, domain in enumerate(monitor.domains):
        steps, losses_ST = monitor.losses(number)
        if not losses_ST.size:
            continue
        tail = grokking.memorization.MIN_TAIL_IN_RUNS
        eps = grokking.choose_eps(losses_ST, min_tail=tail)
        entry: dict[str, object] = {
            "eps": eps,
            "samples": len(losses_ST),
            "readings": len(steps),
            "too_few": grokking.too_few(len(losses_ST), len(steps)),
        }
        if eps is not None:
            groups = grokking.memorized_groups(losses_ST, eps, min_tail=tail)
            agreement = grokking.online_agreement(losses_ST, eps, min_tail=tail)
            entry["groups"] = {str(int(steps[onset])): len(members) for onset, members in sorted(groups.items())}
            entry["online_agreement"] = agreement.share
        found[domain] = entry
    return found
