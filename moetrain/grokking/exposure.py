"""Losses per exposure: how well texts are predicted before each pass over them, with intervals over documents."""

from __future__ import annotations

import math

import numpy as np

from ._arrays import Arrayish, to_float64
from .estimate import Estimate

_Z95 = 1.959964


def mean_per_token(sums_S: Arrayish, tokens_S: Arrayish, documents_S: np.ndarray) -> Estimate:
    """Mean per token over samples, with a 95% interval over documents.

    Samples of one document depend on each other, so the variance is that of a ratio estimator whose units are
    documents (linearization; Cochran, *Sampling Techniques*, 1977, section 6.3).

    Args:
        sums_S: a quantity summed over the predicted tokens of each sample, such as its loss in nats.
        tokens_S: number of these tokens.
        documents_S: id of the document that each sample is a piece of.

    Returns:
        The mean (NaN without tokens) and its interval (NaN below two documents); ``samples`` counts documents.

    Raises:
        ValueError: arrays of different lengths.
    """
    sums, tokens, documents = to_float64(sums_S), to_float64(tokens_S), np.asarray(documents_S)
    if not len(sums) == len(tokens) == len(documents):
        raise ValueError(f"{len(sums)} sums, {len(tokens)} token counts, {len(documents)} documents: give one of each")
    total = float(tokens.sum())
    if not total:
        return Estimate.undefined()
    _, unit = np.unique(documents, return_inverse=True)
    sums_D = np.bincount(unit, weights=sums)
    tokens_D = np.bincount(unit, weights=tokens)
    count = len(sums_D)
    mean = float(sums_D.sum() / total)
    if count < 2:
        return Estimate(mean, math.nan, math.nan, count, 0)
    residual_D = sums_D - mean * tokens_D
    half = _Z95 * math.sqrt(count / (count - 1) * float(residual_D @ residual_D)) / total
    return Estimate(mean, mean - half, mean + half, count, 0)


def exposure_bucket(exposures: np.ndarray) -> np.ndarray:
    """The largest power of two that is at most the number of earlier exposures, 0 for none; int64, same shape."""
    exposures = np.asarray(exposures).astype(np.int64)
    return np.where(exposures > 0, 2 ** np.floor(np.log2(np.maximum(exposures, 1))).astype(np.int64), 0)
