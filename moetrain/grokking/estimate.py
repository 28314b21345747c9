"""Estimates with 95% intervals: bootstrap over samples, Wilson's interval, delete-a-group jackknife.

Suffixes: R resamples, S samples, G groups of samples.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import stats

from ._arrays import Arrayish, Floats, Ints, to_float64

RESAMPLES = 1000
GROUPS = 8  # of the jackknife
LEAST_SAMPLES = 3  # fewer give no bootstrap interval: two samples make a single pair


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its 95% interval and the numbers of samples and pairs that it was computed from.

    `mean` is a mean or another statistic of the group. `pairs` is 0 where the mean is not over pairs. `low` and `high`
    are NaN where there are too few samples for an interval; all three are NaN where nothing could be computed.
    """

    mean: float
    low: float
    high: float
    samples: int
    pairs: int

    @classmethod
    def undefined(cls, samples: int = 0) -> "Estimate":
        """An estimate without a value."""
        return cls(float("nan"), float("nan"), float("nan"), samples, 0)


def resample_indices(samples: int, rng: np.random.Generator) -> Ints:
    """[R, S] indices drawn with replacement."""
    return rng.integers(samples, size=(RESAMPLES, samples))


def document_numbers(documents: np.ndarray | None, samples: int) -> Ints:
    """[S] number of each sample's document, in order of first occurrence; None: each sample is a document.

    Raises:
        ValueError: not one document per sample.
    """
    if documents is None:
        return np.arange(samples)
    documents_S = np.asarray(documents).ravel()
    if len(documents_S) != samples:
        raise ValueError(f"{len(documents_S)} documents for {samples} samples: pass the document of each sample")
    _, first, number_S = np.unique(documents_S, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first, kind="stable"), kind="stable")[number_S]


def resample_counts(samples: int, rng: np.random.Generator, documents: np.ndarray | None = None) -> Floats:
    """[R, S] number of times that each sample occurs in each resample; every row sums to S.

    With ``documents`` [S] whole documents are drawn, as many as there are, and rows sum to S on average.
    """
    if documents is not None:
        number_S = document_numbers(documents, samples)
        return resample_counts(int(number_S.max(initial=-1)) + 1, rng)[:, number_S]
    cells_RS = resample_indices(samples, rng) + samples * np.arange(RESAMPLES)[:, None]
    counts_RS = np.bincount(cells_RS.ravel(), minlength=RESAMPLES * samples).reshape(RESAMPLES, samples)
    return counts_RS.astype(np.float64)


def percentiles(replicates_R: Floats, samples: int) -> tuple[float, float]:
    """2.5% and 97.5% points of the replicates that are defined (a resample of one sample S times has no pairs).

    NaN below three samples, or where no replicate is defined.
    """
    defined = replicates_R[~np.isnan(replicates_R)]
    if samples < LEAST_SAMPLES or len(defined) == 0:
        return float("nan"), float("nan")
    low, high = np.percentile(defined, [2.5, 97.5])
    return float(low), float(high)


def mean_of_samples(values: Arrayish, seed: int = 0, documents: np.ndarray | None = None) -> Estimate:
    """Mean of per-sample values [S], in their unit. NaN values are excluded and not counted in `samples`.

    The interval is over documents [S] where they are given.
    """
    values_S = to_float64(values).ravel()
    number_S = document_numbers(documents, len(values_S))[~np.isnan(values_S)]
    values_S = values_S[~np.isnan(values_S)]
    samples = len(values_S)
    if samples == 0:
        return Estimate.undefined()
    counts_RS = resample_counts(samples, np.random.default_rng(seed), number_S)
    # Not by BLAS: its last bits depend on the number of threads.
    replicates_R = np.einsum("rs,s->r", counts_RS, values_S) / counts_RS.sum(1)
    return Estimate(float(values_S.mean()), *percentiles(replicates_R, len(np.unique(number_S))), samples, 0)


def share(right: int, of: int) -> Estimate:
    """The share `right / of` of a count, with Wilson's 95% interval. Undefined for `of` = 0."""
    if not of:
        return Estimate.undefined()
    interval = stats.binomtest(right, of).proportion_ci(method="wilson")
    return Estimate(right / of, float(interval.low), float(interval.high), of, 0)


def jackknife(
    statistic: Callable[[Ints], float], samples: int, seed: int = 0, documents: np.ndarray | None = None
) -> Estimate:
    """A statistic of a group of samples with its interval by the delete-a-group jackknife (Shao and Tu 1995).

    The statistic is computed on all samples, and eight times with one of eight random groups left out. The spread of
    the eight gives the standard error; the interval uses Student's t with 7 degrees of freedom. Unlike the bootstrap,
    no sample occurs twice, which would bias ranks and distances.

    Args:
        statistic: function of sample indices.
        documents: [S] of each sample: all samples of a document are in one group.

    Returns:
        The estimate. `low` and `high` are NaN below 16 documents, or where the statistic of a part is NaN.
    """
    value = statistic(np.arange(samples))
    low = high = float("nan")
    number_S = document_numbers(documents, samples)
    total = int(number_S.max(initial=-1)) + 1
    if total >= 2 * GROUPS:
        group_D = np.empty(total, np.int64)
        group_D[np.random.default_rng(seed).permutation(total)] = np.arange(total) % GROUPS
        parts_G = np.array([statistic(np.flatnonzero(group_D[number_S] != g)) for g in range(GROUPS)])
        error = float(np.sqrt((GROUPS - 1) / GROUPS * ((parts_G - parts_G.mean()) ** 2).sum()))
        half_width = float(stats.t.ppf(0.975, GROUPS - 1)) * error
        low, high = value - half_width, value + half_width
    return Estimate(value, low, high, samples, 0)
