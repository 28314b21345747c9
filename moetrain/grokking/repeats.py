"""What another pass over a domain's texts is worth, and after how many passes it stops paying (ours).

The fall of the loss of unseen texts per token of a pass is compared with that per token of fresh text of the same
domain, at the same weights: both are first-order changes along the optimizer's direction. Suffixes: S repeated samples,
F fresh samples, T readings.
"""

import math

import numpy as np

from ._arrays import Arrayish, Floats, to_float64
from .documents import mean_over_documents
from .estimate import Estimate

HALF = 0.5
"""The worth of the next pass whose passes are forecast."""
_LEAST_ERROR = 0.05  # of a worth in the fit: no reading decides alone
_PASSES = np.geomspace(0.1, 1e4, 801)
"""Candidates of the passes after which a worth has fallen to exp(-1)."""
_CHI_SQUARE_95 = 3.841459


def repeat_worth(
    repeated: Arrayish, fresh: Arrayish, repeated_documents: np.ndarray, fresh_documents: np.ndarray
) -> Estimate:
    """What a token of repeated text does for unseen text, relative to a token of fresh text of the same domain.

    Args:
        repeated: [S] fall of the loss of unseen text caused by training on each repeated sample, to first order.
        fresh: [F] likewise for samples that were not trained on, at the same weights.
        repeated_documents: [S] ids of their documents.
        fresh_documents: [F] likewise.

    Returns:
        The ratio of the means: 1 as good as fresh text, 0 worthless, below 0 harmful. Its interval is over documents,
        which ``samples`` counts. Undefined where fresh text itself has no effect that its interval tells from 0.

    Raises:
        ValueError: arrays of different lengths, or not finite.
    """
    over, under = mean_over_documents(repeated, repeated_documents), mean_over_documents(fresh, fresh_documents)
    documents = over.samples + under.samples
    if not (math.isfinite(over.low) and under.low > 0):
        return Estimate.undefined(documents)
    worth = over.mean / under.mean
    half = math.hypot(over.high - over.mean, worth * (under.high - under.mean)) / under.mean
    return Estimate(worth, worth - half, worth + half, documents, 0)


def repeat_budget(passes: Arrayish, worth: Arrayish, error: Arrayish, level: float = HALF) -> Estimate:
    """The passes after which the next one is worth ``level`` of fresh text, from the readings so far.

    The worth after n passes is taken to be exp(-(n / P) ** 2); P is fitted by weighted least squares. The interval
    holds all P that fit the readings by chi square.

    Args:
        passes: [T] passes made at each reading.
        worth: [T] `repeat_worth` at each reading; NaN where there is none.
        error: [T] half widths of its 95% intervals.
        level: between 0 and 1.

    Returns:
        The passes; ``samples`` counts readings. ``high`` is infinite where the readings do not tell the worth from 1
        yet. Undefined below two readings.

    Raises:
        ValueError: arrays of different lengths, or a level outside (0, 1).
    """
    passes_T, worth_T, error_T = (to_float64(each).ravel() for each in (passes, worth, error))
    if not len(passes_T) == len(worth_T) == len(error_T):
        raise ValueError(f"{len(passes_T)} passes, {len(worth_T)} worths, {len(error_T)} errors: give one of each")
    if not 0 < level < 1:
        raise ValueError(f"level is {level}: a worth between 0 and 1")
    known_T = np.isfinite(passes_T) & np.isfinite(worth_T) & np.isfinite(error_T)
    passes_T, worth_T, error_T = passes_T[known_T], worth_T[known_T], error_T[known_T]
    if len(passes_T) < 2:
        return Estimate.undefined(len(passes_T))
    deviation_T = np.maximum(error_T / 1.96, _LEAST_ERROR)
    chi_P = _chi_square(passes_T, worth_T, deviation_T)
    best = int(chi_P.argmin())
    # Readings that scatter more than their errors say widen the interval.
    scatter = max(1.0, float(chi_P[best]) / max(1, len(passes_T) - 1))
    within = np.flatnonzero(chi_P - chi_P[best] <= _CHI_SQUARE_95 * scatter)
    factor = math.sqrt(-math.log(level))
    high = math.inf if within[-1] == len(_PASSES) - 1 else float(_PASSES[within[-1]]) * factor
    value = math.inf if best == len(_PASSES) - 1 else float(_PASSES[best]) * factor
    return Estimate(value, float(_PASSES[within[0]]) * factor, high, len(passes_T), 0)


def _chi_square(passes_T: Floats, worth_T: Floats, deviation_T: Floats) -> Floats:
    """The misfit of each candidate of P."""
    expected_PT = np.exp(-((passes_T / _PASSES[:, None]) ** 2))
    return (((worth_T - expected_PT) / deviation_T) ** 2).sum(1)
