"""Pathways of samples through the experts, and their edit distance D_path (paper, sections 3 and 4).

A pathway lists, layer by layer, the experts that carry most of a sample's routing weight. D_path is the Levenshtein
distance of two pathways. Suffixes: S samples, L MoE layers, E experts per layer, R resamples, O samples of others.
"""

import numpy as np
import numpy.typing as npt

from ._arrays import Arrayish, Floats, Ints, check_same_shape, routing_weights
from ._pairs import (
    PairDistances,
    check_max_pairs,
    generators,
    pairs_across,
    pairs_aligned,
    pairs_between,
    pairs_within,
)
from .estimate import Estimate, percentiles, resample_counts

SUM_TOLERANCE = 1e-2  # bfloat16 weights sum to 1 within 4e-3
SURROGATES, SURROGATES_SIZE = 0xD800, 0x800  # code points that are not characters


def pathways(weights: Arrayish, tau: float = 0.7) -> list[npt.NDArray[np.int64]]:
    """Pathway of each sample (paper, section 3).

    In each layer the experts are sorted by descending weight, ties by ascending index. The pathway keeps the shortest
    prefix whose cumulative weight exceeds `tau`, or all experts where rounding keeps the sum from exceeding it. Sorting
    and cumulation are in float64.

    Args:
        weights: [S, L, E] sample routing weights, each [sample, layer] summing to 1.

    Returns:
        S integer arrays; -1 separates layers.

    Raises:
        ValueError: weights that are empty, not finite, negative, of the wrong shape or not normalized, or `tau` outside
            [0, 1).
    """
    symbols, lengths_S = _symbols(*_prefixes(weights, tau))
    return np.split(symbols - 1, np.cumsum(lengths_S)[:-1])


def d_path(
    weights: Arrayish, tau: float = 0.7, normalized: bool = False, max_pairs: int | None = None, seed: int = 0
) -> Estimate:
    """Mean pathway edit distance over the pairs of one group (paper, D_path), in edits.

    Args:
        weights: [S, L, E]. The samples should have equal numbers of tokens; otherwise the distance compares lengths.
        normalized: divide each distance by the length of the longer pathway: a share of its symbols, 0 to 1.
        max_pairs: of more pairs than this, a uniform choice made with `seed`. Memory grows with the number of pairs.

    Returns:
        The mean with a bootstrap interval over samples, in which a sample forms no pair with its own copy. NaN for one
        sample, which has no pairs.

    Raises:
        ValueError: as `pathways`, and for max_pairs below 1.
    """
    pairs = distances_within(weights, tau, max_pairs, seed)
    return _estimate_within(pairs.normalized() if normalized else pairs, seed)


def d_path_both(
    weights: Arrayish,
    tau: float = 0.7,
    max_pairs: int | None = None,
    seed: int = 0,
    documents: np.ndarray | None = None,
) -> tuple[Estimate, Estimate]:
    """`d_path` in edits and normalized, from one computation of the distances. Arguments and errors as `d_path`.

    The intervals are over documents [S] where they are given: samples of one document depend on each other.
    """
    pairs = distances_within(weights, tau, max_pairs, seed)
    return _estimate_within(pairs, seed, documents), _estimate_within(pairs.normalized(), seed, documents)


def d_path_between(
    a: Arrayish,
    b: Arrayish,
    tau: float = 0.7,
    normalized: bool = False,
    max_pairs: int | None = None,
    seed: int = 0,
) -> Estimate:
    """Mean pathway edit distance over pairs of one sample of `a` and one of `b`, two groups without common samples.

    a [S_a, L, E], b [S_b, L, E]; both are resampled. `samples` is S_a + S_b. Other arguments, units and errors as
    `d_path`; ValueError also where L or E differ.
    """
    pairs = _between(a, b, tau, max_pairs, seed)
    counts_RA, counts_RB = _counts_of_two(pairs, seed)
    samples = len(pairs.row_lengths) + len(pairs.column_lengths)
    return (pairs.normalized() if normalized else pairs).estimate(counts_RA, counts_RB, samples)


def d_path_by_layer(weights: Arrayish, tau: float = 0.7, max_pairs: int | None = None, seed: int = 0) -> Floats:
    """[L] mean normalized distance of the samples' prefixes in each layer, without separators.

    Every layer uses the same pairs. NaN for one sample. Arguments and errors as `d_path`.
    """
    order_SLE, kept_SL = _prefixes(weights, tau)
    check_max_pairs(max_pairs)

    def mean_of_layer(layer: int) -> float:
        sequences = _sequences(order_SLE[:, layer : layer + 1], kept_SL[:, layer : layer + 1])
        return pairs_within(sequences, max_pairs, generators(seed)[0]).normalized().mean()

    return np.array([mean_of_layer(layer) for layer in range(kept_SL.shape[1])])


def d_path_floor(
    even: Arrayish,
    odd: Arrayish,
    tau: float = 0.7,
    max_pairs: int | None = None,
    seed: int = 0,
    normalized: bool = False,
) -> tuple[Estimate, Estimate]:
    """Distances between two halves of one sample, which come from sampling tokens alone, and across samples (ours).

    Args:
        even, odd: [S, L, E] weights over the even and the odd tokens of the same samples, each half summing to 1.

    Returns:
        (same, across): mean distance of a sample's even half to its own odd half, over S pairs; and to another sample's
        odd half, over the S (S - 1) ordered pairs, or `max_pairs` of them. Units, intervals and errors as `d_path`.
    """
    same, across = _halves(even, odd, tau, max_pairs, seed)
    if normalized:
        same, across = same.normalized(), across.normalized()
    samples = len(same.row_lengths)
    counts_RS = resample_counts(samples, generators(seed)[1])
    ones_RS = np.ones_like(counts_RS)  # a pair (i, i) has weight c_i, not its square
    return same.estimate(counts_RS, ones_RS, samples), across.estimate(counts_RS, counts_RS, samples)


def individuality(
    even: Arrayish,
    odd: Arrayish,
    tau: float = 0.7,
    max_pairs: int | None = None,
    seed: int = 0,
    documents: np.ndarray | None = None,
) -> Estimate:
    """`d_path_floor` across samples minus within one sample, normalized (ours): above 0 where samples differ.

    Arguments and errors as `d_path_floor`. The interval resamples both means together, by documents [S] where they are
    given; `pairs` counts those across samples. NaN for one sample.
    """
    same, across = (pairs.normalized() for pairs in _halves(even, odd, tau, max_pairs, seed))
    samples = len(same.row_lengths)
    counts_RS = resample_counts(samples, generators(seed)[1], documents)
    across_R = across.resampled_means(counts_RS, counts_RS)
    same_R = same.resampled_means(counts_RS, np.ones_like(counts_RS))
    interval = percentiles(across_R - same_R, _count(documents, samples))
    return Estimate(across.mean() - same.mean(), *interval, samples, len(across.distances))


def sharing(
    weights: Arrayish,
    others: Arrayish,
    tau: float = 0.7,
    max_pairs: int | None = None,
    seed: int = 0,
    documents: np.ndarray | None = None,
    other_documents: np.ndarray | None = None,
) -> Estimate:
    """1 - d_path / d_path_between (ours): how much closer a domain's pathways are to each other than to other domains'.

    Args:
        weights: [S, L, E] samples of the domain.
        others: [S_o, L, E] samples of other domains, of the same number of tokens.
        max_pairs: limit for each of the two means.
        documents: [S] of each sample, by which the interval resamples; None: by samples.
        other_documents: [S_o] likewise.

    Returns:
        At most 1, without unit; 0 where a domain is as far from itself as from the others. `samples` is S and `pairs`
        the pairs within the domain; the interval resamples the domain (in both means together) and the others. NaN for
        one sample, and where all pathways are equal.

    Raises:
        ValueError: as `d_path_between`.
    """
    within = distances_within(weights, tau, max_pairs, seed)
    between = _between(weights, others, tau, max_pairs, seed, names=("weights", "others"))
    counts_RS, counts_RO = _counts_of_two(between, seed, documents, other_documents)
    within_R, between_R = within.resampled_means(counts_RS, counts_RS), between.resampled_means(counts_RS, counts_RO)
    samples = len(within.row_lengths)
    mean = float(_one_minus_ratio(np.array([within.mean()]), np.array([between.mean()]))[0])
    interval = percentiles(_one_minus_ratio(within_R, between_R), _count(documents, samples))
    return Estimate(mean, *interval, samples, len(within.distances))


def _prefixes(weights: Arrayish, tau: float, name: str = "weights") -> tuple[Ints, Ints]:
    """Experts in descending weight [S, L, E], and how many of them the pathway keeps in each layer [S, L]."""
    weights_SLE = routing_weights(weights, name)
    if not 0 <= tau < 1:
        raise ValueError(f"tau is {tau}: a share of the routing weight, from 0 up to, not including, 1")
    if np.abs(weights_SLE.sum(axis=-1) - 1).max() > SUM_TOLERANCE:
        raise ValueError(f"{name} do not sum to 1 over experts: divide each [sample, layer] by its sum")
    order_SLE = np.argsort(-weights_SLE, axis=-1, kind="stable")
    cumulative_SLE = np.cumsum(np.take_along_axis(weights_SLE, order_SLE, axis=-1), axis=-1)
    kept_SL = np.minimum((cumulative_SLE <= tau).sum(axis=-1) + 1, weights_SLE.shape[-1])
    return order_SLE, kept_SL


def _symbols(order_SLE: Ints, kept_SL: Ints) -> tuple[Ints, Ints]:
    """All pathways concatenated, 0 for the separator and 1 + id for an expert, and the length of each [S]."""
    samples, layers, _ = order_SLE.shape
    longest = int(kept_SL.max())
    symbols = np.zeros((samples, layers, longest + 1), dtype=np.int64)
    symbols[:, :, :longest] = order_SLE[:, :, :longest] + 1
    used = np.arange(longest + 1) < kept_SL[:, :, None]
    used[:, :-1, longest] = True  # the separator after every layer but the last
    return symbols[used], used.sum(axis=(1, 2))


def _sequences(order_SLE: Ints, kept_SL: Ints) -> list[str]:
    """Pathways as strings, one character per symbol: the fastest input for rapidfuzz (one byte each to 255 experts)."""
    symbols, lengths_S = _symbols(order_SLE, kept_SL)
    codes = symbols + SURROGATES_SIZE * (symbols >= SURROGATES)
    text = codes.astype("<u4").tobytes().decode("utf-32-le")
    ends_S = np.cumsum(lengths_S)
    return [text[start:end] for start, end in zip((ends_S - lengths_S).tolist(), ends_S.tolist(), strict=True)]


def distances_within(weights: Arrayish, tau: float, max_pairs: int | None, seed: int) -> PairDistances:
    """Distances of the pairs of one group, in edits; equal numbers of samples have the same pairs chosen."""
    check_max_pairs(max_pairs)
    return pairs_within(_sequences(*_prefixes(weights, tau)), max_pairs, generators(seed)[0])


def _estimate_within(pairs: PairDistances, seed: int, documents: np.ndarray | None = None) -> Estimate:
    samples = len(pairs.row_lengths)
    counts_RS = resample_counts(samples, generators(seed)[1], documents)
    return pairs.estimate(counts_RS, counts_RS, samples, _count(documents, samples))


def _count(documents: np.ndarray | None, samples: int) -> int:
    """The number of documents."""
    return samples if documents is None else len(np.unique(documents))


def _between(
    a: Arrayish, b: Arrayish, tau: float, max_pairs: int | None, seed: int, names: tuple[str, str] = ("a", "b")
) -> PairDistances:
    check_max_pairs(max_pairs)
    order_a, kept_a = _prefixes(a, tau, names[0])
    order_b, kept_b = _prefixes(b, tau, names[1])
    check_same_shape(order_a, order_b, names, first_axis=1)
    return pairs_between(_sequences(order_a, kept_a), _sequences(order_b, kept_b), max_pairs, generators(seed)[0])


def _counts_of_two(
    pairs: PairDistances, seed: int, documents: np.ndarray | None = None, other_documents: np.ndarray | None = None
) -> tuple[Floats, Floats]:
    rng = generators(seed)[1]
    rows = resample_counts(len(pairs.row_lengths), rng, documents)
    return rows, resample_counts(len(pairs.column_lengths), rng, other_documents)


def _halves(
    even: Arrayish, odd: Arrayish, tau: float, max_pairs: int | None, seed: int
) -> tuple[PairDistances, PairDistances]:
    """Distances between the two halves of each sample, and between one sample's even half and another's odd half."""
    check_max_pairs(max_pairs)
    order_even, kept_even = _prefixes(even, tau, "even")
    order_odd, kept_odd = _prefixes(odd, tau, "odd")
    check_same_shape(order_even, order_odd, ("even", "odd"))
    halves = _sequences(order_even, kept_even), _sequences(order_odd, kept_odd)
    return pairs_aligned(*halves), pairs_across(*halves, max_pairs, generators(seed)[0])


def _one_minus_ratio(within: Floats, between: Floats) -> Floats:
    """1 - within / between, NaN where `between` is 0."""
    return 1 - np.divide(within, between, out=np.full(len(within), np.nan), where=between > 0)
