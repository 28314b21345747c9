"""When is a training sample memorized? (paper, section 3) And the gap that says so while the run goes on.

Losses are in nats per predicted token. Suffixes: S samples, T readings of the tracked panel, in order of time.
"""

from dataclasses import dataclass
from itertools import count as count_from

import numpy as np

from ._arrays import Arrayish, Bools, Floats, Ints, finite, to_float64
from ._onsets import NEVER, first_true, from_then_on, group_by_onset, readings, uncensored
from .estimate import Estimate, difference_of_means

DELTA = 0.05  # nats
WINDOW = 3  # readings
MIN_TAIL_IN_RUNS = 3  # readings
LEAST_CELL = 64
LEAST_READINGS = 10


@dataclass(frozen=True, slots=True)
class OnlineAgreement:
    """Counts of samples that the online rule and the paper's rule call memorized at the end of a run.

    `lag` is the mean number of readings by which the online rule spoke later, over `both`; NaN where that is 0.
    """

    both: int
    only_online: int
    only_paper: int
    neither: int
    lag: float

    @property
    def share(self) -> float:
        """Share of samples on which the rules agree."""
        return (self.both + self.neither) / (self.both + self.only_online + self.only_paper + self.neither)


def memorized_at(losses: Arrayish, eps: float, delta: float = DELTA, min_tail: int = 0) -> int | None:
    """Reading t* at which one sample of a finished run is memorized, or None (paper's rule).

    losses [T]. t* is the first reading from which on loss <= eps and |loss - last loss| <= delta, both in nats. An
    onset with fewer than `min_tail` later readings is censored, because the second condition holds trivially at the
    end: None. Raises ValueError for losses that are empty or not finite, and for negative delta or min_tail.
    """
    onset = int(memorized_onsets(finite(losses, "losses", "readings")[None], eps, delta, min_tail)[0])
    return None if onset == NEVER else onset


def memorized_onsets(losses: Arrayish, eps: float, delta: float = DELTA, min_tail: int = 0) -> Ints:
    """[S] `memorized_at` for losses [S, T] of many samples, -1 where it is None."""
    losses_ST = readings(losses, "losses")
    holds_ST = (losses_ST <= eps) & _settled(losses_ST, delta)
    return uncensored(first_true(from_then_on(holds_ST)), losses_ST.shape[1], min_tail)


def memorized_groups(losses: Arrayish, eps: float, delta: float = DELTA, min_tail: int = 0) -> dict[int, Ints]:
    """Train groups `Pretrain@t*`: indices of the samples memorized at one reading, by that reading (paper).

    Arguments and errors as `memorized_onsets`; samples without an onset are in no group.
    """
    return group_by_onset(memorized_onsets(losses, eps, delta, min_tail))


def choose_eps(
    losses: Arrayish, share: float = 0.2, delta: float = DELTA, min_tail: int = 0, grid: float = 0.1
) -> float | None:
    """The smallest eps, in nats, on a grid with which `share` of the seen samples have an uncensored onset.

    losses [S, T] of a finished run. Returns a multiple of `grid`, at least one, or None where no eps suffices.
    Raises ValueError as `memorized_onsets`, and for share outside (0, 1] or a grid that is not positive.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}: a share of the samples, above 0 and up to 1")
    if not grid > 0:
        raise ValueError(f"grid is {grid}: a step in nats, above 0")
    losses_ST = readings(losses, "losses")
    samples, count = losses_ST.shape
    # A larger eps only ever makes onsets earlier, so a sample asks of eps no more than its loosest uncensored onset
    # does: the latest one, with exactly min_tail readings after it.
    settled_S = uncensored(first_true(from_then_on(_settled(losses_ST, delta))), count, min_tail) != NEVER
    least_S = np.sort(losses_ST[settled_S, count - 1 - min_tail :].max(axis=1))
    needed = int(np.ceil(share * samples - 1e-9))  # 0.55 * 100 is 55.00000000000001
    if len(least_S) < needed:
        return None
    least = float(least_S[needed - 1])
    # Start below the quotient, whose rounding may go either way, and take the first that reaches the loss.
    on_grid = (round(step * grid, 12) for step in count_from(max(1, int(least / grid) - 1)))
    return next(eps for eps in on_grid if eps >= least)


def memorized_now(losses: Arrayish, eps: float, delta: float = DELTA, window: int = WINDOW) -> Bools:
    """[S] the online rule (a choice of this project): memorized as far as the newest reading tells?

    losses [S, T] up to now; only the last `window` readings count. True where all of them have loss <= eps and differ
    from the newest by at most delta; so it is undone when a condition breaks, and False before `window` readings.
    Raises ValueError as `memorized_onsets`, and for a window below 1.
    """
    losses_ST = readings(losses, "losses")
    if window < 1:
        raise ValueError(f"window is {window}: a number of readings, 1 or more")
    if losses_ST.shape[1] < window:
        return np.zeros(len(losses_ST), dtype=np.bool_)
    newest_ST = losses_ST[:, -window:]
    return from_then_on((newest_ST <= eps) & _settled(newest_ST, delta))[:, 0]


def memorized_fraction(losses: Arrayish, eps: float | None, delta: float = DELTA, window: int = WINDOW) -> float | None:
    """Share of samples memorized by the online rule; None without eps, and before `window` readings exist.

    Arguments and errors as `memorized_now`.
    """
    losses_ST = readings(losses, "losses")
    if eps is None or losses_ST.shape[1] < window:
        return None
    return float(memorized_now(losses_ST, eps, delta, window).mean())


def online_agreement(
    losses: Arrayish, eps: float, delta: float = DELTA, window: int = WINDOW, min_tail: int = MIN_TAIL_IN_RUNS
) -> OnlineAgreement:
    """How the online rule, read at every reading of a finished run, agrees with the paper's rule.

    losses [S, T]. A sample counts as memorized online if it is so at the last reading; the online onset is the
    reading from which on it stayed so. Errors as `memorized_now`.
    """
    losses_ST = readings(losses, "losses")
    online_ST = np.stack(
        [memorized_now(losses_ST[:, : t + 1], eps, delta, window) for t in range(losses_ST.shape[1])], axis=1
    )
    online_S = first_true(from_then_on(online_ST))
    paper_S = memorized_onsets(losses_ST, eps, delta, min_tail)
    by_online, by_paper = online_S != NEVER, paper_S != NEVER
    both = by_online & by_paper
    return OnlineAgreement(
        both=int(both.sum()),
        only_online=int((by_online & ~by_paper).sum()),
        only_paper=int((by_paper & ~by_online).sum()),
        neither=int((~by_online & ~by_paper).sum()),
        lag=float((online_S - paper_S)[both].mean()) if both.any() else float("nan"),
    )


def memorized_gap(unmet: Arrayish, seen: Arrayish, seed: int = 0) -> Estimate:
    """Mean loss of samples the run has not met minus mean loss of samples it has: nats, above 0 where it memorizes.

    unmet [S_u]: losses of samples to come (`memorized/gap`) or held out (`memorized/gap_heldout`); seen [S_s]; all
    read at one step. Returns Estimate with both cells resampled; all NaN where a cell is empty, as where copies of
    every text span the stream. Raises ValueError for losses that are not finite.
    """
    return difference_of_means(_cell(unmet, "unmet"), _cell(seen, "seen"), seed)


def too_few(samples: int, readings_so_far: int) -> bool:
    """Whether a curve must carry "too few": fewer than 64 samples in a cell or fewer than 10 readings in the run."""
    return samples < LEAST_CELL or readings_so_far < LEAST_READINGS


def _settled(losses_ST: Floats, delta: float) -> Bools:
    """[S, T] whether a loss is within delta of the last."""
    if not delta >= 0:
        raise ValueError(f"delta is {delta}: a difference of losses in nats, 0 or more")
    return np.abs(losses_ST - losses_ST[:, -1:]) <= delta


def _cell(losses: Arrayish, name: str) -> Floats:
    """Losses of a cell of the panel, [S] with S = 0 allowed."""
    losses_S = to_float64(losses).ravel()
    return finite(losses_S, name, "samples") if len(losses_S) else losses_S
