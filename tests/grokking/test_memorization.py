import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moetrain import grokking as g

losses_strategy = st.lists(st.integers(0, 12).map(lambda v: v / 8), min_size=1, max_size=9)
tables_strategy = st.integers(1, 9).flatmap(
    lambda count: st.lists(
        st.lists(st.integers(0, 30).map(lambda v: v / 16), min_size=count, max_size=count), min_size=1, max_size=8
    )
)


def memorized_by_loop(losses, eps, delta, min_tail):
    for t in range(len(losses)):
        if all(x <= eps and abs(x - losses[-1]) <= delta for x in losses[t:]):
            return t if len(losses) - 1 - t >= min_tail else None
    return None


@given(losses_strategy, st.integers(0, 12).map(lambda v: v / 8), st.sampled_from([0, 0.125, 0.3]), st.integers(0, 4))
def test_memorized_at_matches_the_loop(losses, eps, delta, min_tail):
    assert g.memorized_at(losses, eps, delta, min_tail) == memorized_by_loop(losses, eps, delta, min_tail)


def test_memorized_at_by_hand():
    assert g.memorized_at([3, 1, 0.5, 0.52, 0.5], eps=1) == 2
    assert g.memorized_at([3, 1, 0.5, 0.52, 0.5], eps=0.51) == 4  # the one above eps invalidates those before
    assert g.memorized_at([3, 1, 0.5, 0.6, 0.5], eps=1) == 4  # .6 is too far from the end
    assert g.memorized_at([3, 3, 3], eps=1) is None
    assert g.memorized_at([3, 1, 0.5, 0.52, 0.5], eps=1, min_tail=2) == 2
    assert g.memorized_at([3, 1, 0.5, 0.52, 0.5], eps=1, min_tail=3) is None
    assert type(g.memorized_at(np.ones(3), eps=1)) is int


@given(tables_strategy, st.integers(0, 3))
def test_onsets_and_groups_are_memorized_at_of_each_sample(table, min_tail):
    expected = [memorized_by_loop(row, 1.0, 0.25, min_tail) for row in table]
    assert g.memorized_onsets(table, 1.0, 0.25, min_tail).tolist() == [-1 if t is None else t for t in expected]
    groups = g.memorized_groups(table, 1.0, 0.25, min_tail)
    assert list(groups) == sorted({t for t in expected if t is not None})
    for onset, members in groups.items():
        assert members.tolist() == [i for i, t in enumerate(expected) if t == onset]


@given(tables_strategy, st.sampled_from([0.2, 0.5, 1.0]), st.integers(0, 3), st.sampled_from([0.1, 0.25]))
def test_choose_eps_matches_the_search(table, share, min_tail, grid):
    def enough(eps):
        found = sum(memorized_by_loop(row, eps, 0.25, min_tail) is not None for row in table)
        return found >= share * len(table) - 1e-9

    eps = g.choose_eps(table, share, 0.25, min_tail, grid)
    on_grid = [round(step * grid, 12) for step in range(1, 25)]
    assert eps == next((e for e in on_grid if enough(e)), None)


def test_choose_eps_counts_shares_exactly():
    # 55% of 100 is 55, though 0.55 * 100 is 55.00000000000001 in floating point.
    assert g.choose_eps([[0.25] * 5] * 55 + [[5.0] * 5] * 45, share=0.55) == 0.3
    table = [[0.25] * 5] * 7 + [[5.0] * 5] * 28
    assert g.choose_eps(table) == 0.3
    assert g.choose_eps([*table[1:], [5.0] * 5]) == 5.0


def test_choose_eps_takes_a_loss_on_the_grid_itself():
    for steps in range(1, 200):
        assert g.choose_eps([[steps / 10] * 4]) == steps / 10
        assert g.choose_eps([[steps / 100] * 4], grid=0.01) == steps / 100
        above = np.nextafter(steps / 10, np.inf)
        assert g.choose_eps([[above] * 4]) == (steps + 1) / 10
        assert g.choose_eps([[above - 2e-9] * 4]) == steps / 10


def test_choose_eps_without_settled_samples_is_none():
    assert g.choose_eps([[5.0, 4.0, 3.0, 2.0, 1.0]] * 10, min_tail=1) is None
    assert g.choose_eps([[0.5, 0.5]] * 10, min_tail=5) is None


# Online


@given(tables_strategy, st.integers(1, 4))
def test_memorized_now_matches_the_loop(table, window):
    expected = [
        len(row) >= window and all(x <= 1.0 and abs(x - row[-1]) <= 0.25 for x in row[-window:]) for row in table
    ]
    assert g.memorized_now(table, 1.0, 0.25, window).tolist() == expected


def test_memorized_now_can_be_undone_and_uses_the_window_only():
    assert g.memorized_now([[0.5, 0.5]], eps=1).tolist() == [False]
    assert g.memorized_now([[0.5, 0.5]], eps=1, window=2).tolist() == [True]
    steady, jump = [3, 0.5, 0.5, 0.5], [3, 0.5, 0.5, 0.5, 0.7]
    assert g.memorized_now([steady], eps=1).tolist() == [True]
    assert g.memorized_now([jump], eps=1).tolist() == [False]
    assert g.memorized_now([[*jump[1:], 0.7, 0.7]], eps=1).tolist() == [True]


@given(tables_strategy, st.integers(1, 4), st.integers(0, 2**31))
def test_memorized_now_takes_an_eps_for_each_reading(table, window, seed):
    eps = np.random.default_rng(seed).choice([0.5, 1.0, 1.5, math.nan], len(table[0]))
    expected = [
        len(row) >= window
        and all(x <= e and abs(x - row[-1]) <= 0.25 for x, e in zip(row[-window:], eps[-window:], strict=True))
        for row in table
    ]
    assert g.memorized_now(table, eps, 0.25, window).tolist() == expected


def test_online_eps_is_the_loss_that_19_of_20_unseen_samples_exceed():
    rng = np.random.default_rng(0)
    losses = rng.normal(4, 1, (2000, 3))
    unseen = rng.random((2000, 3)) < 0.5
    found = g.online_eps(losses, unseen)
    for t in range(3):
        own = losses[unseen[:, t], t]
        assert (own <= found[t]).mean() == pytest.approx(0.05, abs=0.001)
    few = np.zeros((30, 2), bool)
    few[:19] = True
    few[19, 1] = True
    assert np.isfinite(g.online_eps(losses[:30, :2], few)).tolist() == [False, True]
    assert np.isnan(g.online_eps(np.zeros((0, 3)), np.zeros((0, 3)))).tolist() == [True] * 3


@given(tables_strategy, st.integers(0, 2**31))
def test_online_eps_uses_no_later_reading(table, seed):
    losses = np.tile(np.array(table), (30, 1))
    unseen = np.random.default_rng(seed).random(losses.shape) < 0.8
    whole = g.online_eps(losses, unseen)
    for t in range(losses.shape[1]):
        np.testing.assert_array_equal(g.online_eps(losses[:, : t + 1], unseen[:, : t + 1]), whole[: t + 1])


def test_the_memorized_fraction_counts_documents():
    from scipy.stats import binomtest

    memorized = [True] * 6 + [False] * 14
    each = g.memorized_fraction(memorized, np.arange(20))
    wilson = binomtest(6, 20).proportion_ci(method="wilson")
    assert (each.mean, each.samples) == (0.3, 20)
    assert (each.low, each.high) == pytest.approx((wilson.low, wilson.high))
    shared = g.memorized_fraction(memorized, np.repeat(np.arange(5), 4))
    assert (shared.mean, shared.samples) == (0.3, 5)
    assert shared.low < each.low
    assert shared.high > each.high
    none = g.memorized_fraction(np.zeros(20, bool), np.arange(20))
    assert (none.mean, none.low) == (0.0, 0.0)
    assert none.high > 0.1
    assert math.isnan(g.memorized_fraction([], np.zeros(0)).mean)


def test_each_sample_counts_by_itself():
    table = [[3, 0.5, 0.5, 0.5], [3, 0.5, 0.5, 0.9], [3, 2, 2, 2], [0.2, 0.2, 0.2, 0.2]]
    assert g.memorized_now(table, eps=1).tolist() == [True, False, False, True]


def test_online_agreement():
    early = [3, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]  # paper 1, online from reading 3
    late = [3, 3, 3, 3, 0.5, 0.5, 0.5]  # paper: censored, because 3 later readings are needed; online from 6
    never = [3, 3, 3, 3, 3, 3, 3]
    agreement = g.online_agreement([early, early, late, never], eps=1)
    assert (agreement.both, agreement.only_online, agreement.only_paper, agreement.neither) == (2, 1, 0, 1)
    assert (agreement.lag, agreement.share) == (2.0, 0.75)
    assert g.online_agreement([late], eps=1, min_tail=2).both == 1
    assert math.isnan(g.online_agreement([never], eps=1).lag)


@given(tables_strategy)
def test_online_agreement_is_the_replay_of_the_run(table):
    count = len(table[0])
    histories = [[bool(g.memorized_now([row[: t + 1]], 1.0, 0.25)[0]) for t in range(count)] for row in table]
    online = [next((t for t in range(count) if all(h[t:])), None) for h in histories]
    paper = [memorized_by_loop(row, 1.0, 0.25, 3) for row in table]
    agreement = g.online_agreement(table, 1.0, 0.25)
    lags = [o - p for o, p in zip(online, paper, strict=True) if o is not None and p is not None]
    assert agreement.both == len(lags)
    assert agreement.only_online == sum(o is not None and p is None for o, p in zip(online, paper, strict=True))
    assert agreement.only_paper == sum(o is None and p is not None for o, p in zip(online, paper, strict=True))
    assert agreement.neither == len(table) - agreement.both - agreement.only_online - agreement.only_paper
    assert math.isnan(agreement.lag) if not lags else agreement.lag == pytest.approx(np.mean(lags))


@pytest.mark.parametrize(("samples", "count", "expected"), [(64, 10, False), (63, 10, True), (64, 9, True)])
def test_too_few(samples, count, expected):
    assert g.too_few(samples, count) is expected


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: g.memorized_at([], 1.0), "losses is empty"),
        (lambda: g.memorized_at([1.0, math.nan], 1.0), "losses holds NaN"),
        (lambda: g.memorized_at([[1.0]], 1.0), "losses has shape"),
        (lambda: g.memorized_at([1.0], 1.0, delta=-1), "delta is -1"),
        (lambda: g.memorized_at([1.0], 1.0, min_tail=-1), "min_tail is -1"),
        (lambda: g.memorized_onsets([1.0], 1.0), "losses has shape"),
        (lambda: g.choose_eps([[1.0]], share=0), "share is 0"),
        (lambda: g.choose_eps([[1.0]], grid=0), "grid is 0"),
        (lambda: g.memorized_now([[1.0]], 1.0, window=0), "window is 0"),
        (lambda: g.online_eps([[1.0]], [[True, False]]), r"losses \(1, 1\) and unseen \(1, 2\)"),
        (lambda: g.online_eps([[math.nan]], [[True]]), "losses holds NaN"),
    ],
)
def test_errors_name_the_argument(call, words):
    with pytest.raises(ValueError, match=words):
        call()
