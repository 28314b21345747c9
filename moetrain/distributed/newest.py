"""Which samples of all ranks are the newest of their group, agreed upon without exchanging the samples."""

from __future__ import annotations

import numpy as np
import torch

from moetrain.distributed.mesh import ParallelLayout


def among_newest(
    order_N: np.ndarray, group_N: np.ndarray, groups: int, size: int, layout: ParallelLayout
) -> np.ndarray:
    """Which of this rank's samples are among the ``size`` newest of their group over all ranks: bool [N].

    The place of the oldest of them is searched for by bisection. Each of the at most 63 rounds sums one number per
    group over the ranks, so what a rank sends depends on neither the number of ranks nor that of samples. All ranks
    must call.

    Args:
        order_N: int64, place of each sample in the stream, from 0; no two samples of all ranks have the same.
        group_N: int64, from 0 to ``groups - 1``; this rank has at most ``size`` samples of each group.
    """
    # Invariant: at least `size` samples of a group, or all of them, have a place from `low` on; fewer from `high` on.
    low_G = np.zeros(groups, np.int64)
    high_G = np.full(groups, int(layout.all_reduce_max(int(order_N.max(initial=-1)))) + 1)
    while (high_G - low_G > 1).any():
        middle_G = (low_G + high_G) // 2
        own_G = np.bincount(group_N[order_N >= middle_G[group_N]], minlength=groups)
        enough_G = layout.all_reduce_sum(torch.from_numpy(own_G).to(layout.device)).cpu().numpy() >= size
        low_G, high_G = np.where(enough_G, middle_G, low_G), np.where(enough_G, high_G, middle_G)
    return order_N >= low_G[group_N]
