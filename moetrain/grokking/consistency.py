"""Pathway consistency: do a sample's weighted router rows point the same way in consecutive layers? (paper, C_i)

`e_l = sum_e g_l[e] W_l[e]` is the routing-weighted mean of the router rows of layer l. Everything here is a function
of the cosines of e_l and e_(l+1), and those need only the Gram blocks of the router rows, which are small enough to be
stored. Suffixes: S samples, L MoE layers, E experts a layer, D hidden size.
"""

from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ._arrays import Arrayish, Floats, finite, routing_weights, to_float64
from .estimate import LEAST_SAMPLES, Estimate, mean_of_samples, percentiles, resample_indices

Blocks: TypeAlias = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]

DIVISION_GUARD = 1e-8  # of the paper's formula
LEAST_MAXIMUM = 0.05  # below it the division by the maximum says more about the maximum than about the sample


@dataclass(frozen=True, slots=True)
class GuardedMedian:
    """Median of a quantity that divides by the largest cosine, over the samples where that is safe.

    `low` and `high` bound the median by bootstrap over those samples, NaN below three of them. `samples` were used,
    `left_out` not: maximum at most 0.05, or no value at all. `median` is NaN where none is left.
    """

    median: float
    low: float
    high: float
    samples: int
    left_out: int


@dataclass(frozen=True, slots=True)
class GroupConsistency:
    """The three curves of a group: `cosine` is a mean over samples that have one, the others are guarded medians."""

    cosine: Estimate
    inconsistency: GuardedMedian
    consistency: GuardedMedian


def gram_blocks(router_rows: Arrayish) -> Blocks:
    """Inner products of router rows within each layer and with the next: all that cosines need.

    router_rows [L, E, D]. Returns float32 arrays [L, E, E], `W_l W_l^T`, and [L-1, E, E], `W_l W_(l+1)^T`; computed in
    float64 and rounded once, so that blocks from a store and blocks made on the spot agree.
    Raises ValueError for rows that are empty, not finite or of wrong shape.
    """
    rows_LED = finite(router_rows, "router_rows", "layers, experts, hidden")
    columns_LDE = rows_LED.transpose(0, 2, 1)
    own_LEE = rows_LED @ columns_LDE
    next_LEE = rows_LED[:-1] @ columns_LDE[1:]
    return own_LEE.astype(np.float32), next_LEE.astype(np.float32)


def layer_cosines(weights: Arrayish, rows_or_blocks: Arrayish | tuple[Arrayish, Arrayish]) -> Floats:
    """[S, L-1] cosine of e_l and e_(l+1) for each sample, from -1 to 1.

    weights [S, L, E]; rows_or_blocks: router rows [L, E, D], or the pair of arrays that `gram_blocks` returns.
    NaN where one of the two vectors is zero, that is, shorter than float32 blocks can tell from zero.
    Raises ValueError for input that is empty, not finite, negative weights, or shapes that do not fit.
    """
    weights_SLE = routing_weights(weights)
    own_LEE, next_LEE = _blocks(rows_or_blocks)
    layers, experts = weights_SLE.shape[1:]
    if own_LEE.shape != (layers, experts, experts) or next_LEE.shape != (layers - 1, experts, experts):
        raise ValueError(
            f"rows_or_blocks has blocks {own_LEE.shape} and {next_LEE.shape}, weights are {weights_SLE.shape}: "
            f"both must have the same layers and experts"
        )
    weights_LSE = weights_SLE.transpose(1, 0, 2)
    squares_LS = _inner(weights_LSE, own_LEE, weights_LSE)
    products_LS = _inner(weights_LSE[:-1], next_LEE, weights_LSE[1:])
    # Blocks rounded to float32 put an error of up to eps (sum_e g_e |W_e|)^2 on a squared length.
    longest_LS = np.einsum("lse,le->ls", weights_LSE, np.sqrt(np.maximum(np.einsum("lee->le", own_LEE), 0)))
    nonzero_LS = squares_LS > np.finfo(np.float32).eps * longest_LS**2
    lengths_LS = np.sqrt(np.where(nonzero_LS, squares_LS, np.nan))
    cosines_LS = products_LS / (lengths_LS[:-1] * lengths_LS[1:])
    return np.clip(cosines_LS, -1, 1).T


def cosine(weights: Arrayish, rows_or_blocks: Arrayish | tuple[Arrayish, Arrayish]) -> Floats:
    """[S] mean over layers of the cosine of consecutive e_l, from -1 to 1: the primary curve.

    NaN for L = 1 and for a sample with a zero vector. Arguments and errors as `layer_cosines`.
    """
    return _mean_over_layers(layer_cosines(weights, rows_or_blocks))


def inconsistency(weights: Arrayish, rows_or_blocks: Arrayish | tuple[Arrayish, Arrayish]) -> Floats:
    """[S] `C_i = 1 - mean_l cos_l / (max_l cos_l + 1e-8)` (paper): higher is more erratic. Without unit.

    The division is unsafe where the largest cosine is small or negative: for a group take `guarded_median` with
    `max_cosine`. NaN for L = 1 and for a sample with a zero vector. Arguments and errors as `layer_cosines`.
    """
    return _inconsistency(layer_cosines(weights, rows_or_blocks))


def max_cosine(weights: Arrayish, rows_or_blocks: Arrayish | tuple[Arrayish, Arrayish]) -> Floats:
    """[S] largest cosine of consecutive e_l of each sample, NaN as in `cosine`: what `inconsistency` divides by."""
    return _max_over_layers(layer_cosines(weights, rows_or_blocks))


def guarded_median(values: Arrayish, maxima: Arrayish, seed: int = 0) -> GuardedMedian:
    """Median of `values` [S] over the samples whose `maxima` [S] exceed 0.05; the others are counted.

    `values` from `inconsistency` (or 1 minus it), `maxima` from `max_cosine`. Raises ValueError for unequal lengths.
    """
    values_S, maxima_S = to_float64(values).ravel(), to_float64(maxima).ravel()
    if len(values_S) != len(maxima_S):
        raise ValueError(
            f"values and maxima have lengths {len(values_S)} and {len(maxima_S)}: pass one of each a sample"
        )
    used_S = (maxima_S > LEAST_MAXIMUM) & ~np.isnan(values_S)  # a NaN maximum does not exceed
    kept = values_S[used_S]
    left_out = len(values_S) - len(kept)
    if len(kept) == 0:
        return GuardedMedian(float("nan"), float("nan"), float("nan"), 0, left_out)
    low = high = float("nan")
    if len(kept) >= LEAST_SAMPLES:
        medians_R = np.median(kept[resample_indices(len(kept), np.random.default_rng(seed))], axis=1)
        low, high = percentiles(medians_R, len(kept))
    return GuardedMedian(float(np.median(kept)), low, high, len(kept), left_out)


def group_consistency(
    weights: Arrayish, rows_or_blocks: Arrayish | tuple[Arrayish, Arrayish], seed: int = 0
) -> GroupConsistency:
    """`cosine`, `inconsistency` and 1 - `inconsistency` of a group of samples, from one pass over the layers.

    Arguments and errors as `layer_cosines`; samples without a value are counted in the fields, never in a mean.
    """
    cosines_SL = layer_cosines(weights, rows_or_blocks)
    median = guarded_median(_inconsistency(cosines_SL), _max_over_layers(cosines_SL), seed)
    return GroupConsistency(
        cosine=mean_of_samples(_mean_over_layers(cosines_SL), seed),
        inconsistency=median,
        consistency=replace(median, median=1 - median.median, low=1 - median.high, high=1 - median.low),
    )


def _inner(left_LSE: Floats, blocks_LEE: Floats, right_LSE: Floats) -> Floats:
    """[L, S] `left^T block right` of each layer and sample.

    Not by BLAS, whose last bits depend on its threads and on the samples beside: a report over all samples must agree
    with what was logged domain by domain.
    """
    return np.einsum("lse,lse->ls", np.einsum("lse,lef->lsf", left_LSE, blocks_LEE), right_LSE)


def _blocks(rows_or_blocks: Any) -> tuple[Floats, Floats]:
    """Blocks as float64. A tuple or list of two arrays of three axes is taken for blocks, anything else for rows."""
    if (
        isinstance(rows_or_blocks, tuple | list)
        and len(rows_or_blocks) == 2
        and all(getattr(block, "ndim", 0) == 3 for block in rows_or_blocks)
    ):
        own_LEE = finite(rows_or_blocks[0], "rows_or_blocks[0]", "layers, experts, experts")
        next_LEE = to_float64(rows_or_blocks[1])  # empty for one layer
        if not np.isfinite(next_LEE).all():
            raise ValueError("rows_or_blocks[1] holds NaN or infinite values: leave out the reading that has them")
        return own_LEE, next_LEE
    own, following = gram_blocks(rows_or_blocks)
    return own.astype(np.float64), following.astype(np.float64)


def _mean_over_layers(cosines_SL: Floats) -> Floats:
    if cosines_SL.shape[1] == 0:
        return np.full(len(cosines_SL), np.nan)
    return cosines_SL.mean(axis=1)


def _max_over_layers(cosines_SL: Floats) -> Floats:
    if cosines_SL.shape[1] == 0:
        return np.full(len(cosines_SL), np.nan)
    return cosines_SL.max(axis=1)


def _inconsistency(cosines_SL: Floats) -> Floats:
    return 1 - _mean_over_layers(cosines_SL) / (_max_over_layers(cosines_SL) + DIVISION_GUARD)
