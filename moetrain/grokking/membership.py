"""Was a text in the training data? Min-K%++ (Zhang et al., arXiv 2404.02936), by which the paper filters benchmarks.

Suffixes: K predicted tokens of a text, I texts.
"""

import numpy as np

from ._arrays import Arrayish, Bools, finite

SHARE_OF_TOKENS = 0.2
SHARE_REMOVED = 0.1


def min_k_plus_plus(
    log_probs: Arrayish, means: Arrayish, deviations: Arrayish, share: float = SHARE_OF_TOKENS
) -> float:
    """Min-K%++ score of one text: the larger, the more likely the text was trained on.

    Each token's log-probability is standardized by the mean and the standard deviation that the log-probability of a
    token drawn from the model's own prediction has. The score is the mean over the lowest `share` of the tokens.

    Args:
        log_probs: [K] of the text's tokens, nats.
        means, deviations: [K] of the log-probability under the prediction at each token, nats.
        share: of the tokens, at least one.

    Returns:
        The score; NaN where no prediction has a deviation above 0. Tokens without one are left out.

    Raises:
        ValueError: arrays that are empty, not finite or of unequal length, or a share outside (0, 1].
    """
    log_probs_K, means_K, deviations_K = (
        finite(value, name, "tokens")
        for value, name in ((log_probs, "log_probs"), (means, "means"), (deviations, "deviations"))
    )
    if not len(log_probs_K) == len(means_K) == len(deviations_K):
        raise ValueError(
            f"log_probs, means and deviations have lengths {len(log_probs_K)}, {len(means_K)}, {len(deviations_K)}: "
            "pass one of each per token"
        )
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}: a share of the tokens, above 0 and up to 1")
    known_K = deviations_K > 0
    if not known_K.any():
        return float("nan")
    scores_K = np.sort((log_probs_K[known_K] - means_K[known_K]) / deviations_K[known_K])
    return float(scores_K[: max(1, int(len(scores_K) * share))].mean())


def likely_members(scores: Arrayish, share: float = SHARE_REMOVED) -> Bools:
    """[I] whether a text is among the `share` with the highest scores: the paper excludes a tenth of each benchmark.

    This removes the same share of any set of texts, whether or not one of them was trained on. Of equal scores, the
    earlier text is removed first; a text without a score (NaN) is kept.

    Raises:
        ValueError: a share outside [0, 1), or scores that are not one per text.
    """
    scores_I = np.asarray(scores, dtype=np.float64)
    if scores_I.ndim != 1:
        raise ValueError(f"scores has shape {scores_I.shape}: pass one per text")
    if not 0 <= share < 1:
        raise ValueError(f"share is {share}: a share of the texts, from 0 up to, not including, 1")
    known_I = np.flatnonzero(~np.isnan(scores_I))
    removed = known_I[np.argsort(-scores_I[known_I], kind="stable")][: int(len(scores_I) * share + 1e-9)]
    found_I = np.zeros(len(scores_I), dtype=np.bool_)
    found_I[removed] = True
    return found_I
