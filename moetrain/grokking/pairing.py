"""Which training group does a test group follow, and after what delay? (paper: matching of groups)

Suffixes: S training samples, I probe items, D width of a text embedding, M train groups, N test groups.
"""

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from ._arrays import Arrayish, Floats, Ints, finite


@dataclass(frozen=True, slots=True)
class GroupPair:
    """A train group `Pretrain@memorized_at` and a test group `Test@generalized_at`, each by index of its reading."""

    memorized_at: int
    generalized_at: int
    similarity: float  # mean cosine of the text embeddings over pairs, -1 to 1
    samples: int
    items: int


@dataclass(frozen=True, slots=True)
class ReadingTimes:
    """Optimizer steps done and tokens trained on at each reading, ascending."""

    steps: Sequence[int]
    tokens: Sequence[int]


@dataclass(frozen=True, slots=True)
class Delay:
    """t# - t*: above 0 where generalization follows memorization. The error is less than the resolution."""

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
    """Groups of one domain matched one to one, with the largest total mean pairwise cosine (Hungarian matching).

    Args:
        train_groups, test_groups: rows of the embeddings by onset, as `memorized_groups` and `generalized_groups`
            return them.
        train_embeddings, test_embeddings: [S, D] and [I, D] text embeddings of one model.

    Returns:
        The pairs in order of t*. Surplus groups of the larger side stay unpaired.

    Raises:
        ValueError: embeddings that are empty, not finite, zero, or of different width.
    """
    if not train_groups or not test_groups:
        return []
    train_SD, test_ID = _unit(train_embeddings, "train_embeddings"), _unit(test_embeddings, "test_embeddings")
    if train_SD.shape[1] != test_ID.shape[1]:
        raise ValueError(
            f"train_embeddings are {train_SD.shape[1]} wide, test_embeddings {test_ID.shape[1]}: use one encoder"
        )
    train_onsets, test_onsets = sorted(train_groups), sorted(test_groups)
    # The mean cosine over pairs is the inner product of the means of the unit vectors.
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
    """Delay of one pair, in steps and tokens; panel and probes may be read at different times.

    An onset lies between its reading and the one before it (or the start of the run). So the resolution is the larger
    of these two distances.

    Raises:
        ValueError: times of unequal length or not ascending, or an onset beyond them.
    """
    memorized, memorized_gap = _time(panel, pair.memorized_at, "panel")
    generalized, generalized_gap = _time(probe, pair.generalized_at, "probe")
    steps, tokens = (generalized - memorized).tolist()
    steps_resolution, tokens_resolution = np.maximum(memorized_gap, generalized_gap).tolist()
    return Delay(steps, tokens, steps_resolution, tokens_resolution)


def mean_delay(pairs: Sequence[GroupPair], panel: ReadingTimes, probe: ReadingTimes) -> Delay | None:
    """Delay of a domain (ours): mean over its pairs, weighted by probe items, and the same mean of the resolutions.

    None without pairs. Errors as `delay`.
    """
    if not pairs:
        return None
    delays = np.array([astuple(delay(pair, panel, probe)) for pair in pairs])
    return Delay(*np.average(delays, axis=0, weights=[pair.items for pair in pairs]).tolist())


def _unit(embeddings: Arrayish, name: str) -> Floats:
    rows = finite(embeddings, name, "rows, width")
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    if (lengths == 0).any():
        raise ValueError(f"{name} holds a zero vector, which has no direction: exclude texts without tokens")
    return rows / lengths


def _time(times: ReadingTimes, reading: int, name: str) -> tuple[Floats, Floats]:
    """(steps, tokens) at a reading, and their distance from the reading before."""
    if len(times.steps) != len(times.tokens):
        raise ValueError(
            f"{name} has {len(times.steps)} steps and {len(times.tokens)} tokens: pass one of each per reading"
        )
    if not 0 <= reading < len(times.steps):
        raise ValueError(f"{name} has {len(times.steps)} readings, the pair's onset is {reading}: pass all readings")
    clock = np.array([times.steps, times.tokens], dtype=np.float64)
    since = np.diff(clock, axis=1, prepend=0.0)
    if (since[:, 1:] <= 0).any() or (since[:, 0] < 0).any():
        raise ValueError(f"{name} times do not ascend: pass readings in order of time")
    return clock[:, reading], since[:, reading]
