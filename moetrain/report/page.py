"""Parts of pages about runs: groups of charts with legends, formatted numbers, templates.

Templates escape all values except charts. A page is a single file without scripts, and its security policy forbids the
browser to fetch or run anything.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from moetrain.grokking import Phase
from moetrain.grokking.wording import exact_percent
from moetrain.report import charts
from moetrain.report.records import need
from moetrain.report.trend import LEAST_READINGS

if TYPE_CHECKING:
    from moetrain.report.open_run import OpenedRun


@dataclass(frozen=True)
class Number:
    """A value, its 95% interval where it has one, and the number of samples."""

    value: float
    low: float = math.nan
    high: float = math.nan
    n: float = math.nan

    @property
    def half(self) -> float:
        """Half the width of the interval."""
        return (self.high - self.low) / 2

    def __bool__(self) -> bool:
        return math.isfinite(self.value)


NOTHING = Number(math.nan)


@dataclass(frozen=True)
class Figure:
    """A chart with its title and a short caption."""

    title: str
    svg: str
    caption: str = ""


@dataclass(frozen=True)
class Legend:
    """The meaning of a color and a mark: a line (solid, dashed, dotted), a circle (filled, hollow), or a band."""

    label: str
    color: str
    dash: str = "solid"


@dataclass(frozen=True)
class Group:
    """Figures with a common legend."""

    figures: Sequence[Figure]
    legend: Sequence[Legend] = ()
    missing: str = ""  # why there are no figures, or not all
    scale: Sequence[float] = field(default_factory=tuple)  # of heat maps: smallest and largest value
    text: str = ""  # what the figures show; empty where the page's own text is enough

    @property
    def drawn(self) -> list[Legend]:
        """The entries of the legend whose color is in a figure."""
        return [entry for entry in self.legend if any(f"var(--{entry.color})" in each.svg for each in self.figures)]


TREND_TEXT = (
    "Lines are least-squares trends with a 95% interval by block resampling of the readings; a trend is drawn from "
    f"{LEAST_READINGS} readings on."
)
_NONE = "–"
_MOST_PLACES = 5  # decimal places of a number; smaller numbers have an exponent
PHASES = [Legend(phase.name.lower(), f"phase{int(phase)}") for phase in Phase]


def short_title(title: str) -> str:
    """A metric's title without its remarks, for an axis."""
    return re.split(r"[,:(]", title)[0].strip()


def listed(names: Sequence[str]) -> str:
    """Names within a sentence: a, b and c."""
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def color(run: OpenedRun, domain: str) -> str:
    """The color of a domain, the same on the whole page."""
    return f"d{run.domains.index(domain) % charts.COLORS}"


def domain_legend(run: OpenedRun, domains: Sequence[str] | None = None, mark: str = "solid") -> list[Legend]:
    """The colors of some domains; of all where None."""
    return [Legend(domain, color(run, domain), mark) for domain in (run.domains if domains is None else domains)]


def counts_tokens(run: OpenedRun) -> bool:
    """Whether the run logged how many tokens it trained on."""
    return bool(np.isfinite(run.tokens([1])).all())


def time_of(run: OpenedRun, steps: Any) -> np.ndarray:
    """Steps on the time axis of the page: text tokens, or steps where the run counts none."""
    return run.tokens(steps) if counts_tokens(run) else np.asarray(list(steps), float)


def curve_lines(
    run: OpenedRun, tag: str, hue: str, last: tuple[float, float] | None = None, dash: str = "solid"
) -> list[charts.Line]:
    """The curve of a tag over time, with the interval of its last value if given; empty where the run has none."""
    curve = run.curve(tag)
    if not len(curve):
        return []
    x = curve["tokens" if counts_tokens(run) else "step"].to_numpy(float)
    return [charts.Line(x, curve["value"].to_numpy(), hue, dash, last=last)]


def unit(run: OpenedRun) -> str:
    """The unit of the time axis."""
    return "tokens" if counts_tokens(run) else "steps"


def plain(number: Any, digits: int = 3) -> str:
    """A number with so many significant digits, an integer with all; a dash where there is none."""
    if number is None or not math.isfinite(number):
        return _NONE
    if float(number).is_integer():
        return minus(f"{number:,.0f}")
    if not 1e-4 <= abs(number) < 1e6:
        return minus(f"{number:.{digits - 1}e}")
    return minus(f"{number:.{max(0, digits - 1 - math.floor(math.log10(abs(number))))}f}")


def within(number: Number) -> tuple[str, str]:
    """A value and its interval as text, rounded to the width of the interval; the second is empty without one."""
    if not number or not math.isfinite(number.half):
        return plain(number.value), ""
    half = number.half or 1.0  # 0 where all samples agree
    places = max(0 if half >= 10 else 2, -math.floor(math.log10(half)))
    if places > _MOST_PLACES:
        return plain(number.value), f"[{plain(number.low)}, {plain(number.high)}]"
    return minus(f"{number.value:.{places}f}"), minus(_ends(number, places))


def _ends(number: Number, places: int) -> str:
    """An interval as ± where the value lies in its middle, else as [low, high]."""
    if abs((number.low + number.high) / 2 - number.value) <= 0.1 * number.half:
        return f"±{number.half:.{places}f}"
    return f"[{number.low:.{places}f}, {number.high:.{places}f}]"


def two(number: float) -> str:
    """A coefficient between -1 and 1, with two digits."""
    return minus(f"{number:.2f}") if math.isfinite(number) else _NONE


def in_yaml(value: Any) -> str:
    """A setting as YAML on one line."""
    return yaml.safe_dump(value, default_flow_style=True, allow_unicode=True).removesuffix("\n").removesuffix("\n...")


def minus(text: str) -> str:
    """A number with a typographic minus; none where it rounds to 0."""
    return text.replace("-", "−") if text.strip("-0.%") else text.replace("-", "")


@functools.cache
def _templates() -> Any:
    jinja2 = need("jinja2", "the page")
    loader = jinja2.PackageLoader("moetrain.report", "templates")
    templates = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    templates.filters |= {
        "svg": need("markupsafe", "the page").Markup,
        "plain": plain,
        "within": within,
        "short": charts.short,
        "two": two,
        "yaml": in_yaml,
        "percent": exact_percent,
    }
    return templates


def render(template: str, **values: Any) -> str:
    """A page from a template of the folder ``templates``.

    Raises:
        MissingPackageError: jinja2 is not installed.
    """
    return str(_templates().get_template(template).render(**values))
