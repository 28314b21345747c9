"""Correlation of two series of one run: raw, of first differences and of residuals, because any two trends correlate.

Suffixes: T readings in order of time, R resamples, K rotations.
"""

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from scipy.stats import rankdata

from ._arrays import Arrayish, Floats, to_float64
from .estimate import RESAMPLES, percentiles

Series: TypeAlias = Literal["raw", "differences", "residuals"]
Method: TypeAlias = Literal["pearson", "spearman"]

LEAST_READINGS = 8
TIES = 1e-12  # two correlations closer than this count as equal


@dataclass(frozen=True, slots=True)
class Correlation:
    """A correlation coefficient, -1 to 1, of `n` pairs of values, with its 95% interval and two-sided p.

    `note` is empty, "too few" (n below 8) or "constant" (a series does not vary); with a note all numbers are NaN.
    """

    value: float
    low: float
    high: float
    p: float
    n: int
    note: str


def correlate(x: Arrayish, y: Arrayish, tokens: Arrayish, seed: int = 0) -> dict[tuple[Series, Method], Correlation]:
    """Pearson and Spearman correlation of two series: raw, first differences, and residuals on log tokens.

    The interval resamples circular blocks of n^(1/3) consecutive readings. p is the share of the n rotations of one
    series against the other, including none, that correlate at least as strongly; so it is never below 1/n.

    Args:
        x, y: [T] two quantities at the same readings of one run, in order of time. Readings where either is not finite
            are excluded first; differences are taken between the remaining ones.
        tokens: [T] tokens trained on.

    Returns:
        One Correlation for each of the six, keyed like ("raw", "spearman").

    Raises:
        ValueError: unequal lengths, or tokens that are not positive and ascending.
    """
    x_T, y_T, tokens_T = (to_float64(series).ravel() for series in (x, y, tokens))
    if not len(x_T) == len(y_T) == len(tokens_T):
        raise ValueError(
            f"x, y, tokens have lengths {len(x_T)}, {len(y_T)}, {len(tokens_T)}: pass one of each per reading"
        )
    if not ((tokens_T > 0).all() and (np.diff(tokens_T) > 0).all() and np.isfinite(tokens_T).all()):
        raise ValueError("tokens are not positive and ascending: exclude the reading before step 1, sort by step")
    finite_T = np.isfinite(x_T) & np.isfinite(y_T)
    x_T, y_T, log_T = x_T[finite_T], y_T[finite_T], np.log(tokens_T[finite_T])
    series: dict[Series, tuple[Floats, Floats]] = {
        "raw": (_without_rounding(x_T, x_T), _without_rounding(y_T, y_T)),
        "differences": (_without_rounding(np.diff(x_T), x_T), _without_rounding(np.diff(y_T), y_T)),
        "residuals": (
            _without_rounding(_residuals(x_T, log_T), x_T),
            _without_rounding(_residuals(y_T, log_T), y_T),
        ),
    }
    methods: tuple[Method, Method] = ("pearson", "spearman")
    return {(name, method): _correlation(*series[name], method, seed) for name in series for method in methods}


def first_above_chance(accuracies: Arrayish, chance: float, items: int, consecutive: int = 3) -> int | None:
    """First of `consecutive` readings whose accuracy exceeds chance by two standard errors, or None.

    Correlations are taken from this reading on. The standard error is sqrt(a (1 - a) / items).

    Args:
        accuracies: [T] of a probe task with `items` items.

    Raises:
        ValueError: values outside [0, 1], or counts below 1.
    """
    accuracies_T = to_float64(accuracies).ravel()
    if not ((accuracies_T >= 0) & (accuracies_T <= 1)).all() or not 0 <= chance <= 1:
        raise ValueError("accuracies and chance must lie between 0 and 1: pass shares, not percentages or counts")
    if items < 1 or consecutive < 1:
        raise ValueError(f"items is {items} and consecutive {consecutive}: both must be 1 or more")
    errors_T = np.sqrt(accuracies_T * (1 - accuracies_T) / items)
    above_T = accuracies_T - 2 * errors_T > chance
    starts = range(len(above_T) - consecutive + 1)
    return next((t for t in starts if above_T[t : t + consecutive].all()), None)


def _correlation(x_T: Floats, y_T: Floats, method: Method, seed: int) -> Correlation:
    n = len(x_T)
    note = "too few" if n < LEAST_READINGS else "constant" if np.ptp(x_T) == 0 or np.ptp(y_T) == 0 else ""
    if note:
        nan = float("nan")
        return Correlation(nan, nan, nan, nan, n, note)
    coefficient = _spearman if method == "spearman" else _pearson
    value = float(coefficient(x_T[None], y_T[None])[0])
    rotations_KT = (np.arange(n) - np.arange(n)[:, None]) % n
    rotated_K = coefficient(x_T[None], y_T[rotations_KT])
    p = float((np.abs(rotated_K) >= abs(value) - TIES).mean())
    blocks_RT = _circular_blocks(n, np.random.default_rng(seed))
    low, high = percentiles(coefficient(x_T[blocks_RT], y_T[blocks_RT]), n)
    return Correlation(value, low, high, p, n, "")


def _pearson(x: Floats, y: Floats) -> Floats:
    """Pearson correlation along the last axis; NaN where a series is constant."""
    varies = (np.ptp(x, axis=-1) > 0) & (np.ptp(y, axis=-1) > 0)  # subtracting a rounded mean may not give exactly 0
    x = x - x.mean(axis=-1, keepdims=True)
    y = y - y.mean(axis=-1, keepdims=True)
    scale = np.sqrt((x * x).sum(axis=-1) * (y * y).sum(axis=-1))
    products = (x * y).sum(axis=-1)
    return np.clip(np.divide(products, scale, out=np.full(products.shape, np.nan), where=varies), -1, 1)


def _spearman(x: Floats, y: Floats) -> Floats:
    """Pearson correlation of ranks; ties have their mean rank."""
    return _pearson(rankdata(x, axis=-1), rankdata(y, axis=-1))


def _circular_blocks(n: int, rng: np.random.Generator) -> np.ndarray:
    """[R, T] indices of resamples, in blocks of consecutive readings; the first reading follows the last."""
    length = int(np.ceil(n ** (1 / 3) - 1e-9))
    starts = rng.integers(n, size=(RESAMPLES, -(-n // length)))
    indices = (starts[:, :, None] + np.arange(length)) % n
    return indices.reshape(RESAMPLES, -1)[:, :n]


def _residuals(y_T: Floats, log_T: Floats) -> Floats:
    """Residuals of a least-squares line in log tokens."""
    if len(y_T) == 0:
        return y_T
    centred_T = log_T - log_T.mean()
    spread = centred_T @ centred_T
    slope = (centred_T @ y_T) / spread if spread > 0 else 0.0
    return y_T - y_T.mean() - slope * centred_T


def _without_rounding(derived_T: Floats, source_T: Floats) -> Floats:
    """`derived_T`, or zeros where it varies by no more than the rounding error of `source_T`, which it comes from."""
    if len(derived_T) == 0 or np.ptp(derived_T) > 1e-12 * np.abs(source_T).max():
        return derived_T
    return np.zeros_like(derived_T)
