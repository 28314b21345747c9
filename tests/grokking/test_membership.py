"""Min-K%++ against a literal reference that enumerates each token's prediction."""

import math
import random

import numpy as np
import pytest

from moetrain import grokking as g


def reference(predictions, tokens, share):
    """The score of a text, token by token, from whole predictions, in plain Python."""
    scores = []
    for prediction, token in zip(predictions, tokens, strict=True):
        logs = [math.log(p) for p in prediction]
        mean = sum(p * log for p, log in zip(prediction, logs, strict=True))
        variance = sum(p * (log - mean) ** 2 for p, log in zip(prediction, logs, strict=True))
        if variance > 1e-18:
            scores.append((logs[token] - mean) / math.sqrt(variance))
    scores.sort()
    kept = scores[: max(1, int(len(scores) * share))]
    return sum(kept) / len(kept)


def statistics(predictions, tokens):
    p = np.array(predictions)
    logs = np.log(p)
    means = (p * logs).sum(1)
    deviations = np.sqrt(np.maximum((p * (logs - means[:, None]) ** 2).sum(1), 0))
    return logs[np.arange(len(tokens)), tokens], means, deviations


@pytest.mark.parametrize("share", [0.1, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("length", [1, 4, 23])
def test_a_score_is_that_of_the_reference(length, share):
    rng = np.random.default_rng(length)
    predictions = rng.dirichlet(np.full(7, 0.4), length) * 0.98 + 0.02 / 7
    tokens = rng.integers(7, size=length)
    found = g.min_k_plus_plus(*statistics(predictions, tokens), share)
    assert found == pytest.approx(reference(predictions.tolist(), tokens.tolist(), share), abs=1e-12)


def test_a_text_that_is_always_the_likeliest_token_scores_higher_than_a_random_one():
    predictions = np.random.default_rng(0).dirichlet(np.full(9, 0.5), 40) * 0.99 + 0.01 / 9
    known = g.min_k_plus_plus(*statistics(predictions, predictions.argmax(1)))
    random_text = g.min_k_plus_plus(*statistics(predictions, np.random.default_rng(1).integers(9, size=40)))
    assert known > 0 > random_text


def test_a_prediction_without_deviation_is_left_out():
    assert g.min_k_plus_plus([-1.0, -2.0, -3.0], [-1.0, -1.0, -1.0], [0.0, 0.5, 2.0], share=1.0) == -1.5
    assert math.isnan(g.min_k_plus_plus([-1.0], [-1.0], [0.0]))


def test_the_tenth_with_the_highest_scores_is_removed():
    rng = random.Random(0)
    scores = [rng.random() for _ in range(29)]
    removed = g.likely_members(scores)
    assert sorted(np.flatnonzero(removed)) == sorted(sorted(range(29), key=lambda i: -scores[i])[:2])
    assert g.likely_members(scores, 0).sum() == 0
    assert g.likely_members([1.0, 1.0, 1.0, 0.0], 0.5).tolist() == [True, True, False, False]
    assert g.likely_members([math.nan, 2.0, 3.0, math.nan], 0.5).tolist() == [False, True, True, False]
    assert g.likely_members([0.5] * 10, 0.1).tolist() == [True] + [False] * 9


def test_bad_input():
    for given, words in (
        (([-1.0], [-1.0, -1.0], [1.0]), "lengths 1, 2, 1"),
        (([], [], []), "log_probs is empty"),
        (([-1.0], [np.nan], [1.0]), "means holds NaN"),
    ):
        with pytest.raises(ValueError, match=words):
            g.min_k_plus_plus(*given)
    with pytest.raises(ValueError, match="share is 0"):
        g.min_k_plus_plus([-1.0], [-1.0], [1.0], share=0)
    with pytest.raises(ValueError, match="share is 1"):
        g.likely_members([1.0], share=1)
    with pytest.raises(ValueError, match="one per text"):
        g.likely_members([[1.0]])
