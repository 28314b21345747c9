"""Correlation of two series of one run, three ways, because two series that merely trend correlate.

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
TIES = 1e-12  # correlations closer than this are equal but for rounding


@dataclass(frozen=True, slots=True)
class Correlation:
    """One correlation coefficient, -1 to 1, over `n` values, with its 95% interval and two-sided p.

    `note` is empty, "too few" (n below 8) or "constant" (a series does not vary); with a note all numbers are NaN.
    """

    value: float
    low: float
    high: float
    p: float
    n: int
    note: str


def correlate(x: Arrayish, y: Arrayish, tokens: Arrayish, seed: int = 0) -> dict[tuple[Series, Method], Correlation]:
    """Pearson and Spearman correlation of two series: raw, of first differences, of residuals on log tokens.

    x, y [T]: two quantities at the same readings of one run, in order of time; readings where either is not finite
    are left out, and differences are then taken between the readings that remain. tokens [T]: tokens trained on.
    Returns one Correlation for each of the six, keyed like ("raw", "spearman"). The interval resamples pairs of values
    in circular blocks of n^(1/3); p is the share of the n rotations of one series against the other, the true one
    among them, that correlate at least as strongly, so it is never below 1/n.
    Raises ValueError for series of unequal length and for tokens that are not positive and ascending.
    """
    x_T, y_T, tokens_T = (to_float64(series).ravel() for series in (x, y, tokens))
    if not len(x_T) == len(y_T) == len(tokens_T):
        raise ValueError(
            f"x, y, tokens have lengths {len(x_T)}, {len(y_T)}, {len(tokens_T)}: pass one of each a reading"
        )
    if not ((tokens_T > 0).all() and (np.diff(tokens_T) > 0).all() and np.isfinite(tokens_T).all()):
        raise ValueError("tokens are not positive and ascending: leave out the reading before step 1, sort by step")
    kept_T = np.isfinite(x_T) & np.isfinite(y_T)
    x_T, y_T, log_T = x_T[kept_T], y_T[kept_T], np.log(tokens_T[kept_T])
    series: dict[Series, tuple[Floats, Floats]] = {
        "raw": (_steady(x_T, x_T), _steady(y_T, y_T)),
        "differences": (_steady(np.diff(x_T), x_T), _steady(np.diff(y_T), y_T)),
        "residuals": (_steady(_residuals(x_T, log_T), x_T), _steady(_residuals(y_T, log_T), y_T)),
    }
    methods: tuple[Method, Method] = ("pearson", "spearman")
    return {(name, method): _correlation(*series[name], method, seed) for name in series for method in methods}


def first_above_chance(accuracies: Arrayish, chance: float, items: int, consecutive: int = 3) -> int | None:
    """First of `consecutive` readings whose accuracy exceeds chance by two standard errors, or None.

    accuracies [T] of a probe of `items` items; the standard error is that of the accuracy, sqrt(a (1 - a) / items).
    From this reading on correlations are taken. Raises ValueError for values outside [0, 1] and counts below 1.
    """
    accuracies_T = to_float64(accuracies).ravel()
    if not ((accuracies_T >= 0) & (accuracies_T <= 1)).all() or not 0 <= chance <= 1:
        raise ValueError("accuracies and chance must lie between 0 and 1: pass shares, not percentages or counts")
    if items < 1 or consecutive < 1:
        raise ValueError(f"items is {items} and consecutive {consecutive}: both must be 1 or more")
    errors_T = np.sqrt(accuracies_T * (1 - accuracies_T) / items)
    above_T = accuracies_T - 2 * errors_T > chance
    for t in range(len(above_T) - consecutive + 1):
        if above_T[t : t + consecutive].all():
            return t
    return None


def _correlation(x_T: Floats, y_T: Floats, method: Method, seed: int) -> Correlation:
    n = len(x_T)
    if n < LEAST_READINGS:
        return _without_value(n, "too few")
    if np.ptp(x_T) == 0 or np.ptp(y_T) == 0:
        return _without_value(n, "constant")
    coefficient = _spearman if method == "spearman" else _pearson
    value = float(coefficient(x_T[None], y_T[None])[0])
    rotations_KT = (np.arange(n) - np.arange(n)[:, None]) % n
    rotated_K = coefficient(x_T[None], y_T[rotations_KT])
    p = float((np.abs(rotated_K) >= abs(value) - TIES).mean())
    blocks_RT = _circular_blocks(n, np.random.default_rng(seed))
    low, high = percentiles(coefficient(x_T[blocks_RT], y_T[blocks_RT]), n)
    return Correlation(value, low, high, p, n, "")


def _without_value(n: int, note: str) -> Correlation:
    nan = float("nan")
    return Correlation(nan, nan, nan, nan, n, note)


def _pearson(x: Floats, y: Floats) -> Floats:
    """Pearson correlation along the last axis; NaN where a series is constant."""
    varies = (np.ptp(x, axis=-1) > 0) & (np.ptp(y, axis=-1) > 0)  # a rounded mean may not centre a constant to 0
    x = x - x.mean(axis=-1, keepdims=True)
    y = y - y.mean(axis=-1, keepdims=True)
    scale = np.sqrt((x * x).sum(axis=-1) * (y * y).sum(axis=-1))
    products = (x * y).sum(axis=-1)
    return np.clip(np.divide(products, scale, out=np.full(products.shape, np.nan), where=varies), -1, 1)


def _spearman(x: Floats, y: Floats) -> Floats:
    """Pearson correlation of mean ranks."""
    return _pearson(rankdata(x, axis=-1), rankdata(y, axis=-1))


def _circular_blocks(n: int, rng: np.random.Generator) -> np.ndarray:
    """[R, T] indices in blocks of consecutive readings, the last followed by the first."""
    length = int(np.ceil(n ** (1 / 3) - 1e-9))
    starts = rng.integers(n, size=(RESAMPLES, -(-n // length)))
    indices = (starts[:, :, None] + np.arange(length)) % n
    return indices.reshape(RESAMPLES, -1)[:, :n]


def _residuals(y_T: Floats, log_T: Floats) -> Floats:
    """What a straight line in log tokens leaves of a series."""
    if len(y_T) == 0:
        return y_T
    centred_T = log_T - log_T.mean()
    spread = centred_T @ centred_T
    slope = (centred_T @ y_T) / spread if spread > 0 else 0.0
    return y_T - y_T.mean() - slope * centred_T


def _steady(derived_T: Floats, source_T: Floats) -> Floats:
    """A series, made exactly constant where it varies by no more than the rounding of what it came from."""
    if len(derived_T) == 0 or np.ptp(derived_T) > 1e-12 * np.abs(source_T).max():
        return derived_T
    return np.zeros_like(derived_T)
