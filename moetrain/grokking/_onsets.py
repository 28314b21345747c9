"""Onsets: the reading from which on a condition holds. Shared by memorization and generalization.

Suffixes: S samples, T readings in order of time.
"""

import numpy as np

from ._arrays import Bools, Ints

NEVER = -1  # no onset, or a censored one: too few readings follow it


def uncensored(onsets_S: Ints, count: int, min_tail: int) -> Ints:
    """Onsets [S] among `count` readings, `NEVER` where fewer than `min_tail` readings follow the onset."""
    if min_tail < 0:
        raise ValueError(f"min_tail is {min_tail}: a number of readings, 0 or more")
    return np.where(onsets_S + min_tail < count, onsets_S, NEVER)


def first_true(holds_ST: Bools) -> Ints:
    """[S] first reading at which a condition holds, `NEVER` where it never does."""
    return np.where(holds_ST.any(axis=1), holds_ST.argmax(axis=1), NEVER)


def from_then_on(holds_ST: Bools) -> Bools:
    """[S, T] whether a condition holds at this reading and at all later ones."""
    return np.logical_and.accumulate(holds_ST[:, ::-1], axis=1)[:, ::-1]


def group_by_onset(onsets_S: Ints) -> dict[int, Ints]:
    """Sample indices by onset, in ascending order of onset. Samples without an onset are in no group."""
    return {int(onset): np.flatnonzero(onsets_S == onset) for onset in np.unique(onsets_S) if onset != NEVER}
