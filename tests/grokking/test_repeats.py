"""The worth of a repeat and its forecast, on made-up effects."""

import math

import numpy as np
import pytest

from moetrain import grokking as g


def test_worth_is_the_ratio_of_the_effects_and_its_interval_covers_it():
    rng = np.random.default_rng(0)
    held = []
    for _ in range(300):
        repeated, fresh = rng.normal(0.3, 0.4, 60), rng.normal(0.6, 0.4, 80)
        worth = g.repeat_worth(repeated, fresh, np.arange(60), np.arange(80))
        assert worth.mean == pytest.approx(repeated.mean() / fresh.mean())
        assert worth.samples == 140
        held.append(worth.low <= 0.5 <= worth.high)
    assert 0.92 <= np.mean(held) <= 0.985


def test_repeats_that_harm_are_below_0_and_fresh_text_without_effect_gives_no_worth():
    one = np.arange(20)
    noise = 0.01 * np.sin(one)
    assert g.repeat_worth(-1 + noise, 1 + noise, one, one).high < 0
    assert math.isnan(g.repeat_worth(1 + noise, noise, one, one).mean)
    assert math.isnan(g.repeat_worth(1 + noise, -1 + noise, one, one).mean)
    assert math.isnan(g.repeat_worth([1.0, 2.0], [1.0, 2.0], np.array([3, 3]), np.array([1, 2])).mean)


@pytest.mark.parametrize("level", [0.5, 0.1])
def test_the_budget_of_an_exact_curve(level):
    passes = np.array([1.0, 4.0, 8.0, 16.0])
    budget = g.repeat_budget(passes, np.exp(-((passes / 12) ** 2)), np.full(4, 0.05), level)
    exact = 12 * math.sqrt(-math.log(level))
    assert budget.mean == pytest.approx(exact, rel=0.01)
    assert budget.low < exact < budget.high < 2 * exact
    assert budget.samples == 4


def test_while_repeats_are_as_good_as_fresh_text_there_is_no_end():
    budget = g.repeat_budget([1, 2, 3], [1.02, 0.99, 1.01], [0.1, 0.1, 0.1])
    assert budget.high == math.inf
    assert budget.low > 3


def test_readings_without_a_worth_are_left_out():
    nan = math.nan
    some = g.repeat_budget([1, 2, 3, 4], [1.0, nan, 0.6, 0.4], [0.1, nan, 0.1, 0.1])
    assert some == g.repeat_budget([1, 3, 4], [1.0, 0.6, 0.4], [0.1, 0.1, 0.1])
    assert math.isnan(g.repeat_budget([1, 2], [0.5, nan], [0.1, 0.1]).mean)


def test_readings_that_scatter_widen_the_interval():
    passes, error = np.arange(1.0, 9), np.full(8, 0.05)
    smooth = np.exp(-((passes / 6) ** 2))
    rough = smooth + 0.3 * np.array([1, -1, 1, -1, 1, -1, 1, -1])
    width = {
        name: b.high - b.low
        for name, worth in (("smooth", smooth), ("rough", rough))
        if (b := g.repeat_budget(passes, worth, error))
    }
    assert width["rough"] > 2 * width["smooth"]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: g.repeat_budget([1, 2], [1.0], [0.1, 0.1]), "2 passes, 1 worths, 2 errors"),
        (lambda: g.repeat_budget([1, 2], [1.0, 1.0], [0.1, 0.1], level=1), "level is 1"),
        (lambda: g.repeat_worth([1.0], [1.0, math.nan], np.arange(1), np.arange(2)), "NaN"),
    ],
)
def test_errors_name_the_argument(call, words):
    with pytest.raises(ValueError, match=words):
        call()
