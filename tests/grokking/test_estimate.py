import numpy as np
import pytest

from moetrain import grokking as g


def test_mean_of_samples_excludes_nan():
    estimate = g.mean_of_samples([1.0, np.nan, 2.0, 6.0])
    assert (estimate.mean, estimate.samples, estimate.pairs) == (3.0, 3, 0)
    assert 1 <= estimate.low < 3 < estimate.high <= 6


def test_mean_of_nothing_is_nan():
    estimate = g.mean_of_samples([np.nan, np.nan])
    assert np.isnan([estimate.mean, estimate.low, estimate.high]).all()
    assert estimate.samples == 0


def test_interval_has_the_width_of_normal_theory():
    values = np.random.default_rng(0).normal(5, 2, size=400)
    estimate = g.mean_of_samples(values)
    half = 1.96 * values.std() / 20
    assert estimate.high - estimate.mean == pytest.approx(half, rel=0.1)
    assert estimate.mean - estimate.low == pytest.approx(half, rel=0.1)


def test_estimate_cannot_be_changed():
    with pytest.raises(AttributeError):
        g.mean_of_samples([1.0]).mean = 2.0


def test_the_jackknife_of_a_mean_has_its_standard_error():
    """For a mean and groups of equal size, the jackknife error is exactly the standard error of the group means."""
    values = np.random.default_rng(0).normal(size=64)
    estimate = g.jackknife(lambda which: float(values[which].mean()), 64, seed=3)
    groups = np.random.default_rng(3).permutation(64).reshape(8, 8)  # group n: every eighth from the nth
    means = values[groups].mean(0)
    reach = 2.3646242510102993 * means.std(ddof=1) / np.sqrt(8)
    assert estimate.mean == values.mean()
    assert (estimate.low, estimate.high) == pytest.approx((values.mean() - reach, values.mean() + reach))
    assert (estimate.samples, estimate.pairs) == (64, 0)


def test_the_jackknife_interval_has_its_nominal_coverage():
    """In 300 draws of a variance, about 95% of the intervals contain the true one."""
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(300):
        values = rng.normal(size=64)
        estimate = g.jackknife(lambda which, x=values: float(x[which].var(ddof=1)), 64)
        held += estimate.low <= 1 <= estimate.high
    assert 0.90 < held / 300 < 0.99


def test_too_few_samples_have_no_jackknife_interval():
    few = g.jackknife(lambda which: float(len(which)), 15)
    assert few.mean == 15.0
    assert np.isnan([few.low, few.high]).all()
