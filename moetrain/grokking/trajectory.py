"""A quantity of the same samples over the readings of a run, with the fits that the paper draws through it.

Every reading is resampled alike: a resample draws samples, and takes their values at all readings. So a difference
between readings, or the slope of a fit, has an interval over samples. It says how far other samples of the same run
could differ, not other runs. Suffixes: T readings, R resamples, S samples, L MoE layers, E experts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from ._arrays import Arrayish, Floats, to_float64
from ._pairs import generators
from .consistency import LEAST_MAXIMUM, RowsOrBlocks, inconsistency, max_cosine
from .estimate import Estimate, percentiles, resample_counts, resample_indices
from .pathway import distances_within

LEAST_FIT = 3  # readings that a line is fitted through
LEAST_QUADRATIC = 4


@dataclass(frozen=True)
class Trajectory:
    """Values at the readings, and those of each resample of the samples.

    `pairs` is 0 where the value is not over pairs.
    """

    values: Floats  # [T]
    replicates: Floats  # [R, T]
    samples: int
    pairs: int

    def estimates(self) -> list[Estimate]:
        """The value at each reading with its interval over samples."""
        ends = [percentiles(column, self.samples) for column in self.replicates.T]
        return [
            Estimate(float(value), *end, self.samples, self.pairs) for value, end in zip(self.values, ends, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class Fit:
    """A polynomial through the readings from `first` on, highest power first, and the slope of a line through them.

    `slope` is per unit of the given times, with its interval over samples. `low_over_readings` and
    `high_over_readings` are Student's 95% interval of a least-squares slope, which takes the readings as independent:
    those of one run are not, so it is too narrow. `relative` is the change of the line over its readings, divided by
    its value at the first.
    """

    coefficients: tuple[float, ...]
    first: int
    readings: int
    slope: Estimate
    low_over_readings: float
    high_over_readings: float
    relative: float
    r2: float  # of the polynomial

    def at(self, times: Arrayish) -> Floats:
        """The polynomial at given times."""
        return np.asarray(np.polyval(self.coefficients, to_float64(times)), dtype=np.float64)


def distance_trajectory(
    readings: Sequence[Arrayish],
    tau: float = 0.7,
    normalized: bool = False,
    max_pairs: int | None = None,
    seed: int = 0,
) -> Trajectory:
    """`d_path` of the same samples at each reading [S, L, E], over the same pairs, with common resamples.

    Raises:
        ValueError: as `d_path`; no reading, or readings of different numbers of samples.
    """
    samples = _common_samples(readings)
    counts_RS = resample_counts(samples, generators(seed)[1])
    values, replicates, pairs = [], [], 0
    for weights in readings:
        distances = distances_within(weights, tau, max_pairs, seed)
        distances = distances.normalized() if normalized else distances
        values.append(distances.mean())
        replicates.append(distances.resampled_means(counts_RS, counts_RS))
        pairs = len(distances.distances)
    return Trajectory(np.array(values), np.stack(replicates, axis=1), samples, pairs)


def inconsistency_trajectory(readings: Sequence[Arrayish], blocks: Sequence[RowsOrBlocks], seed: int = 0) -> Trajectory:
    """The guarded median of the paper's C_i over the same samples at each reading; see `guarded_median`.

    Args:
        readings: [S, L, E] each.
        blocks: router rows, or their Gram blocks, at each reading.

    Raises:
        ValueError: as `inconsistency`; no reading, or readings of different numbers of samples.
    """
    _common_samples(readings)
    found = []
    for weights, own in zip(readings, blocks, strict=True):
        values_S, maxima_S = inconsistency(weights, own), max_cosine(weights, own)
        found.append(np.where(maxima_S > LEAST_MAXIMUM, values_S, np.nan))
    return statistic_trajectory(np.stack(found, axis=1), _median, seed)


def statistic_trajectory(
    values: Arrayish, statistic: Callable[[Floats, int], Floats] | None = None, seed: int = 0
) -> Trajectory:
    """A statistic over samples at each reading, from values [S, T]; NaN is left out of it.

    Args:
        statistic: of values along an axis; None takes the mean.
    """
    values_ST = to_float64(values)
    chosen = statistic or _mean
    indices_RS = resample_indices(len(values_ST), np.random.default_rng(seed))
    replicates = [chosen(column[indices_RS], 1) for column in values_ST.T]
    return Trajectory(chosen(values_ST, 0), np.stack(replicates, axis=1), len(values_ST), 0)


def fit(times: Arrayish, trajectory: Trajectory, first: int = 0, degree: int = 1) -> Fit | None:
    """A least-squares polynomial through the readings from `first` on; None where they are too few.

    The paper draws a quadratic through all readings, and a trend through those after a group is memorized. Too few are
    fewer than three readings for a line, four for a quadratic.

    Args:
        times: [T], steps or tokens, ascending.
        degree: 1 or 2.
    """
    times_T, values_T = to_float64(times)[first:], trajectory.values[first:]
    known_T = np.isfinite(values_T)
    if known_T.sum() < (LEAST_FIT if degree == 1 else LEAST_QUADRATIC):
        return None
    x, y = times_T[known_T], values_T[known_T]
    coefficients = np.polyfit(x, y, degree)
    residual, total = ((y - np.polyval(coefficients, x)) ** 2).sum(), ((y - y.mean()) ** 2).sum()
    line = stats.linregress(x, y)
    half = stats.t.ppf(0.975, len(x) - 2) * line.stderr
    centred = x - x.mean()
    slopes_R = trajectory.replicates[:, first:][:, known_T] @ centred / (centred @ centred)
    start = line.intercept + line.slope * x[0]
    return Fit(
        coefficients=tuple(float(each) for each in coefficients),
        first=first,
        readings=len(x),
        slope=Estimate(float(line.slope), *percentiles(slopes_R, trajectory.samples), trajectory.samples, 0),
        low_over_readings=float(line.slope - half),
        high_over_readings=float(line.slope + half),
        relative=float(line.slope * (x[-1] - x[0]) / start) if start else float("nan"),
        r2=float(1 - residual / total) if total > 0 else float("nan"),
    )


def _common_samples(readings: Sequence[Arrayish]) -> int:
    counts = {len(to_float64(weights)) for weights in readings}
    if len(counts) != 1:
        raise ValueError(f"readings have {sorted(counts) or 'no'} samples: pass the same samples at each of them")
    return counts.pop()


def _mean(values: Floats, axis: int) -> Floats:
    known = ~np.isnan(values)
    count = known.sum(axis)
    sums = np.where(known, values, 0.0).sum(axis)
    return np.divide(sums, count, out=np.full(np.shape(sums), np.nan), where=count > 0)


def _median(values: Floats, axis: int) -> Floats:
    empty = np.isnan(values).all(axis)
    filled = np.where(np.expand_dims(empty, axis), 0.0, values)
    return np.where(empty, np.nan, np.nanmedian(filled, axis=axis))
