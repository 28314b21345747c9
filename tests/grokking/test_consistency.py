import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain import grokking as g

from . import references as ref


def random_case(samples=5, layers=4, experts=6, hidden=7, seed=0):
    rows = np.random.default_rng(seed).normal(size=(layers, experts, hidden))
    return ref.random_weights(samples, layers, experts, seed=seed), rows


def rows_with_cosines(cosines):
    """One expert per layer, with rows at angles that give these cosines."""
    angles = np.cumsum([0.0, *np.arccos(cosines)])
    return np.stack([np.cos(angles), np.sin(angles)], axis=-1)[:, None, :]


def test_gram_blocks_are_inner_products_in_float32():
    _, rows = random_case()
    own, following = g.gram_blocks(rows)
    assert own.dtype == following.dtype == np.float32
    assert (own.shape, following.shape) == ((4, 6, 6), (3, 6, 6))
    for layer in range(4):
        for a in range(6):
            for b in range(6):
                assert own[layer, a, b] == pytest.approx(sum(rows[layer, a] * rows[layer, b]), rel=1e-6, abs=1e-6)
                if layer < 3:
                    expected = sum(rows[layer, a] * rows[layer + 1, b])
                    assert following[layer, a, b] == pytest.approx(expected, rel=1e-6, abs=1e-6)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 6), st.integers(2, 5), st.integers(1, 6), st.integers(2, 9), st.integers(0, 10**6))
def test_all_curves_match_the_loops(samples, layers, experts, hidden, seed):
    weights, rows = random_case(samples, layers, experts, hidden, seed)
    cosines = [ref.layer_cosines(w, rows) for w in weights]
    np.testing.assert_allclose(g.layer_cosines(weights, rows), cosines, atol=1e-4)
    np.testing.assert_allclose(g.cosine(weights, rows), [sum(c) / len(c) for c in cosines], atol=1e-4)
    np.testing.assert_allclose(g.max_cosine(weights, rows), [max(c) for c in cosines], atol=1e-4)
    if min(abs(max(c)) for c in cosines) > 0.01:
        expected = [1 - sum(x / (max(c) + 1e-8) for x in c) / (layers - 1) for c in cosines]
        np.testing.assert_allclose(g.inconsistency(weights, rows), expected, rtol=0.02)


def test_blocks_give_the_bits_of_rows():
    weights, rows = random_case()
    blocks = g.gram_blocks(rows)
    for function in (g.layer_cosines, g.cosine, g.inconsistency, g.max_cosine):
        np.testing.assert_array_equal(function(weights, rows), function(weights, blocks))
        np.testing.assert_array_equal(function(weights, rows), function(weights, list(blocks)))


def test_a_sample_has_the_same_bits_whatever_the_other_samples():
    weights, rows = random_case(samples=37, experts=19)
    blocks = g.gram_blocks(rows)
    alone = [g.layer_cosines(weights[i : i + 1], blocks)[0] for i in range(37)]
    np.testing.assert_array_equal(g.layer_cosines(weights, blocks), alone)


def test_nested_lists_of_rows_of_two_layers_are_not_read_as_blocks():
    weights, rows = random_case(layers=2)
    np.testing.assert_array_equal(g.cosine(weights, rows.tolist()), g.cosine(weights, rows))


def test_layer_cosines_of_rows_with_known_angles():
    cosines = [0.01, -0.5, -0.4]
    weights = np.ones((1, 4, 1))
    rows = rows_with_cosines(cosines)
    np.testing.assert_allclose(g.layer_cosines(weights, rows)[0], cosines, atol=1e-6)
    assert g.cosine(weights, rows)[0] == pytest.approx(sum(cosines) / 3, abs=1e-6)
    # The specification's example of an unsafe division.
    assert g.inconsistency(weights, rows)[0] == pytest.approx(30.7, abs=0.05)
    assert g.guarded_median(g.inconsistency(weights, rows), g.max_cosine(weights, rows)).left_out == 1


def test_equal_cosines_have_no_inconsistency_whatever_their_level():
    assert g.inconsistency(np.ones((1, 3, 1)), rows_with_cosines([0.2, 0.2]))[0] == pytest.approx(0, abs=1e-5)


def test_scale_and_order_of_experts_do_not_matter():
    weights, rows = random_case()
    order = np.random.default_rng(1).permutation(6)
    for function in (g.cosine, g.inconsistency):
        np.testing.assert_allclose(function(weights[:, :, order], rows[:, order]), function(weights, rows), rtol=1e-4)
        np.testing.assert_allclose(function(weights, 1000 * rows), function(weights, rows), rtol=1e-4)


def test_one_layer_is_nan():
    weights, rows = random_case(layers=1)
    assert g.gram_blocks(rows)[1].shape == (0, 6, 6)
    for routers in (rows, g.gram_blocks(rows)):
        assert g.layer_cosines(weights, routers).shape == (5, 0)
        for function in (g.cosine, g.inconsistency, g.max_cosine):
            assert np.isnan(function(weights, routers)).tolist() == [True] * 5


@pytest.mark.parametrize("seed", range(20))
def test_a_zero_vector_is_nan_for_its_sample_only(seed):
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(3, 4, 50))
    rows[1, 2] = -rows[1, 0] - rows[1, 1]  # their mean is zero up to the rounding of the blocks
    weights = ref.random_weights(4, 3, 4, seed=seed)
    weights[2, 1] = [1 / 3, 1 / 3, 1 / 3, 0]
    for function in (g.cosine, g.inconsistency, g.max_cosine):
        assert np.isnan(function(weights, rows)).tolist() == [False, False, True, False]
    group = g.group_consistency(weights, rows)
    assert group.cosine.samples == 3
    assert group.cosine.mean == pytest.approx(np.nanmean(g.cosine(weights, rows)))
    assert group.inconsistency.samples + group.inconsistency.left_out == 4


def test_zero_weights_or_zero_rows_are_nan():
    weights, rows = random_case(samples=2)
    weights[0, 1] = 0
    assert np.isnan(g.cosine(weights, rows)).tolist() == [True, False]
    assert np.isnan(g.cosine(weights, np.zeros_like(rows))).all()


def test_a_sample_with_any_zero_vector_has_no_value_at_all():
    weights, rows = random_case(samples=2)
    weights[0, 0] = 0  # the cosines of the later layers exist
    assert np.isnan(g.layer_cosines(weights, rows)).tolist() == [[True, False, False], [False] * 3]
    for function in (g.cosine, g.inconsistency, g.max_cosine):
        assert np.isnan(function(weights, rows)).tolist() == [True, False]


def test_a_short_vector_is_not_a_zero_vector():
    rows = np.random.default_rng(0).normal(size=(2, 3, 8))
    rows[0, 1] = -rows[0, 0] * 0.99
    weights = np.array([[[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]])
    expected = math.copysign(1, rows[0, 0] @ rows[1, 0]) * abs(ref.cosine_of(rows[0, 0], rows[1, 0]))
    assert g.cosine(weights, rows)[0] == pytest.approx(expected, abs=0.02)


# Group curves


def test_guarded_median_uses_samples_above_the_guard_and_counts_the_rest():
    values = [1.0, 2.0, 3.0, 100.0, np.nan, 50.0]
    maxima = [0.9, 0.051, 0.5, 0.05, np.nan, -0.3]
    median = g.guarded_median(values, maxima)
    assert (median.median, median.samples, median.left_out) == (2.0, 3, 3)
    assert 1 <= median.low <= 2 <= median.high <= 3


def test_guarded_median_of_nothing_and_of_two():
    nothing = g.guarded_median([1.0], [0.0])
    assert np.isnan([nothing.median, nothing.low, nothing.high]).all()
    assert (nothing.samples, nothing.left_out) == (0, 1)
    two = g.guarded_median([1.0, 2.0], [0.5, 0.5])
    assert two.median == 1.5
    assert np.isnan([two.low, two.high]).all()


def test_guarded_median_needs_one_maximum_per_value():
    with pytest.raises(ValueError, match="values and maxima"):
        g.guarded_median([1.0, 2.0], [0.5])


def test_interval_of_the_median_covers_it():
    rng = np.random.default_rng(0)
    medians = [g.guarded_median(rng.exponential(size=40), np.ones(40)) for _ in range(200)]
    covered = np.mean([m.low <= math.log(2) <= m.high for m in medians])
    assert 0.88 <= covered <= 0.99


def test_group_consistency_is_its_parts():
    weights, rows = random_case(samples=30, layers=4)
    rows[1:] = rows[:1] + 0.5 * rows[1:]  # neighbouring layers alike: most samples pass the guard
    group = g.group_consistency(weights, rows, seed=3)
    values, maxima = g.inconsistency(weights, rows), g.max_cosine(weights, rows)
    assert group.cosine == g.mean_of_samples(g.cosine(weights, rows), seed=3)
    assert group.inconsistency == g.guarded_median(values, maxima, seed=3)
    assert group.consistency.median == pytest.approx(np.median(1 - values[maxima > 0.05]))
    assert group.consistency.low < group.consistency.median < group.consistency.high
    assert group.consistency.low == 1 - group.inconsistency.high


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda w, r: g.gram_blocks(r[0]), "router_rows has shape"),
        (lambda w, r: g.gram_blocks(r * np.nan), "router_rows holds NaN"),
        (lambda w, r: g.cosine(w, r[:-1]), "rows_or_blocks has blocks"),
        (lambda w, r: g.cosine(w[:, :, :-1], r), "rows_or_blocks has blocks"),
        (lambda w, r: g.cosine(-w, r), "weights holds negative"),
        (lambda w, r: g.inconsistency(w[0], r), "weights has shape"),
        (lambda w, r: g.cosine(w, tuple(b * np.inf for b in g.gram_blocks(np.ones_like(r)))), r"rows_or_blocks\[0\]"),
        (lambda w, r: g.cosine(w, (g.gram_blocks(r)[0], g.gram_blocks(r)[1] * np.nan)), r"rows_or_blocks\[1\]"),
    ],
)
def test_errors_name_the_argument(call, words):
    with pytest.raises(ValueError, match=words):
        call(*random_case())
