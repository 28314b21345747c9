"""The history that a phase verdict is made from, out of a frame of a domain's curves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from moetrain.grokking import History, curve

if TYPE_CHECKING:
    import pandas as pd

_CURVES = ("loss/panel_seen", "loss/panel_unseen", "memorized/share", "loss/panel_frequencies")


def history_of(own: pd.DataFrame, steps: Sequence[int]) -> History:
    """A domain's history as the monitor saw it; steps stand for tokens, whose unit does not matter.

    Args:
        own: metric (a tag without the domain), step, value, low, high, n of the domain, with ``kernel/left_out``.
        steps: of the readings, ascending.
    """
    by_metric = {
        metric: own[own["metric"] == metric].set_index("step").reindex(list(steps))
        for metric in (*_CURVES, "kernel/left_out")
    }
    curves = {metric: curve(by_metric[metric][["value", "low", "high"]].to_numpy(float)) for metric in _CURVES}
    counts = {metric: rows["n"].fillna(0).to_numpy(np.int64) for metric, rows in by_metric.items()}
    return History(
        steps=np.asarray(steps),
        tokens=np.asarray(steps),
        seen=counts["loss/panel_seen"],
        unseen=counts["loss/panel_unseen"],
        answers=counts["kernel/left_out"],
        loss_seen=curves["loss/panel_seen"],
        loss_unseen=curves["loss/panel_unseen"],
        share=curves["memorized/share"],
        loss_frequencies=curves["loss/panel_frequencies"],
    )
