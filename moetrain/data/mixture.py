"""The order of samples in the stream: each at most once, domains mixed by size or by weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from moetrain.data.packing import Samples


def order_by_size(samples: Samples, seed: int, within: Sequence[float] = ()) -> np.ndarray:
    """All samples once in a seeded random order, int64 [S], so that domains are mixed by their size.

    Args:
        within: per domain, the share of the stream within which all copies of a text lie; empty: 1 for all.
    """
    order = np.random.default_rng([seed, 1]).permutation(len(samples))
    return _gather_copies(samples, order, seed, within)


def order_by_weights(
    samples: Samples, phases: Sequence[tuple[int, Sequence[float]]], seed: int, within: Sequence[float] = ()
) -> np.ndarray:
    """Samples in an order in which each part of the stream has tokens in proportion to the weights, int64.

    Each domain has its own seeded order. The stream ends when the first domain with a positive weight is exhausted;
    the rest of the other domains is not used. A domain without samples must have no weight.

    Args:
        phases: (first token of the phase in the stream, weight of each domain), in order, beginning at 0.
        within: per domain, the share of its own order within which all copies of a text lie; empty: 1 for all.
    """
    starts = np.array([start for start, _ in phases], float)
    weights = np.array([weight for _, weight in phases], float)
    shares = weights / weights.sum(1, keepdims=True)
    # due[k, d]: tokens of domain d before phase k begins.
    due = np.concatenate([np.zeros((1, shares.shape[1])), np.cumsum(np.diff(starts)[:, None] * shares[:-1], axis=0)])
    orders, times, ends = [], [], []
    for domain in range(shares.shape[1]):
        members = np.random.default_rng([seed, 2, domain]).permutation(np.flatnonzero(samples.domain == domain))
        if not len(members) and not shares[:, domain].any():
            continue
        members = _gather_copies(samples, members, seed, within)
        tokens = np.cumsum(samples.row_lengths[members]).astype(float)
        orders.append(members)
        times.append(_time_at(tokens, starts, shares[:, domain], due[:, domain], side="left"))
        ends.append(_time_at(tokens[-1:], starts, shares[:, domain], due[:, domain], side="right")[0])
    merged = np.concatenate(times)
    by_time = np.argsort(merged, kind="stable")
    return np.concatenate(orders)[by_time[merged[by_time] <= min(ends)]]


def _gather_copies(samples: Samples, order: np.ndarray, seed: int, within: Sequence[float]) -> np.ndarray:
    """Move the copies of each text together, in domains whose ``within`` is below 1.

    The copies of a text keep their relative positions, scaled to a range that begins at a random position.
    """
    place = np.arange(len(order)) / max(1, len(order))
    for domain, share in enumerate(within):
        (members,) = np.nonzero(samples.domain[order] == domain)
        if share < 1 and len(members):
            texts, text = np.unique(samples.start[order[members]], return_inverse=True)
            begin = np.random.default_rng([seed, 5, domain]).random(len(texts)) * (1 - share)
            place[members] = begin[text] + share * place[members]
    return order[np.argsort(place, kind="stable")]


def _time_at(
    tokens: np.ndarray, starts: np.ndarray, shares: np.ndarray, due: np.ndarray, side: Literal["left", "right"]
) -> np.ndarray:
    """The position in the stream, in tokens, at which a domain has had ``tokens`` tokens.

    ``left`` gives the first such position, ``right`` the last one before the domain gets more. It is infinite if the
    domain has no weight from there on.
    """
    phase = np.maximum(np.searchsorted(due, tokens, side=side) - 1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        time = starts[phase] + (tokens - due[phase]) / shares[phase]
    return np.where(shares[phase] > 0, time, np.inf)
