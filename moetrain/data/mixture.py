"""The order in which a run meets its samples: each at most once, domains by size or by weight."""

from __future__ import annotations

import numpy as np

from moetrain.data.packing import Samples


def order_by_size(samples: Samples, seed: int) -> np.ndarray:
    """All samples once, in one seeded order, int64 [S]: each domain's share of the stream is its size."""
    return np.random.default_rng([seed, 1]).permutation(len(samples))


def order_by_weights(samples: Samples, weights: list[float], seed: int) -> np.ndarray:
    """Samples in an order in which every stretch holds the domains' tokens in proportion to ``weights``, int64.

    Each domain goes through its own seeded order; the stream ends when the first domain is exhausted, so the others
    are left in part unused.
    """
    orders, times = [], []
    for domain, weight in enumerate(weights):
        members = np.random.default_rng([seed, 2, domain]).permutation(np.flatnonzero(samples.domain == domain))
        orders.append(members)
        # A sample's time is when its end is due if the domain's tokens come at the rate of its weight.
        times.append(np.cumsum(samples.row_lengths[members]) / weight)
    end = min(time[-1] for time in times)
    merged = np.concatenate(times)
    by_time = np.argsort(merged, kind="stable")
    return np.concatenate(orders)[by_time[merged[by_time] <= end]]
