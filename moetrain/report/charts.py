"""Charts for a page: small SVG images whose colors are CSS variables.

The variables, such as "d0" or "ink", let one image serve the light, dark and print styles of the page. Titles and
legends are HTML: a chart holds data and axes only, and is readable at the width of a phone. The images are static,
because a report must be small, self-contained, printable and free of scripts.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from moetrain.report.records import need
from moetrain.report.trend import Trend

COLORS = 8
"""d0 to d7, for domains or runs; further ones repeat them."""
DASHES = ("solid", "dashed", "dotted")
_NAMES = ["ink", "accent", "second", "faint", "grid"]
_NAMES += [f"d{n}" for n in range(COLORS)] + [f"phase{n}" for n in range(5)]
# matplotlib cannot draw CSS variables: each is drawn in a unique color that is replaced afterwards.
_PLACEHOLDERS = {name: f"#0a{number:02x}f7" for number, name in enumerate(_NAMES)}
_WIDTH, _HEIGHT = 3.5, 2.1  # inches; an em of the text is 8 points
_TITLE = 26  # characters of the y axis's title in a line
_MAP = "viridis"
_STYLE = {
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # a dollar in a name is a dollar
    "font.size": 8,
    "axes.linewidth": 0.6,
    "axes.edgecolor": _PLACEHOLDERS["faint"],
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "text.color": _PLACEHOLDERS["ink"],
    "axes.labelcolor": _PLACEHOLDERS["faint"],
    "xtick.color": _PLACEHOLDERS["faint"],
    "ytick.color": _PLACEHOLDERS["faint"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": _PLACEHOLDERS["grid"],
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
}
_DASHES: dict[str, Any] = dict(zip(DASHES, ("-", (0, (4, 2)), (0, (1, 1.6))), strict=True))


@dataclass(frozen=True)
class Line:
    """A curve: x and y [T], a color by name, and its interval, at each point or at the last one."""

    x: np.ndarray
    y: np.ndarray
    color: str
    dash: str = "solid"
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    last: tuple[float, float] | None = None  # low and high of the newest value


@dataclass(frozen=True)
class Points:
    """Points [T] in order of time, the newest the darkest, with a trend and its interval."""

    x: np.ndarray
    y: np.ndarray
    color: str
    trend: Trend | None = None


@dataclass(frozen=True)
class Link:
    """Two events on a row, the size of each, and the resolution of their times."""

    start: float
    end: float
    start_size: int
    end_size: int
    reach: float
    color: str


@dataclass(frozen=True)
class Grid:
    """A matrix [rows, columns] over x [columns]; NaN is not drawn."""

    x: np.ndarray
    values: np.ndarray
    low: float
    high: float


def short(number: float) -> str:
    """A short form of a count: 1500 is 1.5k."""
    if not math.isfinite(number):
        return "-"
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def lines(
    curves: Sequence[Line],
    label: str,
    unit: str,
    bounds: tuple[float, float] | None = None,
    log: bool = False,
    *,
    y_title: str,
) -> str:
    """Curves over time.

    Args:
        curves: to draw.
        label: description for screen readers.
        unit: of the x axis.
        bounds: of the y axis; those of the data where None.
        log: whether the y axis is logarithmic.
        y_title: title of the y axis.
    """

    def draw(axes: Any) -> None:
        for each in curves:
            color, dash = _PLACEHOLDERS[each.color], _DASHES[each.dash]
            if each.low is not None and each.high is not None:
                axes.fill_between(each.x, each.low, each.high, color=color, alpha=0.16, linewidth=0)
            axes.plot(each.x, each.y, color=color, linestyle=dash, linewidth=1.4, solid_capstyle="round")
            if each.last is not None and len(each.x) and np.isfinite(each.last).all():
                axes.plot([each.x[-1]] * 2, each.last, color=color, linewidth=2.4, alpha=0.55)
            if np.isfinite(each.y).sum() == 1:
                axes.plot(each.x, each.y, ".", color=color)
        if log:
            _logarithmic(axes)
        if bounds is not None:
            axes.set_ylim(*bounds)
        axes.set_ylabel(textwrap.fill(y_title, _TITLE))
        _time_axis(axes, unit)

    return _svg(draw, label)


def scatter(
    clouds: Sequence[Points], label: str, bounds: tuple[float, float] | None = None, *, x_title: str, y_title: str
) -> str:
    """Points with their trends; ``label`` and ``bounds`` as in `lines`.

    The axes are those of the points: far from most of them, the interval of a trend can be much wider than all points
    together, and is cut off.
    """

    def draw(axes: Any) -> None:
        for each in clouds:
            color = _PLACEHOLDERS[each.color]
            for place, (x, y) in enumerate(zip(each.x, each.y, strict=True)):
                newer = (place + 1) / len(each.x)
                axes.plot([x], [y], "o", color=color, alpha=0.25 + 0.75 * newer, markersize=3.2, markeredgewidth=0)
        axes.margins(0.1)
        limits = axes.get_ylim() if bounds is None else bounds
        for each in clouds:
            if each.trend is not None:
                x, value, low, high = each.trend
                axes.fill_between(x, low, high, color=_PLACEHOLDERS[each.color], alpha=0.14, linewidth=0)
                axes.plot(x, value, color=_PLACEHOLDERS[each.color], linewidth=1.2)
        axes.set_ylim(*limits)
        axes.set_xlabel(x_title, loc="right", labelpad=1)
        axes.set_ylabel(textwrap.fill(y_title, _TITLE))
        axes.xaxis.set_major_locator(need("matplotlib.ticker", "the report").MaxNLocator(5))

    return _svg(draw, label)


def links(pairs: Sequence[Link], label: str, unit: str) -> str:
    """Pairs of events, one per row: the first hollow, the second filled, their areas by size."""

    def draw(axes: Any) -> None:
        for row, pair in enumerate(pairs):
            color = _PLACEHOLDERS[pair.color]
            axes.plot([pair.end - pair.reach, pair.end + pair.reach], [row, row], color=color, linewidth=5, alpha=0.16)
            axes.plot([pair.start, pair.end], [row, row], color=color, linewidth=1.1)
            sizes = (2.5 + 1.1 * math.sqrt(size) for size in (pair.start_size, pair.end_size))
            for x, size, fill in zip((pair.start, pair.end), sizes, ("none", color), strict=True):
                axes.plot([x], [row], "o", color=color, markerfacecolor=fill, markersize=size, markeredgewidth=1.1)
        axes.set_yticks([])
        axes.set_ylim(len(pairs) - 0.4, -0.6)
        axes.spines["left"].set_visible(False)
        _time_axis(axes, unit)

    return _svg(draw, label, height=max(1.0, 0.5 + 0.16 * len(pairs)))


def heat(grid: Grid, label: str, unit: str, *, y_title: str) -> str:
    """A matrix as colored cells, the first row at the bottom."""

    def draw(axes: Any) -> None:
        x, rows = grid.x, len(grid.values)
        half = np.diff(x) / 2 if len(x) > 1 else np.ones(1)
        edges = np.concatenate([[x[0] - half[0]], x[:-1] + np.diff(x) / 2, [x[-1] + half[-1]]])
        values = np.ma.masked_invalid(grid.values)
        style: dict[str, Any] = {"cmap": _MAP, "vmin": grid.low, "vmax": grid.high, "edgecolors": "face"}
        axes.pcolormesh(edges, np.arange(rows + 1) - 0.5, values, linewidth=0.3, **style)
        axes.grid(visible=False)
        shown = range(0, rows, max(1, rows // 8))
        axes.set_yticks(list(shown))
        axes.set_xlim(max(0.0, edges[0]), edges[-1])
        axes.set_ylabel(textwrap.fill(y_title, _TITLE))
        _time_axis(axes, unit)

    return _svg(draw, label)


def map_colors(steps: int = 9) -> list[str]:
    """Colors of `heat` from low to high, for a legend."""
    colors = need("matplotlib", "the report").colormaps[_MAP](np.linspace(0, 1, steps))
    return ["#" + "".join(f"{round(255 * part):02x}" for part in color[:3]) for color in colors]


def _logarithmic(axes: Any) -> None:
    """Make the y axis logarithmic, with plain numbers at its ticks."""
    ticker = need("matplotlib.ticker", "the report")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5), numticks=8))
    axes.yaxis.set_minor_locator(ticker.NullLocator())
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, place: f"{value:g}"))


def _time_axis(axes: Any, unit: str) -> None:
    ticker = need("matplotlib.ticker", "the report")
    axes.xaxis.set_major_locator(ticker.MaxNLocator(5))
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, place: short(value)))
    axes.set_xlabel(unit, loc="right", labelpad=1)


def _svg(draw: Callable[[Any], None], label: str, width: float = _WIDTH, height: float = _HEIGHT) -> str:
    """A figure as an SVG element with CSS variables as colors, and ids that are unique on the page."""
    matplotlib, figures = need("matplotlib", "the report"), need("matplotlib.figure", "the report")
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": label}):
        figure = figures.Figure(figsize=(width, height), layout="constrained")
        draw(figure.add_subplot())
        written = io.StringIO()
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
    text = written.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<style type=\"text/css\">.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r"<g id=\"[^\"]*\"", "<g", text)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    text = re.sub(r"font-family: [^;\"]*;?", "", text)
    for name, placeholder in _PLACEHOLDERS.items():
        text = text.replace(placeholder, f"var(--{name})")
    box = re.search(r"viewBox=\"[^\"]*\"", text)
    assert box is not None
    opening = f'<svg {box[0]} role="img" aria-label="{escape(label)}">'
    return re.sub(r"\n\s*", "\n", opening + text[text.index(">") + 1 :])
