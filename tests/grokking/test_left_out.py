"""Leave-one-out accuracy, compared with regressions that are fitted without the sample."""

import numpy as np
import pytest

from moetrain.grokking import left_out

S, L, E = 40, 3, 6


def routed(answers, noise, seed=0):
    """Routing [S, L, E] of one answer token per sample: a centre for each answer, plus noise."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(answers.max() + 1, L, E))
    logits = centres[answers] + noise * rng.normal(size=(len(answers), L, E))
    probs = np.exp(logits)
    return probs / probs.sum(-1, keepdims=True)


def fitted_without(routing, token, ridge):
    """[S] whether each token is predicted by a ridge regression with an intercept, solved anew without the sample.

    Minimises sum (y - b - k a)^2 + penalty a K a, its constant unpenalised, by its normal equations.
    """
    flat = routing[:, : L - 1].reshape(len(routing), -1)  # a third of three layers is one
    squares = np.array([[sum((x - y) ** 2) for y in flat] for x in flat])
    kernel = np.exp(-squares / np.median([squares[i, j] for i in range(len(flat)) for j in range(i)]))
    centring = np.eye(len(flat)) - 1 / len(flat)
    penalty = ridge * np.trace(centring @ kernel @ centring) / len(flat)
    tokens = np.unique(token)
    right = []
    for i in range(len(flat)):
        others = [j for j in range(len(flat)) if j != i]
        inner, ones = kernel[np.ix_(others, others)], np.ones((len(others), 1))
        system = np.block([[inner + penalty * np.eye(len(others)), ones], [ones.T, np.zeros((1, 1))]])
        wanted = np.array([[float(token[j] == t) for t in tokens] for j in others])
        solved = np.linalg.solve(system, np.vstack([wanted, np.zeros((1, len(tokens)))]))
        predicted = kernel[i, others] @ solved[:-1] + solved[-1]
        right.append(tokens[predicted.argmax()] == token[i])
    return np.array(right)


@pytest.mark.parametrize(("noise", "ridge"), [(0.5, 0.05), (1.5, 0.05), (1.5, 0.5), (4.0, 0.01)])
def test_equals_the_regression_without_the_sample(noise, ridge):
    token = np.random.default_rng(1).integers(0, 5, S)
    routing = routed(token, noise)
    found = left_out(routing, np.arange(S), np.zeros(S), token, ridge)
    expected = fitted_without(routing, token, ridge)
    assert 0.1 < expected.mean() <= 1
    assert found.mean == expected.mean()
    assert found.samples == S
    assert found.low < found.mean <= found.high


def test_answers_are_predicted_only_if_samples_with_one_answer_are_routed_alike():
    token = np.random.default_rng(2).integers(0, 5, S)
    alone = np.random.default_rng(3).permutation(token)
    assert left_out(routed(token, 0.1), np.arange(S), np.zeros(S), token).mean > 0.95
    assert left_out(routed(token, 0.1), np.arange(S), np.zeros(S), alone).mean < 0.4
    everywhere_alike = np.full((S, L, E), 1 / E)
    most = np.bincount(token).max() / S
    assert left_out(everywhere_alike, np.arange(S), np.zeros(S), token).mean <= most


def test_the_last_third_of_the_layers_is_not_used():
    token = np.random.default_rng(9).integers(0, 5, S)
    late = np.random.default_rng(10).random((S, 6, E))
    late /= late.sum(-1, keepdims=True)
    early = left_out(late, np.arange(S), np.zeros(S), token)
    late[:, 4:] = routed(token, 0.1)[:, :2]
    assert left_out(late, np.arange(S), np.zeros(S), token) == early
    late[:, 3] = routed(token, 0.1)[:, 0]
    assert left_out(late, np.arange(S), np.zeros(S), token).mean > early.mean


def test_every_token_of_an_answer_must_be_predicted():
    token = np.random.default_rng(4).integers(0, 4, S)
    other = np.random.default_rng(5).integers(0, 4, S)
    clear, unclear = routed(token, 0.1), routed(np.random.default_rng(6).permutation(other), 0.1)
    sample, place = np.repeat(np.arange(S), 2), np.tile([0, 1], S)
    both = np.stack([clear, unclear], 1).reshape(2 * S, L, E)
    found = left_out(both, sample, place, np.stack([token, other], 1).ravel())
    first = left_out(clear, np.arange(S), np.zeros(S), token)
    assert found.mean < first.mean
    shuffled = np.random.default_rng(7).permutation(2 * S)
    again = left_out(both[shuffled], sample[shuffled], place[shuffled], np.stack([token, other], 1).ravel()[shuffled])
    assert again == found


def test_places_that_few_samples_have_are_excluded():
    token = np.random.default_rng(8).integers(0, 4, S)
    routing = routed(token, 0.1)
    longer = np.arange(10)  # ten samples have a second answer token: too few for the regression
    found = left_out(
        np.concatenate([routing, routing[longer]]),
        np.concatenate([np.arange(S), longer]),
        np.concatenate([np.zeros(S), np.ones(10)]),
        np.concatenate([token, token[longer]]),
    )
    assert found.samples == S - 10
    nothing = left_out(routing[:10], np.arange(10), np.zeros(10), token[:10])
    assert nothing.samples == 0
    assert np.isnan(nothing.mean)


def test_arrays_that_do_not_match_are_refused():
    token = np.zeros(S, int)
    with pytest.raises(ValueError, match="two answer tokens at place 0"):
        left_out(routed(token, 1.0), np.zeros(S), np.zeros(S), token)
    with pytest.raises(ValueError, match="one of each for 40 tokens"):
        left_out(routed(token, 1.0), np.arange(S - 1), np.zeros(S), token)
    with pytest.raises(ValueError, match="NaN"):
        left_out(np.full((S, L, E), np.nan), np.arange(S), np.zeros(S), token)
