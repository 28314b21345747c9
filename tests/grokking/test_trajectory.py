"""Trajectories against the estimates of single readings, and fits against known curves."""

import math

import numpy as np
import pytest
from scipy import stats

from moetrain import grokking as g

from . import references as ref


def readings(count=5, samples=9, seed=0):
    """Weights of the same samples, which become more alike from reading to reading."""
    first = ref.random_weights(samples, 3, 6, seed)
    common = ref.random_weights(1, 3, 6, seed + 1)
    return [(1 - t / count) * first + t / count * common for t in range(count)]


@pytest.mark.parametrize("max_pairs", [None, 7])
def test_each_reading_has_the_estimate_of_d_path(max_pairs):
    given = readings()
    found = g.distance_trajectory(given, 0.7, max_pairs=max_pairs, seed=3)
    assert found.estimates() == [g.d_path(weights, 0.7, max_pairs=max_pairs, seed=3) for weights in given]
    assert found.replicates.shape == (1000, 5)


def test_each_reading_has_the_guarded_median_of_the_inconsistency():
    given, rng = readings(), np.random.default_rng(0)
    rows = [rng.normal(size=(3, 6, 4)) + 1 for _ in given]
    found = g.inconsistency_trajectory(given, rows)
    for weights, own, each in zip(given, rows, found.estimates(), strict=True):
        values, maxima = g.inconsistency(weights, own), g.max_cosine(weights, own)
        expected = g.guarded_median(values, maxima)
        assert each.mean == pytest.approx(expected.median)
        if not expected.left_out:
            assert (each.low, each.high) == pytest.approx((expected.low, expected.high))
    assert any(math.isfinite(each.mean) for each in found.estimates())


def test_a_statistic_leaves_out_what_is_not_a_number():
    values = np.array([[1.0, np.nan], [3.0, np.nan], [np.nan, np.nan], [5.0, 2.0]])
    found = g.statistic_trajectory(values)
    assert found.values.tolist() == [3.0, 2.0]
    assert np.nanmin(found.replicates[:, 1]) == np.nanmax(found.replicates[:, 1]) == 2.0


def test_a_line_and_its_interval_over_samples():
    rng = np.random.default_rng(1)
    times, slopes = np.array([0.0, 10.0, 20.0, 30.0, 40.0]), rng.normal(-0.5, 0.2, size=40)
    values_ST = 7 + slopes[:, None] * times  # every sample lies on a line of its own
    found = g.fit(times, g.statistic_trajectory(values_ST), first=1)
    assert found.slope.mean == pytest.approx(slopes.mean())
    expected = g.mean_of_samples(slopes)
    assert (found.slope.low, found.slope.high) == pytest.approx((expected.low, expected.high), abs=0.01)
    assert found.slope.low < slopes.mean() < found.slope.high
    assert (found.readings, found.first, found.r2) == (4, 1, pytest.approx(1))
    start, end = (7 + slopes.mean() * at for at in (10, 40))
    assert found.relative == pytest.approx((end - start) / start)
    assert found.at([100.0]) == pytest.approx(7 + slopes.mean() * 100)


def test_the_interval_over_readings_is_students():
    rng = np.random.default_rng(2)
    times = np.arange(9.0)
    values = 3 - 0.1 * times + rng.normal(size=9) * 0.2
    found = g.fit(times, g.Trajectory(values, values[None].repeat(4, 0), 4, 0))
    line = stats.linregress(times, values)
    half = stats.t.ppf(0.975, 7) * line.stderr
    assert (found.low_over_readings, found.high_over_readings) == pytest.approx((line.slope - half, line.slope + half))
    assert found.slope.low == pytest.approx(found.slope.high)


def test_a_quadratic_is_found_again():
    times = np.arange(6.0)
    values = 2 * times**2 - 3 * times + 1
    found = g.fit(times, g.Trajectory(values, values[None], 1, 0), degree=2)
    assert found.coefficients == pytest.approx((2, -3, 1))
    assert found.r2 == pytest.approx(1)


def test_too_few_readings_have_no_fit():
    trajectory = g.statistic_trajectory([[1.0, 2.0, 3.0]] * 3)
    assert g.fit([1, 2, 3], trajectory, first=1) is None
    assert g.fit([1, 2, 3], trajectory, degree=2) is None
    assert g.fit([1, 2, 3], trajectory).slope.mean == pytest.approx(1)


def test_readings_of_other_samples_are_an_error():
    with pytest.raises(ValueError, match=r"readings have \[4, 9\] samples"):
        g.distance_trajectory([*readings(2), ref.random_weights(4, 3, 6)])
    with pytest.raises(ValueError, match="readings have no samples"):
        g.distance_trajectory([])
