"""The order of samples in a stream whose data changed while the run went on: in stages, no sample twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moetrain.config import DataSettings, MixturePhase
from moetrain.data.errors import DataError
from moetrain.data.mixture import order_by_size, order_by_weights
from moetrain.data.packing import Samples

Phases = list[tuple[int, list[float]]]
"""(first token of the stream, weight of each domain by number) of each phase of a mixture by weights."""


@dataclass(frozen=True)
class Stage:
    """What the stream holds from step ``begin`` on.

    Attributes:
        begin: steps before the stage.
        planned: steps that the run was to have in this stage; None in the last, whose run is under way.
        domains: by number, those that the stage draws from.
        phases: empty where domains are mixed by their size.
        stops: after how many steps the repeats of which domains were left out, in this stage.
    """

    begin: int
    planned: int | None
    domains: tuple[int, ...]
    phases: Phases
    stops: tuple[tuple[int, list[int]], ...] = ()

    def mixes_as(self, other: Stage) -> bool:
        """Whether the same domains are mixed alike, so that the stream simply goes on."""
        return (self.domains, self.phases) == (other.domains, other.phases)


def stages(data: DataSettings) -> list[Stage]:
    """The stages of a run, in order; a run that never went on from a checkpoint has one."""
    names = list(data.domains)
    found = []
    begin = 0
    for each in data.earlier:
        phases = _phases(names, each.weights, each.phases) if each.mixture == "weights" else []
        numbers = tuple(names.index(name) for name in each.domains)
        found.append(Stage(begin, each.planned, numbers, phases, tuple(each.stops)))
        begin = each.steps
    weights = {name: float(domain.weight or 0) for name, domain in data.domains.items()}
    phases = _phases(names, weights, data.phases) if data.mixture == "weights" else []
    return [*found, Stage(begin, None, tuple(range(len(names))), phases)]


def stage_order(
    samples: Samples, taken: np.ndarray, stage: Stage, names: Sequence[str], seed: int, within: Sequence[float]
) -> np.ndarray:
    """The order of a stage's samples, without those that earlier stages trained on, int64.

    Args:
        taken: samples that were trained on.
        names: of the domains, by number.
        within: per domain, as for `moetrain.data.mixture.order_by_size`.

    Raises:
        DataError: a domain with a weight has no text left.
    """
    left = np.isin(samples.domain, stage.domains)
    left[taken] = False
    members = np.flatnonzero(left)
    rest = samples if len(members) == len(samples) else samples.take(members)
    if not stage.phases:
        return members[order_by_size(rest, seed, within)]
    phases = _after(stage.phases, int(samples.row_lengths[taken].sum()))
    for number in stage.domains:
        if any(weights[number] for _, weights in phases) and not (rest.domain == number).any():
            raise DataError(
                f"data.domains.{names[number]}: the run has trained on all of its text, so it cannot have a weight: "
                "leave it out by data.phases, or set data.mixture=by_size"
            )
    return members[order_by_weights(rest, phases, seed, within)]


def _phases(names: Sequence[str], first: dict[str, float], later: Sequence[MixturePhase]) -> Phases:
    rows = [(0, first), *((phase.from_tokens, phase.weights) for phase in later)]
    return [(start, [weights.get(name, 0.0) for name in names]) for start, weights in rows]


def _after(phases: Phases, tokens: int) -> Phases:
    """The phases of a stream from a token on, which is the first of what is left."""
    (current,) = [weights for start, weights in phases if start <= tokens][-1:]
    return [(0, current), *((start - tokens, weights) for start, weights in phases if start > tokens)]
