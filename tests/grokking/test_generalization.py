import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moetrain import grokking as g

tables_strategy = st.integers(1, 12).flatmap(
    lambda count: st.lists(
        st.lists(st.sampled_from([0, 1, 1, 1]), min_size=count, max_size=count), min_size=1, max_size=6
    )
)


def generalized_by_loop(correct, min_mean, max_errors, min_tail):
    for t in range(len(correct)):
        rest = correct[t:]
        if correct[t] and sum(rest) / len(rest) > min_mean and rest.count(0) <= max_errors:
            return t if len(rest) - 1 >= min_tail else None
    return None


@given(tables_strategy, st.sampled_from([0.5, 0.75, 0.8]), st.integers(0, 2), st.integers(0, 3))
def test_onsets_and_groups_match_the_loop(table, min_mean, max_errors, min_tail):
    expected = [generalized_by_loop(row, min_mean, max_errors, min_tail) for row in table]
    assert [g.generalized_at(row, min_mean, max_errors, min_tail) for row in table] == expected
    onsets = g.generalized_onsets(table, min_mean, max_errors, min_tail)
    assert onsets.tolist() == [-1 if t is None else t for t in expected]
    groups = g.generalized_groups(table, min_mean, max_errors, min_tail)
    assert list(groups) == sorted({t for t in expected if t is not None})
    assert {i: t for t, members in groups.items() for i in members} == {
        i: t for i, t in enumerate(expected) if t is not None
    }


def test_generalized_at_by_hand():
    assert g.generalized_at([0, 1, 1, 1, 0, 1, 1]) == 1  # 5 of 6 right
    assert g.generalized_at([0, 1, 1, 0, 1, 1]) == 4  # 4 of 5 right does not exceed 0.8
    assert g.generalized_at([1, 0, 1, 1, 1, 1, 1, 1, 1, 1, 0, 1]) == 2  # two errors from the first
    assert g.generalized_at([1, 1, 1, 0]) is None
    assert g.generalized_at([0, 0, 1]) == 2
    assert g.generalized_at([0, 0, 1], min_tail=1) is None
    assert g.generalized_at([False, True, True]) == g.generalized_at(np.array([False, True, True])) == 1


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: g.generalized_at([]), "correct is empty"),
        (lambda: g.generalized_at([0.5, 1]), "correct holds values other than 0 and 1"),
        (lambda: g.generalized_at([1, math.nan]), "correct holds NaN"),
        (lambda: g.generalized_onsets([1, 1]), "correct has shape"),
        (lambda: g.generalized_at([1], max_errors=-1), "max_errors is -1"),
        (lambda: g.generalized_at([1], min_tail=-2), "min_tail is -2"),
    ],
)
def test_errors_name_the_argument(call, words):
    with pytest.raises(ValueError, match=words):
        call()
