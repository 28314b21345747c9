"""The order in which a run meets its samples: each at most once, domains by size or by weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from moetrain.data.packing import Samples


def order_by_size(samples: Samples, seed: int, within: Sequence[float] = ()) -> np.ndarray:
    """All samples once, in one seeded order, int64 [S]: each domain's share of the stream is its size.

    Args:
        within: by domain, the share of the stream that all copies of one text lie within; none: 1 for all.
    """
    order = np.random.default_rng([seed, 1]).permutation(len(samples))
    return _gather_copies(samples, order, seed, within)


def order_by_weights(
    samples: Samples, phases: Sequence[tuple[int, Sequence[float]]], seed: int, within: Sequence[float] = ()
) -> np.ndarray:
    """Samples in an order in which every stretch holds the domains' tokens in proportion to the weights, int64.

    Each domain goes through its own seeded order. The stream ends when the first domain that is still asked for is
    exhausted, so the others are left in part unused.

    Args:
        phases: (tokens of the stream before it begins, weight of each domain), the first at 0, in order.
        within: by domain, the share of its own order that all copies of one text lie within; none: 1 for all.
    """
    starts = np.array([start for start, _ in phases], float)
    weights = np.array([weight for _, weight in phases], float)
    shares = weights / weights.sum(1, keepdims=True)
    # due[k, d]: tokens of domain d that are due when phase k begins.
    due = np.concatenate([np.zeros((1, shares.shape[1])), np.cumsum(np.diff(starts)[:, None] * shares[:-1], axis=0)])
    orders, times, ends = [], [], []
    for domain in range(shares.shape[1]):
        members = np.random.default_rng([seed, 2, domain]).permutation(np.flatnonzero(samples.domain == domain))
        members = _gather_copies(samples, members, seed, within)
        met = np.cumsum(samples.row_lengths[members]).astype(float)
        orders.append(members)
        times.append(_time_at(met, starts, shares[:, domain], due[:, domain], side="left"))
        ends.append(_time_at(met[-1:], starts, shares[:, domain], due[:, domain], side="right")[0])
    merged = np.concatenate(times)
    by_time = np.argsort(merged, kind="stable")
    return np.concatenate(orders)[by_time[merged[by_time] <= min(ends)]]


def _gather_copies(samples: Samples, order: np.ndarray, seed: int, within: Sequence[float]) -> np.ndarray:
    """An order of samples with the copies of each text moved together, where its domain asks for that.

    A text's copies keep their places relative to each other, drawn together into a stretch that begins anywhere.
    """
    place = np.arange(len(order)) / max(1, len(order))
    for domain, share in enumerate(within):
        (mine,) = np.nonzero(samples.domain[order] == domain)
        if share < 1 and len(mine):
            texts, text = np.unique(samples.start[order[mine]], return_inverse=True)
            begin = np.random.default_rng([seed, 5, domain]).random(len(texts)) * (1 - share)
            place[mine] = begin[text] + share * place[mine]
    return order[np.argsort(place, kind="stable")]


def _time_at(
    tokens: np.ndarray, starts: np.ndarray, shares: np.ndarray, due: np.ndarray, side: Literal["left", "right"]
) -> np.ndarray:
    """When a domain has had so many tokens, in tokens of the whole stream: first (left), or last before more (right).

    Infinite where the last phase does not ask for the domain.
    """
    phase = np.maximum(np.searchsorted(due, tokens, side=side) - 1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        time = starts[phase] + (tokens - due[phase]) / shares[phase]
    return np.where(shares[phase] > 0, time, np.inf)
