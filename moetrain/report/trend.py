"""A least-squares line through the readings of a run, with its interval."""

from __future__ import annotations

import numpy as np

LEAST_READINGS = 8
"""Below, no trend is drawn and nothing is correlated."""
Trend = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""x, the line at x, and the ends of its interval."""
_RESAMPLES = 1000
_PLACES = 40


def trend(x: np.ndarray, y: np.ndarray, seed: int = 0) -> Trend | None:
    """The least-squares line y of x [T] over the span of x, as (x, value, low, high), [40] each; None below 8 readings.

    Consecutive readings are correlated, so the 95% interval resamples circular blocks of n^(1/3) readings, in the given
    order. Readings without x or y are skipped.
    """
    known = np.isfinite(x) & np.isfinite(y)
    x, y = x[known], y[known]
    n = len(x)
    if n < LEAST_READINGS or np.ptp(x) == 0:
        return None
    at = np.linspace(x.min(), x.max(), _PLACES)
    length = int(np.ceil(n ** (1 / 3) - 1e-9))
    starts = np.random.default_rng(seed).integers(n, size=(_RESAMPLES, -(-n // length)))
    drawn = ((starts[:, :, None] + np.arange(length)) % n).reshape(_RESAMPLES, -1)[:, :n]
    low, high = np.nanpercentile(_lines(x[drawn], y[drawn], at), [2.5, 97.5], axis=0)
    return at, _lines(x[None], y[None], at)[0], low, high


def _lines(x_RT: np.ndarray, y_RT: np.ndarray, at: np.ndarray) -> np.ndarray:
    """The line through each row at given x, [R, places]; NaN where all x of a row are equal."""
    centre = x_RT.mean(1, keepdims=True)
    spread = ((x_RT - centre) ** 2).sum(1)
    products = ((x_RT - centre) * (y_RT - y_RT.mean(1, keepdims=True))).sum(1)
    slope = np.divide(products, spread, out=np.full(len(spread), np.nan), where=spread > 0)
    return y_RT.mean(1)[:, None] + slope[:, None] * (at - centre)
