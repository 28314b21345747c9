"""Figures of the validity study."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from validity.units import BASELINES, BETWEEN, GENERALIZES, MEMORIZED, METRICS

_COLORS = {GENERALIZES: "#1b7837", MEMORIZED: "#b2182b", BETWEEN: "#888888"}
_SCATTERED = ("memorized/share", "kernel/left_out", "pathway/d_path_norm")


def draw(units: pd.DataFrame, separation: pd.DataFrame, threshold: float, path: Path) -> None:
    """Three metrics against held-out accuracy per unit, and the AUC of all metrics."""
    mpl.use("Agg")
    figure, axes = plt.subplots(1, 4, figsize=(17, 4.6), width_ratios=(1, 1, 1, 1.25), layout="constrained")
    for axis, metric in zip(axes, _SCATTERED, strict=False):
        _scatter(axis, units, metric)
    axes[0].axhline(threshold, color="0.6", zorder=0)
    axes[0].legend(frameon=False, fontsize=8, loc="upper right")
    _ranking(axes[3], separation)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _scatter(axis: Axes, units: pd.DataFrame, metric: str) -> None:
    for truth, color in _COLORS.items():
        for part, face in (("fit", "none"), ("test", color)):
            own = units[(units["truth"] == truth) & (units["part"] == part)]
            label = f"{truth}, {part} ({len(own)})"
            axis.scatter(own["heldout"], own[metric], s=26, facecolors=face, edgecolors=color, lw=0.9, label=label)
    axis.set_xlabel("held-out accuracy at the end of the run")
    axis.set_title(METRICS[metric], fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)


def _ranking(axis: Axes, separation: pd.DataFrame) -> None:
    """AUC at the end of the test runs, with intervals; what is not of routing in grey."""
    rows = separation[separation["auc"].notna()].iloc[::-1]
    places = np.arange(len(rows))
    losses = rows["measure"].isin([*BASELINES.values(), METRICS["memorized/share"]])
    for place, (_, row), light in zip(places, rows.iterrows(), losses, strict=True):
        color = "0.6" if light else "#2166ac"
        axis.plot([row["low"], row["high"]], [place, place], color=color, lw=1.6)
        axis.plot(row["auc"], place, "o", color=color, ms=5)
    axis.axvline(0.5, color="0.7", lw=0.8, ls=":")
    axis.set_yticks(places, rows["measure"], fontsize=8)
    axis.set_xlim(0, 1.02)
    axis.set_title("AUC on test runs, 95% interval (grey: not routing)", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
