"""Pathway consistency: do a sample's weighted router rows point the same way in consecutive layers? (paper, C_i)

`e_l = sum_e g_l[e] W_l[e]` is the mean of the router rows of layer l, weighted by routing. All quantities here are
functions of the cosines of e_l and e_(l+1). These need only the Gram blocks of the router rows, which are small enough
to store. Suffixes: S samples, L MoE layers, E experts per layer, D hidden size, R resamples.
"""

from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ._arrays import Arrayish, Floats, finite, routing_weights, to_float64
from .estimate import (
    LEAST_SAMPLES,
    Estimate,
    document_numbers,
    mean_of_samples,
    percentiles,
    resample_counts,
    resample_indices,
)

Blocks: TypeAlias = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]
RowsOrBlocks: TypeAlias = Arrayish | tuple[Arrayish, Arrayish]

DIVISION_GUARD = 1e-8  # in the paper's formula
LEAST_MAXIMUM = 0.05  # a quotient with a smaller divisor mostly reflects the divisor


@dataclass(frozen=True, slots=True)
class GuardedMedian:
    """Median, over samples, of a quantity that divides by the largest cosine.

    Only samples whose largest cosine exceeds 0.05 count: `samples` were used, `left_out` were not. `low` and `high` are
    a 95% bootstrap interval over the samples used, NaN below three. All are NaN where no sample was used.
    """

    median: float
    low: float
    high: float
    samples: int
    left_out: int


@dataclass(frozen=True, slots=True)
class GroupConsistency:
    """The three curves of a group of samples: a mean (of the samples that have a value) and two guarded medians."""

    cosine: Estimate
    inconsistency: GuardedMedian
    consistency: GuardedMedian


def gram_blocks(router_rows: Arrayish) -> Blocks:
    """Inner products of router rows within each layer and with the next layer.

    Args:
        router_rows: [L, E, D].

    Returns:
        float32 arrays [L, E, E], `W_l W_l^T`, and [L-1, E, E], `W_l W_(l+1)^T`. Computed in float64 and rounded once,
        so that stored and freshly computed blocks agree.

    Raises:
        ValueError: rows that are empty, not finite or of the wrong shape.
    """
    rows_LED = finite(router_rows, "router_rows", "layers, experts, hidden")
    columns_LDE = rows_LED.transpose(0, 2, 1)
    own_LEE = rows_LED @ columns_LDE
    next_LEE = rows_LED[:-1] @ columns_LDE[1:]
    return own_LEE.astype(np.float32), next_LEE.astype(np.float32)


def layer_cosines(weights: Arrayish, rows_or_blocks: RowsOrBlocks) -> Floats:
    """[S, L-1] cosine of e_l and e_(l+1) of each sample, from -1 to 1.

    NaN where one of the two vectors is zero within the rounding of the float32 blocks.

    Args:
        weights: [S, L, E] routing weights.
        rows_or_blocks: router rows [L, E, D], or the pair of arrays that `gram_blocks` returns.

    Raises:
        ValueError: input that is empty or not finite, negative weights, or shapes that do not match.
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
    # Rounding the blocks to float32 changes a squared length by up to eps (sum_e g_e |W_e|)^2.
    longest_LS = np.einsum("lse,le->ls", weights_LSE, np.sqrt(np.maximum(np.einsum("lee->le", own_LEE), 0)))
    nonzero_LS = squares_LS > np.finfo(np.float32).eps * longest_LS**2
    lengths_LS = np.sqrt(np.where(nonzero_LS, squares_LS, np.nan))
    cosines_LS = products_LS / (lengths_LS[:-1] * lengths_LS[1:])
    return np.clip(cosines_LS, -1, 1).T


def cosine(weights: Arrayish, rows_or_blocks: RowsOrBlocks) -> Floats:
    """[S] mean over layers of the cosine of consecutive e_l, from -1 to 1.

    NaN for L = 1 and for a sample with a zero vector. Arguments and errors as `layer_cosines`.
    """
    return _over_layers(np.mean, layer_cosines(weights, rows_or_blocks))


def inconsistency(weights: Arrayish, rows_or_blocks: RowsOrBlocks) -> Floats:
    """[S] `C_i = 1 - mean_l cos_l / (max_l cos_l + 1e-8)` (paper), without unit: higher is more erratic.

    The quotient is unreliable where the largest cosine is small or negative: for a group of samples use
    `guarded_median` with `max_cosine`. NaN, arguments and errors as `cosine`.
    """
    return _inconsistency(layer_cosines(weights, rows_or_blocks))


def max_cosine(weights: Arrayish, rows_or_blocks: RowsOrBlocks) -> Floats:
    """[S] largest cosine of consecutive e_l, the divisor of `inconsistency`. NaN, arguments and errors as `cosine`."""
    return _over_layers(np.max, layer_cosines(weights, rows_or_blocks))


def guarded_median(
    values: Arrayish, maxima: Arrayish, seed: int = 0, documents: np.ndarray | None = None
) -> GuardedMedian:
    """Median of `values` over the samples whose `maxima` exceed 0.05.

    Args:
        values: [S] from `inconsistency`.
        maxima: [S] from `max_cosine`.
        documents: [S] of each sample, by which the interval resamples; None: by samples.

    Raises:
        ValueError: unequal lengths.
    """
    values_S, maxima_S = to_float64(values).ravel(), to_float64(maxima).ravel()
    if len(values_S) != len(maxima_S):
        raise ValueError(
            f"values and maxima have lengths {len(values_S)} and {len(maxima_S)}: pass one of each per sample"
        )
    usable_S = (maxima_S > LEAST_MAXIMUM) & ~np.isnan(values_S)  # False for a NaN maximum
    used, number = values_S[usable_S], document_numbers(documents, len(values_S))[usable_S]
    left_out = len(values_S) - len(used)
    median = low = high = float("nan")
    if len(used):
        median = float(np.median(used))
    total, rng = len(np.unique(number)), np.random.default_rng(seed)
    if total >= LEAST_SAMPLES:
        if total == len(used):
            medians_R = np.median(used[resample_indices(len(used), rng)], axis=1)
        else:
            counts_RS = resample_counts(len(used), rng, number).astype(np.int64)
            medians_R = np.array([np.median(np.repeat(used, counts)) for counts in counts_RS])
        low, high = percentiles(medians_R, total)
    return GuardedMedian(median, low, high, len(used), left_out)


def group_consistency(
    weights: Arrayish, rows_or_blocks: RowsOrBlocks, seed: int = 0, documents: np.ndarray | None = None
) -> GroupConsistency:
    """`cosine`, `inconsistency` and 1 - `inconsistency` of a group of samples, from one computation of the cosines.

    Samples without a value are counted and excluded. Intervals are over documents [S] where they are given. Arguments
    and errors as `layer_cosines`.
    """
    cosines_SL = layer_cosines(weights, rows_or_blocks)
    median = guarded_median(_inconsistency(cosines_SL), _over_layers(np.max, cosines_SL), seed, documents)
    return GroupConsistency(
        cosine=mean_of_samples(_over_layers(np.mean, cosines_SL), seed, documents),
        inconsistency=median,
        consistency=replace(median, median=1 - median.median, low=1 - median.high, high=1 - median.low),
    )


def _inner(left_LSE: Floats, blocks_LEE: Floats, right_LSE: Floats) -> Floats:
    """[L, S] `left^T block right` of each layer and sample.

    Not by BLAS: its last bits depend on the number of threads and on the other samples of the call, and a report over
    all samples must agree with the values logged per domain.
    """
    return np.einsum("lse,lse->ls", np.einsum("lse,lef->lsf", left_LSE, blocks_LEE), right_LSE)


def _blocks(rows_or_blocks: Any) -> tuple[Floats, Floats]:
    """Gram blocks as float64. A tuple or list of two arrays with three axes holds blocks, anything else holds rows."""
    if (
        isinstance(rows_or_blocks, tuple | list)
        and len(rows_or_blocks) == 2
        and all(getattr(block, "ndim", 0) == 3 for block in rows_or_blocks)
    ):
        own_LEE = finite(rows_or_blocks[0], "rows_or_blocks[0]", "layers, experts, experts")
        next_LEE = to_float64(rows_or_blocks[1])  # may be empty: one layer
        if not np.isfinite(next_LEE).all():
            raise ValueError("rows_or_blocks[1] holds NaN or infinite values: exclude the reading that has them")
        return own_LEE, next_LEE
    own, following = gram_blocks(rows_or_blocks)
    return own.astype(np.float64), following.astype(np.float64)


def _over_layers(reduce: Any, cosines_SL: Floats) -> Floats:
    """[S] a reduction of the cosines over layers; NaN where there is one layer and so no cosine."""
    return reduce(cosines_SL, axis=1) if cosines_SL.shape[1] else np.full(len(cosines_SL), np.nan)


def _inconsistency(cosines_SL: Floats) -> Floats:
    return 1 - _over_layers(np.mean, cosines_SL) / (_over_layers(np.max, cosines_SL) + DIVISION_GUARD)
