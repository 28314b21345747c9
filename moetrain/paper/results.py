"""A figure or table: its numbers as JSON and CSV, and its picture."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moetrain.atomic_io import write_file
from moetrain.report.records import need

Row = dict[str, Any]
Draw = Callable[[Any], Any]

COLORS = ("#2166ac", "#b2182b", "#1b7837", "#762a83", "#b35806", "#35978f", "#8c510a", "#666666")
GREY = "#8a8a8a"


class PaperError(ValueError):
    """A figure or table that cannot be computed on the given run; one line that says what is missing and the remedy."""


@dataclass(frozen=True)
class Result:
    """One figure or table, computed.

    Attributes:
        name: ``figure4``, ``table1``, ...
        title: shown above the picture.
        rows: its numbers, one observation each; all rows become the CSV file.
        facts: numbers of the whole: fits, settings, what was left out.
        notes: sentences that belong below it.
        draw: draws it, given matplotlib's pyplot; returns the figure.
    """

    name: str
    title: str
    rows: Sequence[Row]
    draw: Draw
    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def write(self, folder: Path, about: Mapping[str, Any]) -> list[Path]:
        """Write NAME.png, NAME.json and NAME.csv to a folder, which is made; returns the paths.

        Raises:
            MissingPackageError: matplotlib is not installed.
            OSError: the folder cannot be written.
        """
        matplotlib = need("matplotlib", "a figure")
        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{self.name}{ending}" for ending in (".json", ".csv", ".png")]
        content = {"name": self.name, "title": self.title, **about, "notes": list(self.notes), "facts": self.facts}
        write_file(paths[0], json.dumps(plain(content | {"rows": self.rows}), indent=1, allow_nan=False) + "\n")
        write_file(paths[1], as_csv(self.rows))
        figure = self.draw(plt)
        try:
            figure.suptitle(self.title, fontsize=9)
            figure.savefig(paths[2], dpi=88)
        finally:
            plt.close(figure)
        return paths


def as_csv(rows: Sequence[Row]) -> str:
    """Rows as CSV with a header; columns in the order in which rows first have them, empty where a number is NaN."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: "" if value is None else value for name, value in plain(row).items()} for row in rows)
    return text.getvalue()


def plain(value: Any) -> Any:
    """A value as JSON can hold it: arrays as lists, dataclasses as objects, numbers that are not finite as null."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def grid(plt: Any, panels: int, columns: int = 4, size: tuple[float, float] = (3.1, 2.5), **options: Any) -> Any:
    """A figure of small panels, row by row; returns the figure and an array of its axes, unused ones hidden."""
    columns = max(1, min(columns, panels))
    rows = -(-panels // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(size[0] * columns, size[1] * rows), squeeze=False, layout="constrained", **options
    )
    for number, axis in enumerate(axes.ravel()):
        axis.set_visible(number < panels)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.2)
    return figure, axes.ravel()[:panels]


def band(axis: Any, x: Any, rows: Sequence[Row], color: str, label: str, style: str = "-") -> None:
    """A curve of rows with value, low and high, with its interval as a band."""
    value, low, high = (np.array([row[name] for row in rows], float) for name in ("value", "low", "high"))
    axis.plot(x, value, style, color=color, label=label, marker="o", markersize=2.5, linewidth=1.2)
    axis.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)


def titled(axis: Any, title: str, x: str = "step", y: str = "") -> None:
    axis.set_title(title, fontsize=8)
    axis.set_xlabel(x, fontsize=7)
    axis.set_ylabel(y, fontsize=7)


def table_picture(columns: Sequence[str], cells: Sequence[Sequence[str]], width: float = 10.5) -> Draw:
    """Draws a table of words; a column without any is left out."""
    kept = [place for place in range(len(columns)) if any(row[place] for row in cells)]
    columns = [columns[place] for place in kept]
    cells = [[row[place] for place in kept] for row in cells]

    def draw(plt: Any) -> Any:
        figure, axis = plt.subplots(figsize=(width, 0.5 + 0.215 * (len(cells) + 1)), layout="constrained")
        axis.axis("off")
        drawn = axis.table(cellText=cells, colLabels=list(columns), loc="center", cellLoc="left")
        drawn.auto_set_font_size(False)
        drawn.set_fontsize(7)
        drawn.auto_set_column_width(list(range(len(columns))))
        return figure

    return draw
