"""Groups of samples by the reading at which they were memorized, and their routing and losses over a run.

Suffixes: S samples, T readings, L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from moetrain import grokking
from moetrain.grokking.memorization import MIN_TAIL_IN_RUNS
from moetrain.paper.results import PaperError
from moetrain.report.open_run import OpenedRun
from moetrain.routing.panel import SEEN

LEAST_GROUP = 8  # samples of a group that a curve is drawn of


@dataclass(frozen=True)
class Group:
    """Samples of one domain with one onset t*; `members` are rows of the domain's seen cell."""

    domain: str
    reading: int
    step: int
    members: np.ndarray

    @property
    def name(self) -> str:
        return f"memorized at {self.step:,}"


class DomainSamples:
    """The panel samples of one cell of one domain, with their routing and losses at all readings.

    Samples whose routing or loss is not finite at some reading are left out of all of them, and counted in `broken`.

    Args:
        run: the run, or a replay.
        domain: one of its domains.
        cell: of the panel.
    """

    def __init__(self, run: OpenedRun, domain: str, cell: int = SEEN) -> None:
        self.run, self.domain = run, domain
        self.steps = np.array(run.reading_steps)
        readings = [run.reading(step) for step in run.reading_steps]
        chosen = [np.flatnonzero((each.domain == domain) & (each.cell == cell)) for each in readings]
        finite = np.ones(len(chosen[-1]) if chosen else 0, bool)
        for each, own in zip(readings, chosen, strict=True):
            finite &= each.finite[own] & np.isfinite(each.loss[own])
        self.broken = int((~finite).sum())
        self.weights = [each.weights[own[finite]] for each, own in zip(readings, chosen, strict=True)]
        self.blocks = [each.blocks for each in readings]
        self.tokens = readings[-1].tokens[chosen[-1][finite]] if readings else np.zeros(0, np.int32)
        self.documents = readings[-1].document[chosen[-1][finite]] if readings else np.zeros(0, np.uint64)
        self.losses_ST = (
            np.stack([each.loss[own[finite]] for each, own in zip(readings, chosen, strict=True)], 1).astype(float)
            if readings
            else np.zeros((0, 0))
        )

    def __len__(self) -> int:
        return len(self.losses_ST)

    def routing(self, members: np.ndarray) -> list[np.ndarray]:
        """[S, L, E] of some samples at each reading."""
        return [weights[members] for weights in self.weights]

    @property
    def delta(self) -> float:
        return float(self.run.setting("panel.delta"))

    @cached_property
    def eps(self) -> float | None:
        """eps by the paper's rule: the least on a 0.1 grid that counts a fifth of the samples; None without one."""
        if not len(self):
            return None
        return grokking.choose_eps(self.losses_ST, delta=self.delta, min_tail=MIN_TAIL_IN_RUNS)

    def onsets(self, eps: float | None = None, delta: float | None = None) -> np.ndarray:
        """[S] the reading at which each sample is memorized, -1 for those that are not."""
        eps = self.eps if eps is None else eps
        if eps is None or not len(self):
            return np.full(len(self), -1)
        return grokking.memorized_onsets(self.losses_ST, eps, self.delta if delta is None else delta, MIN_TAIL_IN_RUNS)

    def groups(self, eps: float | None = None, delta: float | None = None) -> list[Group]:
        """All groups, by onset."""
        onsets_S = self.onsets(eps, delta)
        return [
            Group(self.domain, int(t), int(self.steps[t]), np.flatnonzero(onsets_S == t))
            for t in np.unique(onsets_S)
            if t >= 0
        ]

    def early_groups(self, count: int = 2, eps: float | None = None, delta: float | None = None) -> list[Group]:
        """The earliest groups that are large enough for a curve, or the largest where none is.

        The paper looks at early groups, because most readings follow them.
        """
        found = self.groups(eps, delta)
        large = [group for group in found if len(group.members) >= LEAST_GROUP]
        if not large and found:
            largest = max(found, key=lambda group: len(group.members))
            large = [largest] if len(largest.members) > 1 else []
        return large[:count]


def samples_of(run: OpenedRun, domains: Sequence[str] | None = None) -> list[DomainSamples]:
    """The seen samples of some domains (all of them where None), those without samples left out.

    Raises:
        PaperError: fewer than two readings, or no samples.
    """
    if len(run.reading_steps) < 2:
        raise PaperError(
            f"{run.path}: {len(run.reading_steps)} readings of the panel: at least 2 are needed, see panel.readings, "
            "or replay a run that kept its checkpoints (train.keep_every)"
        )
    for domain in domains or ():
        if domain not in run.domains:
            raise PaperError(f"--domain {domain}: the domains are {', '.join(run.domains)}")
    found = [DomainSamples(run, domain) for domain in domains or run.domains]
    found = [samples for samples in found if len(samples) > 1]
    if not found:
        raise PaperError(f"{run.path}: no domain has two panel samples that the run trains on")
    return found
