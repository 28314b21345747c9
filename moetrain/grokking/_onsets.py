"""What memorization and generalization share: arrays of readings, and groups of samples with one onset.

Suffixes: S samples, T readings.
"""

import numpy as np

from ._arrays import Arrayish, Bools, Floats, Ints, finite

NEVER = -1  # no onset, or one censored for want of later readings


def readings(value: Arrayish, name: str) -> Floats:
    """[S, T] readings as float64; raises ValueError as `finite`."""
    return finite(value, name, "samples, readings")


def uncensored(onsets_S: Ints, count: int, min_tail: int) -> Ints:
    """Onsets [S] of `count` readings with `NEVER` where fewer than `min_tail` readings follow."""
    if min_tail < 0:
        raise ValueError(f"min_tail is {min_tail}: a number of readings, 0 or more")
    return np.where(onsets_S + min_tail < count, onsets_S, NEVER)


def first_true(holds_ST: Bools) -> Ints:
    """[S] first reading at which a condition holds, `NEVER` where it does at none."""
    return np.where(holds_ST.any(axis=1), holds_ST.argmax(axis=1), NEVER)


def from_then_on(holds_ST: Bools) -> Bools:
    """[S, T] whether a condition holds at this reading and all later ones."""
    return np.logical_and.accumulate(holds_ST[:, ::-1], axis=1)[:, ::-1]


def group_by_onset(onsets_S: Ints) -> dict[int, Ints]:
    """Sample indices by onset, in ascending order of onset; samples without one are in no group."""
    return {int(onset): np.flatnonzero(onsets_S == onset) for onset in np.unique(onsets_S) if onset != NEVER}
