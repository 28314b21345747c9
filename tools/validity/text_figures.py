"""The figure of the study on natural text."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from validity.repeat_truth import tables
from validity.text_study import CARRIES_OVER, MEMORIZED, separation

_SHOWN = {
    "times_64": "64 times", "times_32": "32 times", "times_16": "16 times", "times_8": "8 times", "times_4": "4 times",
    "twice": "twice", "once_medium": "once",
}  # fmt: skip


def draw(table: pd.DataFrame, units: pd.DataFrame, path: Path) -> None:
    """Measured against true shares; shares over a run by number of repeats; AUC of all measures."""
    mpl.use("Agg")
    figure, axes = plt.subplots(1, 3, figsize=(16, 5), width_ratios=(1, 1, 1.3), layout="constrained")
    _against_truth(axes[0], units)
    _over_time(axes[1], table)
    _ranking(axes[2], separation(units))
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_worth(table: Path, path: Path) -> None:
    """The worth of the next pass over the passes made: true, by continued runs, and measured in the run."""
    mpl.use("Agg")
    rows = tables(pd.read_parquet(table))["worth of the next pass"].dropna(subset="true")
    figure, axis = plt.subplots(figsize=(9, 4.2), layout="constrained")
    for number, (domain, own) in enumerate(rows.sort_values("passes").groupby("domain", sort=False)):
        color = plt.get_cmap("viridis")(number / rows["domain"].nunique())
        for name, low, high, style in (("true", "true low", "true high", "o-"), ("measured", "low", "high", "s--")):
            reach = np.abs(own[[low, high]].to_numpy().T - own[name].to_numpy())
            label = f"{domain.replace('_', ' ')}, {name}"
            axis.errorbar(own["passes"], own[name], yerr=reach, fmt=style, color=color, ms=4, lw=1, label=label)
    axis.axhline(1, color="0.7", lw=0.8)
    axis.axhline(0, color="0.7", lw=0.8)
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set_xlabel("passes over the domain")
    axis.set_ylabel("worth of the next pass (1: fresh text)")
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _against_truth(axis: Axes, units: pd.DataFrame) -> None:
    for part, face in (("fit", "none"), ("test", "C0")):
        own = units[units["part"] == part]
        axis.scatter(own["true share"], own["memorized/share"], s=24, facecolors=face, edgecolors="C0", label=part)
    ends = np.array([-0.05, units["true share"].max() + 0.05])
    axis.plot(ends, ends, color="0.6", lw=0.8)
    axis.axvspan(CARRIES_OVER, MEMORIZED, color="0.9", zorder=0)
    axis.set_xlabel("true memorized share, on texts set apart")
    axis.set_ylabel("memorized share, measured")
    axis.legend(frameon=False)


def _over_time(axis: Axes, table: pd.DataFrame) -> None:
    shares = table[table["metric"] == "memorized/share"]
    for number, (domain, label) in enumerate(_SHOWN.items()):
        curve = shares[shares["domain"] == domain].groupby("step")["value"].median()
        axis.plot(curve.index, curve, color=plt.get_cmap("viridis")(number / len(_SHOWN)), label=label)
    axis.set_xlabel("step")
    axis.set_ylabel("memorized share, median over runs")
    axis.legend(frameon=False, fontsize=8)


def _ranking(axis: Axes, separated: pd.DataFrame) -> None:
    ordered = separated.sort_values("auc")
    place = np.arange(len(ordered))
    reach = np.abs(ordered[["low", "high"]].to_numpy().T - ordered["auc"].to_numpy())
    axis.errorbar(ordered["auc"], place, xerr=reach, fmt="o", color="C0", ms=4, lw=1)
    axis.set_yticks(place, ordered["measure"], fontsize=8)
    axis.axvline(0.5, color="0.7", lw=0.8)
    axis.set_xlabel("AUC, memorized against carried over (test runs)")
