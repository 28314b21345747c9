import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain import grokking as g

from . import references as ref


def random_features(samples, layers, hidden=5, seed=0):
    return np.random.default_rng(seed).normal(size=(samples, layers, hidden))


# Kernel and effective dimension


@pytest.mark.parametrize("with_features", [False, True])
def test_routing_kernel_matches_the_loops(with_features):
    weights, features = ref.random_weights(5, 3, 6), random_features(5, 3)
    kernel = g.routing_kernel(weights, features if with_features else None)
    for i in range(5):
        for j in range(5):
            expected = 0.0
            for layer in range(3):
                inner = sum(x * y for x, y in zip(features[i, layer], features[j, layer], strict=True))
                for expert in range(6):
                    expected += weights[i, layer, expert] * weights[j, layer, expert] * (inner if with_features else 1)
            assert kernel[i, j] == pytest.approx(expected, rel=1e-12)


@settings(deadline=None)
@given(ref.weights_strategy())
def test_routing_kernel_is_symmetric_and_positive_semidefinite(weights):
    kernel = g.routing_kernel(weights)
    np.testing.assert_array_equal(kernel, kernel.T)
    assert np.linalg.eigvalsh(kernel).min() > -1e-12


@given(st.floats(1e-4, 1e3), st.integers(1, 20))
def test_effective_dimension_of_the_identity(lam, samples):
    assert g.effective_dimension(np.eye(samples), lam) == pytest.approx(samples / (1 + lam))


@pytest.mark.parametrize("lam", [1e-3, 0.1, 5.0])
def test_effective_dimension_is_the_trace_of_its_formula(lam):
    kernel = g.routing_kernel(ref.random_weights(9, 2, 4))
    assert g.effective_dimension(kernel, lam) == pytest.approx(
        np.trace(kernel @ np.linalg.inv(kernel + lam * np.eye(9)))
    )


def test_effective_dimension_counts_clusters():
    clusters = np.repeat(np.eye(8)[:, None, :], 10, axis=0)  # 80 samples in 8 clusters
    assert g.effective_dimension(g.routing_kernel(clusters), 1e-9) == pytest.approx(8)


def test_d_eff_is_taken_on_64_samples_at_the_standard_ridge():
    weights, features = ref.random_weights(80, 3, 6), random_features(80, 3)
    for given_features in (None, features):
        kernel = g.routing_kernel(weights, given_features)[:64, :64]
        lam = 0.01 * np.trace(kernel) / 64
        assert g.d_eff(weights, given_features) == pytest.approx(
            np.trace(kernel @ np.linalg.inv(kernel + lam * np.eye(64)))
        )
    # Its level therefore does not depend on the scale of features, nor on samples beyond 64.
    assert g.d_eff(weights, 1000 * features) == pytest.approx(g.d_eff(weights, features))
    assert g.d_eff(weights) == g.d_eff(weights[:64])


def test_d_eff_without_64_samples_or_without_weight_is_nan():
    assert math.isnan(g.d_eff(ref.random_weights(63, 2, 4)))
    assert math.isnan(g.d_eff(np.zeros((64, 2, 4))))


def test_risk_bound_is_its_formula():
    kernel = g.routing_kernel(ref.random_weights(7, 2, 5))
    targets = np.random.default_rng(0).normal(size=7)
    lam, noise, delta, c1, c2 = 0.3, 0.7, 0.1, 2.0, 3.0
    inverse = np.linalg.inv(kernel + lam * np.eye(7))
    bound = g.risk_bound(kernel, targets, lam, noise, delta, c1, c2)
    assert bound.bias == pytest.approx(c1 * lam**2 / 7 * targets @ inverse @ inverse @ targets)
    assert bound.variance == pytest.approx(c2 * noise**2 * (np.trace(kernel @ inverse) + math.log(1 / delta)) / 7)
    assert bound.total == bound.bias + bound.variance


# Spread, effective rank, CKA


def test_spread_matches_the_loops():
    weights = ref.random_weights(6, 3, 4)
    layers = []
    for layer in range(3):
        columns = [[weights[i, layer, e] for i in range(6)] for e in range(4)]
        layers.append(sum(sum((x - sum(c) / 6) ** 2 for x in c) / 6 for c in columns))
    assert g.spread(weights) == pytest.approx(sum(layers) / 3, rel=1e-12)


def test_effective_rank_matches_the_gram_matrix():
    weights = ref.random_weights(6, 3, 4)
    rows = [np.concatenate(w) for w in weights]
    mean = sum(rows) / 6
    gram = np.array([[(a - mean) @ (b - mean) for b in rows] for a in rows])
    eigenvalues = np.linalg.eigvals(gram).real
    shares = [v / eigenvalues.sum() for v in eigenvalues if v > 1e-12]
    assert g.effective_rank(weights) == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)), rel=1e-9)


def test_effective_rank_of_one_direction_and_of_all():
    start, end = np.array([0.7, 0.2, 0.1]), np.array([0.1, 0.3, 0.6])
    line = np.stack([start + t * (end - start) for t in np.linspace(0, 1, 9)])[:, None, :]
    assert g.effective_rank(line) == pytest.approx(1)
    assert g.effective_rank(np.eye(7)[:, None, :]) == pytest.approx(6)


def test_effective_rank_does_not_change_when_differences_shrink_but_spread_does():
    weights = ref.random_weights(8, 2, 5)
    shrunk = weights.mean(axis=0) + 0.1 * (weights - weights.mean(axis=0))
    assert g.effective_rank(shrunk) == pytest.approx(g.effective_rank(weights))
    assert g.spread(shrunk) == pytest.approx(0.01 * g.spread(weights))


def test_layer_cka_matches_its_form_in_gram_matrices():
    weights = ref.random_weights(7, 4, 5)
    grams = []
    for layer in range(4):
        centred = weights[:, layer] - weights[:, layer].mean(axis=0)
        grams.append(np.array([[sum(a * b) for b in centred] for a in centred]))
    values = [
        sum((k * m).ravel()) / math.sqrt(sum((k * k).ravel()) * sum((m * m).ravel()))
        for k, m in itertools.pairwise(grams)
    ]
    assert g.layer_cka(weights) == pytest.approx(sum(values) / 3, rel=1e-12)


@settings(deadline=None)
@given(ref.weights_strategy(min_samples=2))
def test_ranges(weights):
    assert 0 <= g.spread(weights) <= 1
    rank, cka = g.effective_rank(weights), g.layer_cka(weights)
    assert math.isnan(rank) or 1 - 1e-9 <= rank <= len(weights) - 1 + 1e-9
    assert math.isnan(cka) or -1e-9 <= cka <= 1 + 1e-9


def test_permuting_the_experts_of_a_layer_changes_nothing():
    weights = ref.random_weights(9, 4, 6)
    rng = np.random.default_rng(0)
    renamed = np.stack([weights[:, layer, rng.permutation(6)] for layer in range(4)], axis=1)
    np.testing.assert_allclose(g.routing_kernel(renamed), g.routing_kernel(weights), rtol=1e-12)
    for function in (g.spread, g.effective_rank, g.layer_cka):
        assert function(renamed) == pytest.approx(function(weights), rel=1e-10)


def test_layers_that_agree_have_cka_one():
    layer = ref.random_weights(9, 1, 6)
    assert g.layer_cka(np.concatenate([layer, layer[:, :, ::-1]], axis=1)) == pytest.approx(1)


# Degenerate input


def test_one_sample_has_no_value():
    weights = ref.random_weights(1, 3, 4)
    assert math.isnan(g.spread(weights))
    assert math.isnan(g.effective_rank(weights))
    assert math.isnan(g.layer_cka(weights))
    assert g.routing_kernel(weights).shape == (1, 1)


@pytest.mark.parametrize("seed", range(10))
def test_equal_samples_have_no_spread_and_no_directions(seed):
    weights = np.repeat(ref.random_weights(1, 3, 7, seed=seed), 13, axis=0)
    assert g.spread(weights) == pytest.approx(0, abs=1e-30)
    assert math.isnan(g.effective_rank(weights))
    assert math.isnan(g.layer_cka(weights))


def test_one_layer_has_no_cka_and_a_constant_layer_is_excluded():
    weights = ref.random_weights(8, 4, 5)
    assert math.isnan(g.layer_cka(weights[:, :1]))
    silent = weights.copy()
    silent[:, 3] = silent[0, 3]
    assert g.layer_cka(silent) == pytest.approx(g.layer_cka(weights[:, :3]))


good = ref.random_weights(4, 2, 3)


@pytest.mark.parametrize("function", [g.routing_kernel, g.d_eff, g.spread, g.effective_rank, g.layer_cka])
@pytest.mark.parametrize(
    ("weights", "words"),
    [
        (good * np.nan, "weights holds NaN"),
        (-good, "weights holds negative"),
        (good[0], "weights has shape"),
        (good[:0], "weights is empty"),
    ],
)
def test_errors_name_the_weights(function, weights, words):
    with pytest.raises(ValueError, match=words):
        function(weights)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: g.routing_kernel(good, random_features(4, 3)), "features has 4 samples and 3 layers"),
        (lambda: g.routing_kernel(good, random_features(4, 2) * np.inf), "features holds NaN or infinite"),
        (lambda: g.d_eff(good, random_features(4, 2)[0]), "features has shape"),
        (lambda: g.effective_dimension(np.eye(3), 0), "lam is 0"),
        (lambda: g.effective_dimension(np.eye(3), float("nan")), "lam is nan"),
        (lambda: g.effective_dimension(np.ones((2, 3)), 1), "kernel .* is not square"),
        (lambda: g.effective_dimension([[1.0, 0.5], [0.0, 1.0]], 1), "kernel .* is not square and symmetric"),
        (lambda: g.risk_bound(np.eye(3), np.ones(2), 1), "targets has 2 values"),
        (lambda: g.risk_bound(np.eye(3), np.ones(3), 1, delta=0), "delta is 0"),
    ],
)
def test_errors_name_the_other_arguments(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_d_eff_by_layer_is_that_of_each_layer_alone():
    weights = np.random.default_rng(3).dirichlet(np.ones(5), (70, 4))
    features = np.random.default_rng(4).normal(size=(70, 4, 6))
    for given_features in (None, features):
        found = g.d_eff_by_layer(weights, given_features)
        alone = [g.d_eff(weights[:, [n]], None if given_features is None else given_features[:, [n]]) for n in range(4)]
        assert np.allclose(found, alone, rtol=1e-12)
    assert np.isnan(g.d_eff_by_layer(weights[:63])).tolist() == [True] * 4


def test_d_eff_with_its_interval_is_d_eff():
    weights = np.random.default_rng(5).dirichlet(np.ones(5), (64, 4))
    estimate = g.d_eff_estimate(weights)
    assert estimate.mean == g.d_eff(weights)
    assert estimate.low < estimate.mean < estimate.high
    short = g.d_eff_estimate(weights[:40])
    assert np.isnan([short.mean, short.low, short.high]).all()
    assert short.samples == 40
