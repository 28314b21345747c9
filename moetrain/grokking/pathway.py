"""Pathways of samples through the experts, and their edit distances D_path (paper, sections 3 and 4).

A pathway lists, layer by layer, the experts that carry most of a sample's routing weight. D_path is the Levenshtein
distance of two pathways. Suffixes: S samples, L MoE layers, E experts a layer, R resamples.
"""

import numpy as np
import numpy.typing as npt

from ._arrays import Arrayish, Floats, Ints, routing_weights, same_shape
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
    """Pathway of each sample: per layer the experts in descending weight (ties to the lower index), the shortest
    prefix whose cumulative weight exceeds `tau`, layers separated by -1 (paper, section 3).

    weights [S, L, E]: sample routing weights, each [sample, layer] summing to 1. Ranked and cumulated in float64.
    Returns S integer arrays. Where rounding keeps the sum from exceeding `tau`, the layer keeps all experts.
    Raises ValueError for weights that are empty, not finite, negative, of wrong shape or not normalised, and for
    `tau` outside [0, 1).
    """
    symbols, lengths_S = _symbols(*_prefixes(weights, tau))
    return np.split(symbols - 1, np.cumsum(lengths_S)[:-1])


def d_path(
    weights: Arrayish, tau: float = 0.7, normalized: bool = False, max_pairs: int | None = None, seed: int = 0
) -> Estimate:
    """Mean pathway edit distance over the pairs of one group (paper, D_path).

    weights [S, L, E]; the samples should have equal numbers of tokens, else the distance compares lengths.
    normalized: divide each distance by the longer pathway of its pair; the unit is then a share of its symbols, else
    edits. max_pairs: above that many pairs, a uniform choice of them, made with `seed`. Memory grows with the pairs.
    Returns Estimate; the interval is a bootstrap over samples without pairs of a sample with itself. One sample has
    no pairs: mean NaN. Raises ValueError as `pathways` does, and for max_pairs below 1.
    """
    table = _within(weights, tau, max_pairs, seed)
    return _estimate_within(table.normalized() if normalized else table, seed)


def d_path_both(
    weights: Arrayish, tau: float = 0.7, max_pairs: int | None = None, seed: int = 0
) -> tuple[Estimate, Estimate]:
    """`d_path` in edits and normalised, from one pass over the pairs; arguments and errors as there."""
    table = _within(weights, tau, max_pairs, seed)
    return _estimate_within(table, seed), _estimate_within(table.normalized(), seed)


def d_path_between(
    a: Arrayish,
    b: Arrayish,
    tau: float = 0.7,
    normalized: bool = False,
    max_pairs: int | None = None,
    seed: int = 0,
) -> Estimate:
    """Mean pathway edit distance over pairs of one sample of `a` and one of `b`, two groups without common samples.

    a [S_a, L, E], b [S_b, L, E]. Returns Estimate whose `samples` is S_a + S_b; both groups are resampled.
    Arguments, units and errors as `d_path`; ValueError also where L or E differ.
    """
    table = _between(a, b, tau, max_pairs, seed)
    counts_RA, counts_RB = _counts_of_two(table, seed)
    samples = len(table.row_lengths) + len(table.column_lengths)
    return (table.normalized() if normalized else table).estimate(counts_RA, counts_RB, samples)


def d_path_by_layer(weights: Arrayish, tau: float = 0.7, max_pairs: int | None = None, seed: int = 0) -> Floats:
    """[L] mean normalised distance of the samples' prefixes in each layer, without separators.

    The same pairs serve every layer. NaN in every layer for one sample. Arguments and errors as `d_path`.
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
    """What finite tokens alone give: distances between halves of one sample, and across samples.

    even, odd [S, L, E]: weights over the even and the odd tokens of the same S samples, each half normalised by its
    own tokens. Returns (same, across): mean distance of a sample's even half to its own odd half, over S pairs; and
    to another sample's odd half, over the S (S - 1) ordered pairs, or a uniform choice of `max_pairs` of them.
    Units, intervals and errors as `d_path`.
    """
    same, across = _halves(even, odd, tau, max_pairs, seed, normalized)
    counts_RS = resample_counts(len(same.row_lengths), generators(seed)[1])
    ones_RS = np.ones_like(counts_RS)  # a pair (i, i) weighs c_i, not c_i squared
    samples = len(same.row_lengths)
    return same.estimate(counts_RS, ones_RS, samples), across.estimate(counts_RS, counts_RS, samples)


def individuality(
    even: Arrayish, odd: Arrayish, tau: float = 0.7, max_pairs: int | None = None, seed: int = 0
) -> Estimate:
    """`d_path_floor` across samples minus within one sample, normalised distances: above 0 where samples differ.

    Arguments and errors as `d_path_floor`. Returns Estimate; the interval resamples both means together, `pairs`
    counts those across samples. One sample: mean NaN.
    """
    same, across = _halves(even, odd, tau, max_pairs, seed, normalized=True)
    samples = len(same.row_lengths)
    counts_RS = resample_counts(samples, generators(seed)[1])
    across_R = across.resampled_means(counts_RS, counts_RS)
    same_R = same.resampled_means(counts_RS, np.ones_like(counts_RS))
    return Estimate(
        across.mean() - same.mean(), *percentiles(across_R - same_R, samples), samples, len(across.distances)
    )


def sharing(
    weights: Arrayish, others: Arrayish, tau: float = 0.7, max_pairs: int | None = None, seed: int = 0
) -> Estimate:
    """1 - d_path / d_path_between: how much closer the pathways of a domain are to each other than to other domains'.

    weights [S, L, E]: samples of the domain; others [S_o, L, E]: samples of other domains, of the same number of
    tokens. `max_pairs` holds for each of the two means. Returns Estimate without unit, at most 1, 0 where a domain is
    as far from itself as from others; `samples` is S and `pairs` the pairs within; the interval resamples the domain
    (in both means together) and the others. NaN for one sample, and where all pathways are equal.
    Raises ValueError as `d_path_between`.
    """
    within = _within(weights, tau, max_pairs, seed)
    between = _between(weights, others, tau, max_pairs, seed, names=("weights", "others"))
    counts_RS, counts_RO = _counts_of_two(between, seed)
    within_R, between_R = within.resampled_means(counts_RS, counts_RS), between.resampled_means(counts_RS, counts_RO)
    samples = len(within.row_lengths)
    mean = float(_one_minus_ratio(np.array([within.mean()]), np.array([between.mean()]))[0])
    interval = percentiles(_one_minus_ratio(within_R, between_R), samples)
    return Estimate(mean, *interval, samples, len(within.distances))


def _prefixes(weights: Arrayish, tau: float, name: str = "weights") -> tuple[Ints, Ints]:
    """Experts in descending weight [S, L, E], and how many of them each layer keeps [S, L]."""
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
    """All pathways one after the other, 0 for the separator and 1 + id for an expert, and the length of each [S]."""
    samples, layers, _ = order_SLE.shape
    longest = int(kept_SL.max())
    symbols = np.zeros((samples, layers, longest + 1), dtype=np.int64)
    symbols[:, :, :longest] = order_SLE[:, :, :longest] + 1
    taken = np.arange(longest + 1) < kept_SL[:, :, None]
    taken[:, :-1, longest] = True  # the separator after every layer but the last
    return symbols[taken], taken.sum(axis=(1, 2))


def _sequences(order_SLE: Ints, kept_SL: Ints) -> list[str]:
    """Pathways as strings, one character a symbol: what rapidfuzz reads fastest (one byte each up to 255 experts)."""
    symbols, lengths_S = _symbols(order_SLE, kept_SL)
    codes = symbols + SURROGATES_SIZE * (symbols >= SURROGATES)
    text = codes.astype("<u4").tobytes().decode("utf-32-le")
    ends_S = np.cumsum(lengths_S)
    return [text[start:end] for start, end in zip((ends_S - lengths_S).tolist(), ends_S.tolist(), strict=True)]


def _within(weights: Arrayish, tau: float, max_pairs: int | None, seed: int) -> PairDistances:
    check_max_pairs(max_pairs)
    return pairs_within(_sequences(*_prefixes(weights, tau)), max_pairs, generators(seed)[0])


def _estimate_within(table: PairDistances, seed: int) -> Estimate:
    samples = len(table.row_lengths)
    counts_RS = resample_counts(samples, generators(seed)[1])
    return table.estimate(counts_RS, counts_RS, samples)


def _between(
    a: Arrayish, b: Arrayish, tau: float, max_pairs: int | None, seed: int, names: tuple[str, str] = ("a", "b")
) -> PairDistances:
    check_max_pairs(max_pairs)
    order_a, kept_a = _prefixes(a, tau, names[0])
    order_b, kept_b = _prefixes(b, tau, names[1])
    same_shape(order_a, order_b, names, first_axis=1)
    return pairs_between(_sequences(order_a, kept_a), _sequences(order_b, kept_b), max_pairs, generators(seed)[0])


def _counts_of_two(table: PairDistances, seed: int) -> tuple[Floats, Floats]:
    rng = generators(seed)[1]
    return resample_counts(len(table.row_lengths), rng), resample_counts(len(table.column_lengths), rng)


def _halves(
    even: Arrayish, odd: Arrayish, tau: float, max_pairs: int | None, seed: int, normalized: bool
) -> tuple[PairDistances, PairDistances]:
    """Distances of each sample's two halves, and of one sample's even half to another's odd half."""
    check_max_pairs(max_pairs)
    order_even, kept_even = _prefixes(even, tau, "even")
    order_odd, kept_odd = _prefixes(odd, tau, "odd")
    same_shape(order_even, order_odd, ("even", "odd"))
    even_sequences, odd_sequences = _sequences(order_even, kept_even), _sequences(order_odd, kept_odd)
    same = pairs_aligned(even_sequences, odd_sequences)
    across = pairs_across(even_sequences, odd_sequences, max_pairs, generators(seed)[0])
    return (same.normalized(), across.normalized()) if normalized else (same, across)


def _one_minus_ratio(within: Floats, between: Floats) -> Floats:
    """1 - within / between, NaN where `between` is 0."""
    return 1 - np.divide(within, between, out=np.full(len(within), np.nan), where=between > 0)
