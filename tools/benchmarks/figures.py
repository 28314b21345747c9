"""What the benchmarks' figures have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moetrain.config import SettingsError


def new_figure(rows: int, columns: int, width: float = 4.6) -> tuple[Any, Any]:
    """A figure and its axes in one flat array, each of a width in inches.

    Raises:
        SettingsError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as missing:
        raise SettingsError("the figure needs matplotlib: pip install 'moetrain[figures]'") from missing
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, grid = plt.subplots(
        rows, columns, figsize=(width * columns, 3.9 * rows), squeeze=False, constrained_layout=True
    )
    for axis in grid.ravel():
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.2)
    return figure, grid.ravel()


def save(figure: Any, path: Path) -> None:
    """Write a figure and let go of it."""
    from matplotlib import pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
