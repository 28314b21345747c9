"""When is a probe item generalized? (paper, section 3)

Suffixes: S items, T readings of the probes, in order of time.
"""

import numpy as np

from ._arrays import Arrayish, Ints, finite, to_float64
from ._onsets import NEVER, first_true, group_by_onset, uncensored


def generalized_at(correct: Arrayish, min_mean: float = 0.8, max_errors: int = 1, min_tail: int = 0) -> int | None:
    """Reading t# at which one probe item is generalized, or None (paper, section 3).

    t# is the first reading at which the item is answered correctly and from which on its mean accuracy exceeds
    `min_mean` with at most `max_errors` wrong answers.

    Args:
        correct: [T], whether the answer was correct (bool, or 0 and 1).
        min_tail: an onset with fewer later readings than this is censored: None.

    Raises:
        ValueError: `correct` is empty or holds values other than 0 and 1, or a limit is negative.
    """
    onset = int(generalized_onsets(to_float64(correct)[None], min_mean, max_errors, min_tail)[0])
    return None if onset == NEVER else onset


def generalized_onsets(correct: Arrayish, min_mean: float = 0.8, max_errors: int = 1, min_tail: int = 0) -> Ints:
    """[S] `generalized_at` of many items, from answers [S, T]; -1 where it is None."""
    correct_ST = finite(correct, "correct", "samples, readings")
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

    Items without an onset are in no group. Arguments and errors as `generalized_onsets`.
    """
    return group_by_onset(generalized_onsets(correct, min_mean, max_errors, min_tail))
