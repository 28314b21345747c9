"""Means of losses and the memorized share, with 95% intervals over documents.

Samples of one document depend on each other, so they count as one unit: the variance of a mean is taken from sums over
documents (linearization; Cochran, *Sampling Techniques*, 1977, chapter 6), with Student's t for their number.
Suffixes: S samples, D documents.
"""

import math

import numpy as np
from scipy.stats import t as student

from ._arrays import Arrayish, Floats, finite, to_float64
from .estimate import Estimate
from .exposure import mean_per_token

LEAST_LEARNED = 0.05
"""A fall of the loss of seen samples by a smaller share of its initial value is nothing learned to take a share of."""
LEAST_CLAIM = 0.1
"""Smaller claims, in nats per sample, are too small to take a ratio to."""


def mean_over_documents(values: Arrayish, documents: np.ndarray) -> Estimate:
    """Mean of per-sample values [S], with an interval over documents; ``samples`` counts documents.

    Args:
        documents: [S] id of the document that each sample is a piece of.

    Raises:
        ValueError: values that are not finite, or arrays of different lengths.
    """
    values_S, documents_S = _cell(values, documents, "values")
    if not len(values_S):
        return Estimate.undefined()
    influence_D = _by_document((values_S - values_S.mean()) / len(values_S), documents_S)
    return _estimate(float(values_S.mean()), [influence_D])


def memorized_gap(
    unseen: Arrayish,
    seen: Arrayish,
    unseen_documents: np.ndarray | None = None,
    seen_documents: np.ndarray | None = None,
) -> Estimate:
    """Mean loss of unseen samples minus mean loss of seen samples, in nats: above 0 where the model memorizes.

    Args:
        unseen: [S_u] losses of samples to come (`memorized/gap`) or held out (`memorized/gap_heldout`).
        seen: [S_s] losses of samples trained on, read at the same step.
        unseen_documents: [S_u] ids of their documents; None: each sample is a document of its own.
        seen_documents: [S_s] likewise.

    Returns:
        The difference, with an interval over documents; ``samples`` counts the documents of both. Undefined where a
        cell is empty.

    Raises:
        ValueError: losses that are not finite, or arrays of different lengths.
    """
    unseen_S, unseen_D = _cell(unseen, unseen_documents, "unseen")
    seen_S, seen_D = _cell(seen, seen_documents, "seen")
    if not len(unseen_S) or not len(seen_S):
        return Estimate.undefined(len(np.unique(unseen_D)) + len(np.unique(seen_D)))
    return _estimate(
        float(unseen_S.mean() - seen_S.mean()),
        [
            _by_document((unseen_S - unseen_S.mean()) / len(unseen_S), unseen_D),
            _by_document((seen_S.mean() - seen_S) / len(seen_S), seen_D),
        ],
    )


def memorized_share(
    unseen: Arrayish,
    seen: Arrayish,
    initial: float,
    unseen_documents: np.ndarray | None = None,
    seen_documents: np.ndarray | None = None,
    unseen_difficulty: Arrayish | None = None,
    seen_difficulty: Arrayish | None = None,
) -> Estimate:
    """The share of what the model has learned of texts it was trained on that does not carry over to others (ours).

    (unseen - seen) / (initial - seen), in mean losses at one step: 0 where nothing is memory, 1 where all of it is. It
    is above 1 where texts of the domain that were not trained on are predicted worse than before the training.

    With difficulties, the difference of losses is that between texts of equal difficulty, by a line of one slope in
    both cells (analysis of covariance): two cells of few documents differ in difficulty by chance.

    Args:
        unseen: [S_u] losses of texts of the domain that were not trained on.
        seen: [S_s] losses of texts trained on, read at the same step.
        initial: mean loss before the training, in the same unit.
        unseen_documents: [S_u] ids of their documents; None: each sample is a document of its own.
        seen_documents: [S_s] likewise.
        unseen_difficulty: [S_u] a property of each text that no training changes, such as its loss under the frequency
            of each token in the domain.
        seen_difficulty: [S_s] likewise.

    Returns:
        The share, with an interval over documents; ``samples`` counts the documents of both. Undefined where a cell is
        empty, or the loss of the seen texts has fallen by less than 5% of its initial value.

    Raises:
        ValueError: losses that are not finite, or arrays of different lengths.
    """
    unseen_S, unseen_D = _cell(unseen, unseen_documents, "unseen")
    seen_S, seen_D = _cell(seen, seen_documents, "seen")
    documents = len(np.unique(unseen_D)) + len(np.unique(seen_D))
    if not len(unseen_S) or not len(seen_S) or not math.isfinite(initial):
        return Estimate.undefined(documents)
    learned = initial - float(seen_S.mean())
    if not learned >= LEAST_LEARNED * initial:
        return Estimate.undefined(documents)
    centred_u, centred_s = unseen_S - unseen_S.mean(), seen_S - seen_S.mean()
    residual_u, residual_s, of_difficulty = centred_u, centred_s, 0.0
    if unseen_difficulty is not None and seen_difficulty is not None:
        x_u, _ = _cell(unseen_difficulty, unseen_D, "unseen_difficulty")
        x_s, _ = _cell(seen_difficulty, seen_D, "seen_difficulty")
        slope = _common_slope([(x_u - x_u.mean(), centred_u), (x_s - x_s.mean(), centred_s)])
        of_difficulty = slope * float(x_u.mean() - x_s.mean())
        residual_u, residual_s = centred_u - slope * (x_u - x_u.mean()), centred_s - slope * (x_s - x_s.mean())
    share = (float(unseen_S.mean() - seen_S.mean()) - of_difficulty) / learned
    return _estimate(
        share,
        [
            _by_document(residual_u / len(unseen_S) / learned, unseen_D),
            _by_document((share * centred_s - residual_s) / len(seen_S) / learned, seen_D),
        ],
    )


def claim_ratio(gains: Arrayish, claims: Arrayish, documents: np.ndarray) -> Estimate:
    """What a model gains on the true tokens from a text's own far context, over what it believes it gains (ours).

    1 for a calibrated model, below on texts met once, which it takes too much from, and above on texts that it knows.

    Args:
        gains: [S] log p(y) - log q(y), summed over tokens; p is the prediction behind the text's own first half, q
            behind another text's, y the true token.
        claims: [S] KL(p || q), summed over the same tokens; nats, as the gains.
        documents: [S] ids of their documents.

    Returns:
        The ratio of the sums, with an interval over documents, which ``samples`` counts. Undefined without samples,
        or where the mean claim of a sample is below 0.1 nats.

    Raises:
        ValueError: arrays of different lengths.
    """
    claims_S = to_float64(claims)
    if not len(claims_S) or not claims_S.mean() >= LEAST_CLAIM:
        return Estimate.undefined(len(np.unique(documents)))
    return mean_per_token(gains, claims_S, documents)


def _common_slope(cells: list[tuple[Floats, Floats]]) -> float:
    """The slope of the least-squares lines of y on x, both centred, that all cells share; 0 where x does not vary."""
    squares = sum(float(x_S @ x_S) for x_S, _ in cells)
    return sum(float(x_S @ y_S) for x_S, y_S in cells) / squares if squares > 0 else 0.0


def _cell(losses: Arrayish, documents: np.ndarray | None, name: str) -> tuple[Floats, np.ndarray]:
    """Losses [S] of a cell, S may be 0, and their documents."""
    losses_S = to_float64(losses).ravel()
    documents_S = np.arange(len(losses_S)) if documents is None else np.asarray(documents).ravel()
    if len(losses_S) != len(documents_S):
        raise ValueError(f"{name}: {len(losses_S)} losses and {len(documents_S)} documents: give one of each")
    return (finite(losses_S, name, "samples") if len(losses_S) else losses_S), documents_S


def _by_document(influence_S: Floats, documents_S: np.ndarray) -> Floats:
    """Sums of the samples' influences on a mean over documents [D]."""
    _, unit_S = np.unique(documents_S, return_inverse=True)
    return np.bincount(unit_S, weights=influence_S).astype(np.float64)


def _estimate(value: float, influences: list[Floats]) -> Estimate:
    """A value whose cells are independent, from the influence of each document; no interval below two documents."""
    counts = [len(each_D) for each_D in influences]
    if min(counts) < 2:
        return Estimate(value, math.nan, math.nan, sum(counts), 0)
    variance = sum(n / (n - 1) * float(each_D @ each_D) for n, each_D in zip(counts, influences, strict=True))
    half = float(student.ppf(0.975, min(counts) - 1)) * math.sqrt(variance)
    return Estimate(value, value - half, value + half, sum(counts), 0)
