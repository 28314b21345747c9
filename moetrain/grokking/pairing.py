"""Which training group does a test group follow, and how long after? (paper: matching of groups, and the delay)

Suffixes: S training samples, I probe items, D width of a text embedding, M train groups, N test groups.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from ._arrays import Arrayish, Floats, Ints, finite


@dataclass(frozen=True, slots=True)
class GroupPair:
    """`Pretrain@memorized_at` and `Test@generalized_at`, by index of reading, and how alike their texts are."""

    memorized_at: int
    generalized_at: int
    similarity: float  # mean pairwise cosine, -1 to 1
    samples: int
    items: int


@dataclass(frozen=True, slots=True)
class ReadingTimes:
    """Optimizer steps done and tokens trained on at each reading, ascending."""

    steps: Sequence[int]
    tokens: Sequence[int]


@dataclass(frozen=True, slots=True)
class Delay:
    """t# - t*, positive where generalization follows memorization; the true delay lies within the resolution."""

    steps: float
    tokens: float
    steps_resolution: float
    tokens_resolution: float


def pair_groups(
    train_groups: Mapping[int, Ints],
    test_groups: Mapping[int, Ints],
    train_embeddings: Arrayish,
    test_embeddings: Arrayish,
) -> list[GroupPair]:
    """Groups of one domain paired one to one: the Hungarian matching of largest total mean pairwise cosine.

    train_groups, test_groups: rows of the embeddings by onset, as from `memorized_groups` and `generalized_groups`.
    train_embeddings [S, D], test_embeddings [I, D]: text embeddings of one model. Returns pairs in order of t*; of the
    larger side some groups stay without partner, and without groups there are no pairs.
    Raises ValueError for embeddings that are empty, not finite, zero, or of different width.
    """
    if not train_groups or not test_groups:
        return []
    train_SD, test_ID = _unit(train_embeddings, "train_embeddings"), _unit(test_embeddings, "test_embeddings")
    if train_SD.shape[1] != test_ID.shape[1]:
        raise ValueError(
            f"train_embeddings are {train_SD.shape[1]} wide, test_embeddings {test_ID.shape[1]}: use one encoder"
        )
    train_onsets, test_onsets = sorted(train_groups), sorted(test_groups)
    # The mean over pairs of cosines is the inner product of the means of unit vectors.
    means_MD = np.stack([train_SD[train_groups[onset]].mean(axis=0) for onset in train_onsets])
    means_ND = np.stack([test_ID[test_groups[onset]].mean(axis=0) for onset in test_onsets])
    similarity_MN = means_MD @ means_ND.T
    rows, columns = linear_sum_assignment(similarity_MN, maximize=True)
    return [
        GroupPair(
            memorized_at=train_onsets[row],
            generalized_at=test_onsets[column],
            similarity=float(similarity_MN[row, column]),
            samples=len(train_groups[train_onsets[row]]),
            items=len(test_groups[test_onsets[column]]),
        )
        for row, column in zip(rows.tolist(), columns.tolist(), strict=True)
    ]


def delay(pair: GroupPair, panel: ReadingTimes, probe: ReadingTimes) -> Delay:
    """Delay of one pair, in steps and tokens; the panel and the probes may be read at different times.

    An onset is only known to lie after the reading before it (or after the start of the run), so the true delay
    differs from the one returned by less than the larger of these two distances: the resolution.
    Raises ValueError for times of unequal length, not ascending, or without the reading of the pair.
    """
    at, at_gap = _time(panel, pair.memorized_at, "panel")
    then, then_gap = _time(probe, pair.generalized_at, "probe")
    steps, tokens = (then - at).tolist()
    steps_resolution, tokens_resolution = np.maximum(at_gap, then_gap).tolist()
    return Delay(steps, tokens, steps_resolution, tokens_resolution)


def mean_delay(pairs: Sequence[GroupPair], panel: ReadingTimes, probe: ReadingTimes) -> Delay | None:
    """Delay of a domain (a choice of this project): mean over its pairs, each weighing its probe items; None without.

    The resolution is the same mean of theirs. Errors as `delay`.
    """
    if not pairs:
        return None
    delays = [delay(pair, panel, probe) for pair in pairs]
    rows = np.array([[d.steps, d.tokens, d.steps_resolution, d.tokens_resolution] for d in delays])
    return Delay(*np.average(rows, axis=0, weights=[pair.items for pair in pairs]).tolist())


def _unit(embeddings: Arrayish, name: str) -> Floats:
    rows = finite(embeddings, name, "rows, width")
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    if (lengths == 0).any():
        raise ValueError(f"{name} holds a zero vector, which has no direction: leave out texts without tokens")
    return rows / lengths


def _time(times: ReadingTimes, reading: int, name: str) -> tuple[Floats, Floats]:
    """(steps, tokens) at a reading, and since the one before it."""
    if len(times.steps) != len(times.tokens):
        raise ValueError(
            f"{name} has {len(times.steps)} steps and {len(times.tokens)} tokens: pass one of each a reading"
        )
    if not 0 <= reading < len(times.steps):
        raise ValueError(f"{name} has {len(times.steps)} readings, the pair's onset is {reading}: pass all readings")
    clock = np.array([times.steps, times.tokens], dtype=np.float64)
    since = np.diff(clock, axis=1, prepend=0.0)
    if (since[:, 1:] <= 0).any() or (since[:, 0] < 0).any():
        raise ValueError(f"{name} times do not ascend: pass readings in order of time")
    return clock[:, reading], since[:, reading]
