"""When is a probe item generalized? (paper, section 3)

Suffixes: S items, T readings of the probes, in order of time.
"""

import numpy as np

from ._arrays import Arrayish, Ints, to_float64
from ._onsets import NEVER, first_true, group_by_onset, readings, uncensored


def generalized_at(correct: Arrayish, min_mean: float = 0.8, max_errors: int = 1, min_tail: int = 0) -> int | None:
    """Reading t# at which one probe item is generalized, or None (paper's rule).

    correct [T], true or false (1 or 0). t# is the first reading where the item is right and from which on its mean
    accuracy exceeds `min_mean` with at most `max_errors` wrong. An onset with fewer than `min_tail` later readings is
    censored: None. Raises ValueError for input that is empty or neither 0 nor 1, and for negative limits.
    """
    onset = int(generalized_onsets(to_float64(correct)[None], min_mean, max_errors, min_tail)[0])
    return None if onset == NEVER else onset


def generalized_onsets(correct: Arrayish, min_mean: float = 0.8, max_errors: int = 1, min_tail: int = 0) -> Ints:
    """[S] `generalized_at` for answers [S, T] to many items, -1 where it is None."""
    correct_ST = readings(correct, "correct")
    if not np.isin(correct_ST, (0, 1)).all():
        raise ValueError("correct holds values other than 0 and 1: pass whether each answer was right, not a score")
    if max_errors < 0 or min_mean < 0:
        raise ValueError(f"max_errors is {max_errors} and min_mean {min_mean}: neither may be negative")
    count = correct_ST.shape[1]
    remaining_T = np.arange(count, 0, -1)
    right_ST = np.cumsum(correct_ST[:, ::-1], axis=1)[:, ::-1]
    holds_ST = (correct_ST == 1) & (right_ST / remaining_T > min_mean) & (remaining_T - right_ST <= max_errors)
    return uncensored(first_true(holds_ST), count, min_tail)


def generalized_groups(
    correct: Arrayish, min_mean: float = 0.8, max_errors: int = 1, min_tail: int = 0
) -> dict[int, Ints]:
    """Test groups `Test@t#`: indices of the items generalized at one reading, by that reading (paper).

    Arguments and errors as `generalized_onsets`; items without an onset are in no group.
    """
    return group_by_onset(generalized_onsets(correct, min_mean, max_errors, min_tail))
