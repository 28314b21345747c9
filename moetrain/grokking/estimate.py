"""A value with its 95% interval: a mean by bootstrap over samples, any other statistic by jackknife.

Suffixes: R resamples, S samples.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import stats

from ._arrays import Arrayish, Floats, Ints, to_float64

RESAMPLES = 1000
GROUPS = 8  # of samples, for the jackknife
LEAST_SAMPLES = 3  # two samples make one pair: nothing to resample


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and the 2.5% and 97.5% points of its bootstrap over samples; or another statistic, see `jackknife`.

    `samples` and `pairs` count what went in; `pairs` is 0 where the mean is not over pairs. `low` and `high` are NaN
    below three samples, and all three are NaN where nothing went in.
    """

    mean: float
    low: float
    high: float
    samples: int
    pairs: int


def resample_indices(samples: int, rng: np.random.Generator) -> Ints:
    """[R, S] indices drawn with replacement."""
    return rng.integers(samples, size=(RESAMPLES, samples))


def resample_counts(samples: int, rng: np.random.Generator) -> Floats:
    """[R, S] how often each resample holds each sample; every row sums to S."""
    cells_RS = resample_indices(samples, rng) + samples * np.arange(RESAMPLES)[:, None]
    counts_RS = np.bincount(cells_RS.ravel(), minlength=RESAMPLES * samples).reshape(RESAMPLES, samples)
    return counts_RS.astype(np.float64)


def percentiles(replicates_R: Floats, samples: int) -> tuple[float, float]:
    """2.5% and 97.5% points. Resamples without a value (one sample drawn S times has no pairs) are left out."""
    defined = replicates_R[~np.isnan(replicates_R)]
    if samples < LEAST_SAMPLES or len(defined) == 0:
        return float("nan"), float("nan")
    low, high = np.percentile(defined, [2.5, 97.5])
    return float(low), float(high)


def mean_of_samples(values: Arrayish, seed: int = 0) -> Estimate:
    """Mean of per-sample values [S] with its interval; NaN values are left out and not counted in `samples`.

    Returns an Estimate in the unit of the values, with `pairs` 0; all NaN where no value is left.
    """
    values_S = to_float64(values).ravel()
    values_S = values_S[~np.isnan(values_S)]
    samples = len(values_S)
    if samples == 0:
        return Estimate(float("nan"), float("nan"), float("nan"), 0, 0)
    replicates_R = _resampled_means(values_S, np.random.default_rng(seed))
    return Estimate(float(values_S.mean()), *percentiles(replicates_R, samples), samples, 0)


def difference_of_means(a: Floats, b: Floats, seed: int = 0) -> Estimate:
    """mean(a) - mean(b) for two independent groups [S_a], [S_b], each resampled by itself.

    Returns an Estimate whose `samples` counts both groups; all NaN where a group is empty.
    """
    samples = len(a) + len(b)
    if len(a) == 0 or len(b) == 0:
        return Estimate(float("nan"), float("nan"), float("nan"), samples, 0)
    rng = np.random.default_rng(seed)
    replicates_R = _resampled_means(a, rng) - _resampled_means(b, rng)
    return Estimate(float(a.mean() - b.mean()), *percentiles(replicates_R, samples), samples, 0)


def share(right: int, of: int) -> Estimate:
    """A share of counted things with Wilson's 95% interval; all NaN of none."""
    if not of:
        return Estimate(float("nan"), float("nan"), float("nan"), 0, 0)
    between = stats.binomtest(right, of).proportion_ci(method="wilson")
    return Estimate(right / of, float(between.low), float(between.high), of, 0)


def jackknife(statistic: Callable[[Ints], float], samples: int, seed: int = 0) -> Estimate:
    """A statistic of a group of samples with its 95% interval by the delete-a-group jackknife (Shao and Tu 1995).

    The statistic is taken on the indices of all samples, and on those without each of eight drawn groups; how much the
    eight differ is its standard error, times Student's t of 7 degrees of freedom. Unlike a bootstrap this draws no
    sample twice, which would bias ranks and distances. `low` and `high` are NaN below 16 samples, or where the
    statistic of a part is; `pairs` is 0.
    """
    everything = np.arange(samples)
    value = statistic(everything)
    low = high = float("nan")
    if samples >= 2 * GROUPS:
        drawn = np.random.default_rng(seed).permutation(samples)
        parts_G = np.array([statistic(np.sort(np.delete(drawn, slice(g, None, GROUPS)))) for g in range(GROUPS)])
        error = float(np.sqrt((GROUPS - 1) / GROUPS * ((parts_G - parts_G.mean()) ** 2).sum()))
        reach = float(stats.t.ppf(0.975, GROUPS - 1)) * error
        low, high = value - reach, value + reach
    return Estimate(value, low, high, samples, 0)


def _resampled_means(values_S: Floats, rng: np.random.Generator) -> Floats:
    """[R] means of resamples; not by BLAS, whose last bits depend on the number of its threads."""
    return np.einsum("rs,s->r", resample_counts(len(values_S), rng), values_S) / len(values_S)
