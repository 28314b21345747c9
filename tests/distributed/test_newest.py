"""The newest samples of each group over all ranks."""

import numpy as np
import pytest

from moetrain.distributed.mesh import ParallelLayout
from moetrain.distributed.newest import among_newest
from tests.distributed.layouts import in_ranks


@pytest.mark.parametrize(("ranks", "samples"), [(2, 1000), (3, 40), (3, 2), (2, 0)])
def test_each_rank_finds_its_samples_among_the_newest_of_all(ranks, samples):
    rng = np.random.default_rng(samples)
    groups, size = 5, 8
    order = rng.choice(10**12, samples, replace=False)
    group = rng.choice(groups - 1, samples)  # one group has none
    rank = rng.choice(ranks, samples)
    expected = {n for g in range(groups) for n in np.sort(order[group == g])[-size:].tolist()}
    held = []
    for number in range(ranks):  # a rank holds its own newest
        own = [o for g in range(groups) for o in np.sort(order[(group == g) & (rank == number)])[-size:].tolist()]
        held.append(np.array(own, np.int64))
    group_of = dict(zip(order.tolist(), group.tolist(), strict=True))

    def newest(layout):
        own = held[layout.rank]
        own_groups = np.array([group_of[each] for each in own.tolist()], np.int64)
        return own[among_newest(own, own_groups, groups, size, layout)].tolist()

    found = in_ranks(ranks, newest)
    assert {each for part in found for each in part} == expected
    assert sum(map(len, found)) == len(expected)


def test_all_samples_of_a_single_rank_are_among_the_newest():
    assert among_newest(np.arange(3), np.zeros(3, np.int64), 1, 3, ParallelLayout()).tolist() == [True] * 3
