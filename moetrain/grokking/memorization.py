"""Memorization: when a training sample is memorized (paper, section 3).

Losses are in nats per predicted token. Suffixes: S samples, T readings of the panel, in order of time.
"""

import math
from dataclasses import dataclass
from itertools import count as count_from

import numpy as np

from ._arrays import Arrayish, Bools, Floats, Ints, finite, to_float64
from ._onsets import NEVER, first_true, from_then_on, group_by_onset, uncensored
from .estimate import Estimate

DELTA = 0.05  # nats
WINDOW = 3  # readings
MIN_TAIL_IN_RUNS = 3  # readings
LEAST_CELL = 64  # samples
LEAST_READINGS = 10
UNSEEN_BELOW = 0.05  # share of the samples not trained on that lie below the online rule's own eps
LEAST_UNSEEN = 20  # samples not trained on that this eps needs: one of them lies below
_NORMAL_95 = 1.959963984540054


@dataclass(frozen=True, slots=True)
class OnlineAgreement:
    """Numbers of samples that the online rule and the paper's rule call memorized at the end of a run.

    `lag`: mean number of readings by which the online onset is later, over the `both` samples; NaN without any.
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
    """Reading t* at which one sample of a finished run is memorized, or None (paper, section 3).

    t* is the first reading from which on loss <= eps and |loss - last loss| <= delta.

    Args:
        losses: [T].
        eps, delta: nats.
        min_tail: an onset with fewer later readings than this is censored (None): near the end of a run the second
            condition holds trivially.

    Raises:
        ValueError: losses that are empty or not finite, or negative delta or min_tail.
    """
    onset = int(memorized_onsets(finite(losses, "losses", "readings")[None], eps, delta, min_tail)[0])
    return None if onset == NEVER else onset


def memorized_onsets(losses: Arrayish, eps: float, delta: float = DELTA, min_tail: int = 0) -> Ints:
    """[S] `memorized_at` of many samples, from losses [S, T]; -1 where it is None."""
    losses_ST = _losses(losses)
    holds_ST = (losses_ST <= eps) & _near_last(losses_ST, delta)
    return uncensored(first_true(from_then_on(holds_ST)), losses_ST.shape[1], min_tail)


def memorized_groups(losses: Arrayish, eps: float, delta: float = DELTA, min_tail: int = 0) -> dict[int, Ints]:
    """Train groups `Pretrain@t*`: indices of the samples memorized at one reading, by that reading (paper).

    Samples without an onset are in no group. Arguments and errors as `memorized_onsets`.
    """
    return group_by_onset(memorized_onsets(losses, eps, delta, min_tail))


def choose_eps(
    losses: Arrayish, share: float = 0.2, delta: float = DELTA, min_tail: int = 0, grid: float = 0.1
) -> float | None:
    """The smallest eps on a grid for which `share` of the samples have an uncensored onset, or None if there is none.

    Args:
        losses: [S, T] of a finished run.
        grid: nats; eps is a multiple of it, at least one.

    Raises:
        ValueError: as `memorized_onsets`, and for share outside (0, 1] or a grid that is not positive.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}: a share of the samples, above 0 and up to 1")
    if not grid > 0:
        raise ValueError(f"grid is {grid}: a step in nats, above 0")
    losses_ST = _losses(losses)
    samples, count = losses_ST.shape
    # A larger eps only moves onsets earlier. So the least eps with which a sample has an uncensored onset is its
    # largest loss over the shortest tail allowed: the last min_tail + 1 readings.
    settled_S = uncensored(first_true(from_then_on(_near_last(losses_ST, delta))), count, min_tail) != NEVER
    least_S = np.sort(losses_ST[settled_S, count - 1 - min_tail :].max(axis=1))
    needed = int(np.ceil(share * samples - 1e-9))  # 0.55 * 100 is 55.00000000000001
    if len(least_S) < needed:
        return None
    least = float(least_S[needed - 1])
    # Start one step below the quotient, which may be rounded either way, and take the first multiple not below it.
    on_grid = (round(step * grid, 12) for step in count_from(max(1, int(least / grid) - 1)))
    return next(eps for eps in on_grid if eps >= least)


def online_eps(losses: Arrayish, unseen: Arrayish) -> Floats:
    """[T] eps of the online rule where none is set: the loss that 95% of the samples not trained on exceed (ours).

    At each reading it is the 5% quantile of the losses, at this reading, of the samples that have not been trained on
    by then. So a twentieth of texts like these lie below it without having been trained on. It uses no later reading.

    Args:
        losses: [U, T] of samples of the domain that were held out, or are still to come, in nats.
        unseen: [U, T] whether a sample had not been trained on at a reading.

    Returns:
        eps at each reading; NaN where fewer than 20 samples are unseen.

    Raises:
        ValueError: losses that are not finite, or arrays of different shapes.
    """
    losses_UT, unseen_UT = to_float64(losses), np.asarray(unseen, dtype=np.bool_)
    if losses_UT.ndim != 2 or losses_UT.shape != unseen_UT.shape:
        raise ValueError(f"losses {losses_UT.shape} and unseen {unseen_UT.shape}: pass [samples, readings] of both")
    if not losses_UT.size:
        return np.full(losses_UT.shape[1], np.nan)
    finite(losses_UT, "losses", "samples, readings")
    enough_T = unseen_UT.sum(axis=0) >= LEAST_UNSEEN
    each = (
        np.quantile(losses_U[unseen_U], UNSEEN_BELOW) if enough else np.nan
        for losses_U, unseen_U, enough in zip(losses_UT.T, unseen_UT.T, enough_T, strict=True)
    )
    return np.array(list(each), dtype=np.float64)


def memorized_now(losses: Arrayish, eps: Arrayish, delta: float = DELTA, window: int = WINDOW) -> Bools:
    """[S] whether each sample counts as memorized at the newest reading: the online rule (ours).

    True where the last `window` losses are all <= eps and within delta of the newest, so a later reading may undo it.
    False before there are `window` readings.

    Args:
        losses: [S, T] up to now.
        eps: nats, one number, or one for each reading [T]; no loss is <= NaN.

    Raises:
        ValueError: as `memorized_onsets`, and for a window below 1.
    """
    losses_ST = _losses(losses)
    if window < 1:
        raise ValueError(f"window is {window}: a number of readings, 1 or more")
    if losses_ST.shape[1] < window:
        return np.zeros(len(losses_ST), dtype=np.bool_)
    newest_ST, eps_T = losses_ST[:, -window:], np.broadcast_to(to_float64(eps), losses_ST.shape[1:])[-window:]
    return from_then_on((newest_ST <= eps_T) & _near_last(newest_ST, delta))[:, 0]


def memorized_fraction(memorized: Arrayish, documents: np.ndarray) -> Estimate:
    """Share of samples that are memorized, with Wilson's 95% interval for as many trials as there are documents.

    Samples of one document count as one trial, as if they all depended on each other: the interval is too wide rather
    than too narrow.

    Args:
        memorized: bool [S].
        documents: [S] ids of their documents; `samples` counts them.
    """
    memorized_S, n = np.asarray(memorized, dtype=np.bool_), len(np.unique(documents))
    if not len(memorized_S):
        return Estimate.undefined()
    share, z = float(memorized_S.mean()), _NORMAL_95
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Estimate(share, max(0.0, centre - half), min(1.0, centre + half), n, 0)


def online_agreement(
    losses: Arrayish, eps: float, delta: float = DELTA, window: int = WINDOW, min_tail: int = MIN_TAIL_IN_RUNS
) -> OnlineAgreement:
    """Agreement of the online rule, applied at every reading of a finished run, with the paper's rule.

    A sample is memorized online if it is at the last reading; its online onset is the reading from which on it stayed
    so. Losses [S, T]; errors as `memorized_now`.
    """
    losses_ST = _losses(losses)
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


def too_few(samples: int, readings_so_far: int) -> bool:
    """Whether a curve is marked "too few": fewer than 64 samples in a cell, or fewer than 10 readings."""
    return samples < LEAST_CELL or readings_so_far < LEAST_READINGS


def _losses(losses: Arrayish) -> Floats:
    return finite(losses, "losses", "samples, readings")


def _near_last(losses_ST: Floats, delta: float) -> Bools:
    """[S, T] whether a loss is within delta of the last."""
    if not delta >= 0:
        raise ValueError(f"delta is {delta}: a difference of losses in nats, 0 or more")
    return np.abs(losses_ST - losses_ST[:, -1:]) <= delta
