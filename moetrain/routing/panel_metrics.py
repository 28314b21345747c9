"""The metrics of one panel reading, computed from its stored, rounded values, so that a later report gives the same."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from moetrain.grokking import Estimate
from moetrain.metrics import table
from moetrain.metrics.cell import HELDOUT, SEEN, TO_COME, UNSEEN, AnswerTokens, Cell, CellName
from moetrain.metrics.metric import Metric
from moetrain.routing.panel import CELLS
from moetrain.routing.store import StoredReading

Cells = Mapping[CellName, Cell]
"""The cells of one domain, by name."""


def panel_cells(stored: StoredReading, domain: str, tau: float, steps: int, max_pairs: int | None = None) -> Cells:
    """The cells of a domain at a reading. Samples whose routing is not finite are in none of them.

    The seen cell holds the samples that the run has trained on by this reading; before that they are in no cell. The
    unseen cell holds held-out samples, and those samples to come that it has not trained on by this reading.

    Args:
        tau: share of the routing weight that a pathway covers.
        steps: steps of the run: `memorized/gap` is taken between its first and its last tenth.
        max_pairs: of samples that a mean distance is taken over; None: all.
    """
    own = (stored.domain == domain) & stored.finite
    trained_on = stored.finite & (stored.cell == CELLS.index(SEEN))
    trained_on &= (stored.first_step > 0) & (stored.first_step <= stored.step)
    members = {name: own & (stored.cell == CELLS.index(name)) for name in (TO_COME, HELDOUT)}
    members[UNSEEN] = members[HELDOUT] | members[TO_COME] & (stored.first_step > stored.step)
    given = tau, max_pairs, steps
    peers = {name: _cell(name, stored, chosen, *given) for name, chosen in members.items()}
    seen = _cell(SEEN, stored, own & trained_on, *given)
    if len(seen):
        foreign = trained_on & ~own & (stored.tokens == seen.tokens[0])
        answers = _answers(stored, np.flatnonzero(own & trained_on))
        others = {"foreign": stored.weights[foreign], "foreign_texts": stored.document[foreign]}
        seen = replace(seen, answers=answers, peers=peers, **others)
    return {SEEN: seen, **peers}


def _cell(
    name: CellName, stored: StoredReading, chosen: np.ndarray, tau: float, max_pairs: int | None, steps: int
) -> Cell:
    even, odd = stored.halves
    losses = stored.loss[chosen]
    known = np.isfinite(losses)
    return Cell(
        name=name,
        weights=stored.weights[chosen],
        blocks=stored.blocks,
        tau=tau,
        max_pairs=max_pairs,
        losses=losses[known],
        documents=stored.document[chosen][known],
        initial=stored.initial[chosen][known],
        difficulty=stored.difficulty[chosen][known],
        claims=np.stack([stored.claim_gain, stored.claim])[:, chosen][:, known],
        texts=stored.document[chosen],
        tokens=stored.tokens[chosen],
        even=even[chosen],
        odd=odd[chosen],
        inputs=stored.inputs[chosen],
        step=stored.step,
        steps=steps,
    )


def _answers(stored: StoredReading, members: np.ndarray) -> AnswerTokens | None:
    """Answer tokens of some samples; a sample with a token whose routing is not finite is dropped."""
    answers = stored.answers
    broken = answers.member[~np.isfinite(answers.weights).all((1, 2))]
    chosen = np.isin(answers.member, np.setdiff1d(members, broken))
    if not chosen.any():
        return None
    weights_ALE = answers.weights[chosen].astype(np.float64)
    weights_ALE /= weights_ALE.sum(-1, keepdims=True)
    return AnswerTokens(weights_ALE, answers.member[chosen], answers.place[chosen], answers.token[chosen])


def metrics_of(cells: Mapping[str, Cells], rows: Iterable[Metric] | None = None) -> dict[str, Estimate]:
    """The metrics of each domain's cells by TensorBoard tag; a metric without a finite value is not there.

    Args:
        cells: per domain.
        rows: of the table; all of them where None.
    """
    listed = list(table.METRICS if rows is None else rows)
    found: dict[str, Estimate] = {}
    for domain, by_name in cells.items():
        for name, cell in by_name.items():
            for metric in listed:
                estimate = metric.value(cell)
                if estimate is not None and math.isfinite(estimate.mean):
                    found[f"{metric.tag_on(name)}/{domain}"] = estimate
    return found


def panel_metrics(
    stored: StoredReading,
    domains: Sequence[str],
    tau: float,
    steps: int,
    rows: Iterable[Metric] | None = None,
    max_pairs: int | None = None,
) -> dict[str, Estimate]:
    """The metrics of a reading by TensorBoard tag; arguments as `panel_cells` and `metrics_of`."""
    return metrics_of({domain: panel_cells(stored, domain, tau, steps, max_pairs) for domain in domains}, rows)


def expert_load(stored: StoredReading) -> np.ndarray:
    """Tokens of the panel sent to each expert, relative to an even share, [L, E]."""
    counts_LE = stored.counts.sum(0, dtype=np.float64)
    return counts_LE / np.maximum(counts_LE.mean(-1, keepdims=True), 1)


def expert_load_by_domain(stored: StoredReading, domains: Sequence[str]) -> np.ndarray:
    """Share of each domain's panel tokens sent to each expert, relative to an even share, [domains, L * E]."""
    rows = []
    for domain in domains:
        counts_LE = stored.counts[stored.domain == domain].sum(0, dtype=np.float64)
        rows.append((counts_LE / np.maximum(counts_LE.sum(-1, keepdims=True), 1) * counts_LE.shape[-1]).ravel())
    return np.stack(rows)
