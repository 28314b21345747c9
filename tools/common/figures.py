"""Figures of the tools, with matplotlib if it is installed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moetrain.config import SettingsError


def pyplot() -> Any:
    """matplotlib's pyplot, drawing to files.

    Raises:
        SettingsError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as missing:
        raise SettingsError("the figure needs matplotlib: pip install 'moetrain[figures]'") from missing
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def new_figure(columns: int = 1, width: float = 4.6) -> tuple[Any, Any]:
    """A figure with one row of axes, each ``width`` inches wide; returns the figure and an array of axes.

    Raises:
        SettingsError: matplotlib is not installed.
    """
    figure, axes = pyplot().subplots(1, columns, figsize=(width * columns, 3.9), squeeze=False, layout="constrained")
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.2)
    return figure, axes[0]


def save(figure: Any, path: Path) -> None:
    """Write and close a figure.

    Raises:
        SettingsError: the file cannot be written, or its format is unknown.
    """
    from matplotlib import pyplot as plt

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise SettingsError(f"--figure {path}: cannot be written ({error}): give a .png, .svg or .pdf file") from None
    finally:
        plt.close(figure)


def draw_bars(path: Path, values: Mapping[str, float], label: str, width: float = 4.6, highlighted: str = "") -> None:
    """Horizontal bars, the first at the bottom; names that do not begin with ``highlighted`` are grey."""
    figure, (axis,) = new_figure(width=width)
    colors = ["#3182bd" if name.startswith(highlighted) else "#bbbbbb" for name in values]
    axis.barh(list(values), list(values.values()), color=colors)
    axis.set(xlabel=label)
    save(figure, path)
