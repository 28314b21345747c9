import numpy as np
import pytest

from moetrain import grokking as g
from moetrain.grokking.estimate import difference_of_means


def test_mean_of_samples_leaves_out_what_is_not_a_number():
    estimate = g.mean_of_samples([1.0, np.nan, 2.0, 6.0])
    assert (estimate.mean, estimate.samples, estimate.pairs) == (3.0, 3, 0)
    assert 1 <= estimate.low < 3 < estimate.high <= 6


def test_mean_of_nothing_is_not_a_number():
    estimate = g.mean_of_samples([np.nan, np.nan])
    assert np.isnan([estimate.mean, estimate.low, estimate.high]).all()
    assert estimate.samples == 0


def test_interval_has_the_width_of_normal_theory():
    values = np.random.default_rng(0).normal(5, 2, size=400)
    estimate = g.mean_of_samples(values)
    half = 1.96 * values.std() / 20
    assert estimate.high - estimate.mean == pytest.approx(half, rel=0.1)
    assert estimate.mean - estimate.low == pytest.approx(half, rel=0.1)


def test_difference_has_the_width_of_normal_theory_and_resamples_both_sides():
    rng = np.random.default_rng(1)
    a, b = rng.normal(3, 2, size=300), rng.normal(1, 1, size=500)
    estimate = difference_of_means(a, b)
    assert estimate.mean == pytest.approx(a.mean() - b.mean())
    expected = 2 * 1.96 * np.sqrt(a.var() / 300 + b.var() / 500)
    assert estimate.high - estimate.low == pytest.approx(expected, rel=0.1)
    assert estimate.samples == 800


def test_estimate_cannot_be_changed():
    with pytest.raises(AttributeError):
        g.mean_of_samples([1.0]).mean = 2.0
