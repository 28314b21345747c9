import math

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr

from moetrain import grokking as g

KEYS = [(s, m) for s in ("raw", "differences", "residuals") for m in ("pearson", "spearman")]


def series(n=20, rho=0.7, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=n)
    y = rho * x + math.sqrt(1 - rho**2) * rng.normal(size=n)
    return x, y, 1000.0 * np.arange(1, n + 1)


def derived(x, y, tokens):
    log = np.log(tokens)
    return {
        "raw": (x, y),
        "differences": (np.diff(x), np.diff(y)),
        "residuals": tuple(v - np.polyval(np.polyfit(log, v, 1), log) for v in (x, y)),
    }


@pytest.mark.parametrize("seed", range(5))
def test_values_match_scipy(seed):
    x, y, tokens = series(seed=seed)
    x[3] = x[7]  # a tie
    table = g.correlate(x, y, tokens)
    assert list(table) == KEYS
    for name, (a, b) in derived(x, y, tokens).items():
        assert table[name, "pearson"].value == pytest.approx(pearsonr(a, b).statistic, abs=1e-9)
        assert table[name, "spearman"].value == pytest.approx(spearmanr(a, b).statistic, abs=1e-9)
        assert table[name, "pearson"].n == len(a)
        assert table[name, "pearson"].note == ""


def test_p_is_the_share_of_rotations():
    x, y, tokens = series(n=12, rho=0.4, seed=3)
    table = g.correlate(x, y, tokens)
    for name, (a, b) in derived(x, y, tokens).items():
        for method, statistic in (("pearson", pearsonr), ("spearman", spearmanr)):
            found = abs(statistic(a, b).statistic)
            rotations = [abs(statistic(a, np.roll(b, k)).statistic) for k in range(len(b))]
            assert table[name, method].p == pytest.approx(sum(r >= found - 1e-12 for r in rotations) / len(b))


def test_p_of_unrelated_noise_has_its_nominal_false_positive_rate():
    ps = [g.correlate(*series(n=20, rho=0, seed=s))["raw", "pearson"].p for s in range(200)]
    assert np.mean(np.array(ps) <= 0.1) == pytest.approx(0.1, abs=0.06)
    assert min(ps) >= 1 / 20


def test_interval_covers_the_true_correlation():
    tables = [g.correlate(*series(n=60, rho=0.6, seed=s)) for s in range(80)]
    covered = np.mean([t["raw", "pearson"].low <= 0.6 <= t["raw", "pearson"].high for t in tables])
    assert 0.85 <= covered <= 0.99
    assert all(t["raw", "spearman"].low <= t["raw", "spearman"].value <= t["raw", "spearman"].high for t in tables)


def test_series_with_trends_alone_correlate_only_raw():
    rng = np.random.default_rng(0)
    tokens = 1000.0 * np.arange(1, 41)
    x = np.log(tokens) + 0.05 * rng.normal(size=40)
    y = -2 * np.log(tokens) + 0.05 * rng.normal(size=40)
    table = g.correlate(x, y, tokens)
    assert table["raw", "pearson"].value < -0.98
    assert abs(table["residuals", "pearson"].value) < 0.4
    assert table["residuals", "spearman"].p > 0.05


@pytest.mark.parametrize(("n", "notes"), [(7, ("too few",) * 3), (8, ("", "too few", "")), (9, ("", "", ""))])
def test_too_few(n, notes):
    table = g.correlate(*series(n=n))
    for name, note in zip(("raw", "differences", "residuals"), notes, strict=True):
        row = table[name, "spearman"]
        assert row.note == note
        assert math.isnan(row.value) == math.isnan(row.low) == math.isnan(row.high) == math.isnan(row.p) == bool(note)


def test_no_readings_are_too_few():
    assert {row.note for row in g.correlate([], [], []).values()} == {"too few"}


def test_series_that_do_not_vary_are_constant():
    x, y, tokens = series()
    assert {r.note for r in g.correlate(np.full(20, 0.1), y, tokens).values()} == {"constant"}
    line = g.correlate(0.1 + 0.3 * np.log(tokens), y, tokens)
    assert (line["raw", "pearson"].note, line["residuals", "pearson"].note) == ("", "constant")
    steps = g.correlate(x, 0.1 * np.arange(20), tokens)
    assert (steps["raw", "pearson"].note, steps["differences", "pearson"].note) == ("", "constant")


def test_readings_that_are_not_finite_are_excluded():
    x, y, tokens = series(n=14)
    x_holes, y_holes = x.copy(), y.copy()
    x_holes[2], y_holes[9] = np.nan, np.inf
    kept = [i for i in range(14) if i not in (2, 9)]
    assert g.correlate(x_holes, y_holes, tokens) == g.correlate(x[kept], y[kept], tokens[kept])


def test_same_seed_same_result():
    case = series()
    assert g.correlate(*case, seed=1) == g.correlate(*case, seed=1)
    assert g.correlate(*case, seed=1) != g.correlate(*case, seed=2)


def test_first_above_chance():
    # With 100 items at .35 the standard error is .048: .346 is just below, .35 just above .25 plus two of them.
    assert g.first_above_chance([0.2, 0.35, 0.35, 0.35], 0.25, 100) == 1
    assert g.first_above_chance([0.2, 0.34, 0.35, 0.35, 0.35], 0.25, 100) == 2
    assert g.first_above_chance([0.9, 0.9, 0.2, 0.9, 0.9, 0.9], 0.25, 100) == 3
    assert g.first_above_chance([0.9, 0.9], 0.25, 100) is None
    assert g.first_above_chance([0.0] * 5, 0.0, 100) is None
    assert g.first_above_chance([0.3] * 5, 0.25, 10_000) == 0


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: g.correlate([1, 2], [1, 2, 3], [1, 2]), "x, y, tokens have lengths 2, 3, 2"),
        (lambda: g.correlate([1, 2], [1, 2], [0, 2]), "tokens are not positive"),
        (lambda: g.correlate([1, 2], [1, 2], [2, 1]), "tokens are not positive and ascending"),
        (lambda: g.first_above_chance([90.0], 0.25, 100), "accuracies and chance"),
        (lambda: g.first_above_chance([math.nan], 0.25, 100), "accuracies and chance"),
        (lambda: g.first_above_chance([0.9], 0.25, 0), "items is 0"),
    ],
)
def test_errors_name_the_argument(call, words):
    with pytest.raises(ValueError, match=words):
        call()
