"""Levenshtein distances of pairs of sequences, their mean and its bootstrap over samples.

Suffixes: P chosen pairs, R resamples, A and B the samples of the two sides (A = B = S for pairs within one group).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist, cpdist
from scipy.sparse import csr_array

from ._arrays import Floats, Ints
from .estimate import Estimate, percentiles

# From this share of all pairs on, computing the whole matrix is faster than computing the chosen pairs.
DENSE_SHARE = 0.25


@dataclass(frozen=True)
class PairDistances:
    """Distances of P pairs: sample `rows[p]` of one side with sample `columns[p]` of the other."""

    rows: Ints  # [P]
    columns: Ints  # [P]
    distances: Floats  # [P]
    row_lengths: Ints  # [A] symbols of each sequence
    column_lengths: Ints  # [B]

    def normalized(self) -> "PairDistances":
        """Each distance divided by the length of the longer of its two sequences."""
        longest_P = np.maximum(self.row_lengths[self.rows], self.column_lengths[self.columns])
        return replace(self, distances=self.distances / longest_P)

    def mean(self) -> float:
        return float(self.distances.mean()) if len(self.distances) else float("nan")

    def resampled_means(self, counts_RA: Floats, counts_RB: Floats) -> Floats:
        """[R] means over the chosen pairs, pair (i, j) with weight c_i * c_j; NaN where a resample has no pair.

        Two copies of one sample form no pair: only pairs of two different samples are among the chosen ones.
        """
        if len(self.distances) == 0:
            return np.full(len(counts_RA), np.nan)
        # Distances are integers or at most 1. Rounded to this step, which is far below any visible digit, their sums
        # over A * B pairs are exact in float64, so the bits do not depend on the order in which BLAS threads add.
        step = 2.0 ** (np.ceil(np.log2(len(self.row_lengths) * len(self.column_lengths))) - 52)
        totals_R = self._weighted_sums(np.round(self.distances / step) * step, counts_RA, counts_RB)
        # Sums of products of counts are integers: exact in float32 below 2^24, and twice as fast.
        ones_P = np.ones(len(self.distances), dtype=np.float32)
        weights_R = self._weighted_sums(ones_P, counts_RA.astype(np.float32), counts_RB)
        return np.divide(totals_R, weights_R, out=np.full(len(totals_R), np.nan), where=weights_R > 0)

    def _weighted_sums(self, values_P: np.ndarray, counts_RA: np.ndarray, counts_RB: Floats) -> Floats:
        """[R] sums of values of pairs (i, j), each times c_i * c_j."""
        shape = (len(self.row_lengths), len(self.column_lengths))
        if len(values_P) < DENSE_SHARE * shape[0] * shape[1]:
            sums_RB = counts_RA @ csr_array((values_P, (self.rows, self.columns)), shape=shape)
        else:
            dense_AB = np.zeros(shape, dtype=values_P.dtype)
            dense_AB[self.rows, self.columns] = values_P
            sums_RB = counts_RA @ dense_AB
        return np.einsum("rb,rb->r", sums_RB, counts_RB, dtype=np.float64)

    def estimate(self, counts_RA: Floats, counts_RB: Floats, samples: int, documents: int | None = None) -> Estimate:
        """The mean over the pairs with its interval, over so many documents; None: as many as samples."""
        low, high = percentiles(self.resampled_means(counts_RA, counts_RB), documents or samples)
        return Estimate(self.mean(), low, high, samples, len(self.distances))


def generators(seed: int) -> tuple[np.random.Generator, np.random.Generator]:
    """Generators for the choice of pairs and for the resamples: two, so that `max_pairs` does not affect the latter."""
    choice, resample = np.random.SeedSequence(seed).spawn(2)
    return np.random.default_rng(choice), np.random.default_rng(resample)


def check_max_pairs(max_pairs: int | None) -> None:
    """Raise ValueError for a number below 1."""
    if max_pairs is not None and max_pairs < 1:
        raise ValueError(f"max_pairs is {max_pairs}: give at least 1, or None for all pairs")


def pairs_within(sequences: Sequence[str], max_pairs: int | None, rng: np.random.Generator) -> PairDistances:
    """Unordered pairs i < j of one group: all, or a uniform choice of `max_pairs`."""
    samples = len(sequences)
    # Pairs are numbered (0, 1), (0, 2), ...: starts_S[i] is the number of the first pair whose smaller member is i.
    first_S = np.arange(samples)
    starts_S = first_S * (2 * samples - first_S - 1) // 2
    numbers_P = _choose(samples * (samples - 1) // 2, max_pairs, rng)
    # The last sample is the smaller member of no pair; its start is the number of pairs, which is never reached.
    rows_P = np.searchsorted(starts_S, numbers_P, side="right") - 1 if len(numbers_P) else numbers_P
    columns_P = numbers_P - starts_S[rows_P] + rows_P + 1
    return _measure(sequences, sequences, rows_P, columns_P)


def pairs_between(a: Sequence[str], b: Sequence[str], max_pairs: int | None, rng: np.random.Generator) -> PairDistances:
    """Pairs of one member of `a` and one of `b`: all, or a uniform choice of `max_pairs`."""
    rows_P, columns_P = np.divmod(_choose(len(a) * len(b), max_pairs, rng), len(b))
    return _measure(a, b, rows_P, columns_P)


def pairs_across(a: Sequence[str], b: Sequence[str], max_pairs: int | None, rng: np.random.Generator) -> PairDistances:
    """Ordered pairs i != j of member i of `a` and member j of `b`, two lists over the same samples."""
    samples = len(a)
    rows_P, columns_P = np.divmod(_choose(samples * (samples - 1), max_pairs, rng), max(samples - 1, 1))
    return _measure(a, b, rows_P, columns_P + (columns_P >= rows_P))


def pairs_aligned(a: Sequence[str], b: Sequence[str]) -> PairDistances:
    """Pairs (i, i) of two lists over the same samples."""
    rows_P = np.arange(len(a))
    return _measure(a, b, rows_P, rows_P)


def _choose(total: int, max_pairs: int | None, rng: np.random.Generator) -> Ints:
    """Pair numbers in ascending order: all `total`, or a uniform choice without replacement."""
    if max_pairs is None or max_pairs >= total:
        return np.arange(total)
    return np.sort(rng.choice(total, size=max_pairs, replace=False))


def _measure(a: Sequence[str], b: Sequence[str], rows_P: Ints, columns_P: Ints) -> PairDistances:
    if len(rows_P) >= DENSE_SHARE * len(a) * len(b):
        # For one list with itself, rapidfuzz computes half of the matrix.
        distances_P = cdist(a, b, scorer=Levenshtein.distance, dtype=np.int32)[rows_P, columns_P]
    else:
        chosen_a, chosen_b = [a[i] for i in rows_P], [b[j] for j in columns_P]
        distances_P = cpdist(chosen_a, chosen_b, scorer=Levenshtein.distance, dtype=np.int32)
    row_lengths, column_lengths = (np.fromiter(map(len, side), dtype=np.int64) for side in (a, b))
    return PairDistances(rows_P, columns_P, distances_P.astype(np.float64), row_lengths, column_lengths)
