"""The metrics of one panel reading, from its stored, rounded values alone: live and in a later report the same.

Shapes: S samples of one cell, L layers, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from moetrain import grokking
from moetrain.grokking import Estimate
from moetrain.grokking.consistency import GuardedMedian
from moetrain.routing.panel import HELDOUT, SEEN, TO_COME
from moetrain.routing.store import StoredReading

LEAST_SAMPLES = 2  # fewer have no distance between them


def seen_members(stored: StoredReading, domain: str) -> np.ndarray:
    """Places of the panel samples of a domain that the run has trained on by this reading, int64.

    Samples whose routing is not finite are no members here.
    """
    return np.flatnonzero(_met(stored) & (stored.domain == domain))


def _met(stored: StoredReading) -> np.ndarray:
    met = (stored.cell == SEEN) & (stored.first_step > 0) & (stored.first_step <= stored.step)
    return met & stored.finite


def _finite(losses: np.ndarray) -> np.ndarray:
    """Those of some losses that are finite: the others count in no mean."""
    return losses[np.isfinite(losses)]


def distance_by_layer(stored: StoredReading, domain: str, tau: float) -> np.ndarray:
    """Normalised pathway distance of a domain's seen samples in each layer, [L]; NaN below two samples."""
    seen = seen_members(stored, domain)
    if len(seen) < LEAST_SAMPLES:
        return np.full(stored.even.shape[1], np.nan)
    return grokking.d_path_by_layer(stored.weights[seen], tau)


def dimension_by_layer(stored: StoredReading, domain: str) -> np.ndarray:
    """Effective dimension of each layer's routing kernel on a domain's seen samples, [L]; NaN below 64 samples."""
    seen = seen_members(stored, domain)
    if not len(seen):
        return np.full(stored.even.shape[1], np.nan)
    return grokking.d_eff_by_layer(stored.weights[seen])


def left_out_accuracy(stored: StoredReading, domain: str) -> Estimate:
    """`moetrain.grokking.left_out` of a domain's seen samples with marked answers; NaN where they are too few.

    A sample with an answer token whose routing is not finite is left out.
    """
    answers = stored.answers
    broken = answers.member[~np.isfinite(answers.weights).all((1, 2))]
    mine = np.isin(answers.member, np.setdiff1d(seen_members(stored, domain), broken))
    if not mine.any():
        return Estimate(math.nan, math.nan, math.nan, 0, 0)
    weights_ALE = answers.weights[mine].astype(np.float64)
    weights_ALE /= weights_ALE.sum(-1, keepdims=True)
    return grokking.left_out(weights_ALE, answers.member[mine], answers.place[mine], answers.token[mine])


def load_by_layer(stored: StoredReading) -> np.ndarray:
    """Tokens of the whole panel sent to each expert, over an even share, [L, E]."""
    counts_LE = stored.counts.sum(0, dtype=np.float64)
    return counts_LE / np.maximum(counts_LE.mean(-1, keepdims=True), 1)


def panel_metrics(stored: StoredReading, domains: Sequence[str], tau: float, steps: int) -> dict[str, Estimate]:
    """Every metric of a reading by TensorBoard tag; one that has no value at this reading is not there.

    Args:
        steps: steps of the run: `memorized/gap` is taken between its first and its last tenth.
    """
    weights = stored.weights
    found: dict[str, Estimate] = {}
    met = _met(stored)
    for domain in domains:
        own = (stored.domain == domain) & stored.finite
        seen = seen_members(stored, domain)
        cells = {"pathway_to_come": TO_COME, "pathway_heldout": HELDOUT}
        unmet = {tag: np.flatnonzero(own & (stored.cell == cell)) for tag, cell in cells.items()}
        to_come, heldout = unmet["pathway_to_come"], unmet["pathway_heldout"]
        losses = {"panel_seen": seen, "panel_to_come": to_come, "panel_heldout": heldout}
        for tag, members in losses.items():
            if len(members):
                found[f"loss/{tag}/{domain}"] = grokking.mean_of_samples(_finite(stored.loss[members]))
        if len(seen) >= LEAST_SAMPLES:
            others = np.flatnonzero(met & ~own & (stored.tokens == stored.tokens[seen[0]]))
            for name, estimate in _pathways(stored, weights, seen, others, tau).items():
                found[f"{name}/{domain}"] = estimate
            found[f"kernel/left_out/{domain}"] = left_out_accuracy(stored, domain)
            early, late = max(1, steps // 10), steps - max(1, steps // 10)
            if len(to_come) and early <= stored.step <= late:
                found[f"memorized/gap/{domain}"] = grokking.memorized_gap(
                    _finite(stored.loss[to_come]), _finite(stored.loss[seen])
                )
            if len(heldout):
                gap = grokking.memorized_gap(_finite(stored.loss[heldout]), _finite(stored.loss[seen]))
                found[f"memorized/gap_heldout/{domain}"] = gap
        for tag, members in unmet.items():
            if len(members) >= LEAST_SAMPLES:
                _, share = grokking.d_path_both(weights[members], tau)
                found[f"{tag}/d_path_norm/{domain}"] = share
                consistency = grokking.group_consistency(weights[members], stored.blocks)
                found[f"{tag}/cosine/{domain}"] = consistency.cosine
                found[f"{tag}/spread/{domain}"] = _jackknifed(grokking.spread, weights[members])
    return {tag: estimate for tag, estimate in found.items() if math.isfinite(estimate.mean)}


def _pathways(
    stored: StoredReading, weights: np.ndarray, seen: np.ndarray, others: np.ndarray, tau: float
) -> dict[str, Estimate]:
    """The pathway and kernel metrics of a domain's samples already seen, and their controls."""
    own_SLE = weights[seen]
    edits, share = grokking.d_path_both(own_SLE, tau)
    consistency = grokking.group_consistency(own_SLE, stored.blocks)
    even, odd = stored.halves
    both = seen[stored.tokens[seen] > 1]  # one token has no odd half
    found = {
        "pathway/d_path": edits,
        "pathway/d_path_norm": share,
        "pathway/spread": _jackknifed(grokking.spread, own_SLE),
        "pathway/layer_cka": _jackknifed(grokking.layer_cka, own_SLE),
        "pathway/cosine": consistency.cosine,
        "pathway/consistency": _median(consistency.consistency),
        "pathway/inconsistency": _median(consistency.inconsistency),
        "kernel/effective_rank": _jackknifed(grokking.effective_rank, own_SLE),
        "kernel/d_eff": grokking.d_eff_estimate(own_SLE),
    }
    if len(both) >= LEAST_SAMPLES:
        found["pathway/individuality"] = grokking.individuality(even[both], odd[both], tau)
    if stored.inputs.size:
        features_SLD = stored.inputs[seen].astype(np.float64)
        found["kernel/d_eff_linear"] = grokking.d_eff_estimate(own_SLE, features_SLD)
    if len(others) >= LEAST_SAMPLES:
        found["pathway/sharing"] = grokking.sharing(own_SLE, weights[others], tau)
    return found


def _jackknifed(statistic: Callable[[np.ndarray], float], weights_SLE: np.ndarray) -> Estimate:
    return grokking.jackknife(lambda which: statistic(weights_SLE[which]), len(weights_SLE))


def _median(median: GuardedMedian) -> Estimate:
    return Estimate(median.median, median.low, median.high, median.samples, 0)
