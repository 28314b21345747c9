"""Figures of routing: distance against loss, metrics over time, distance by layer, and controls."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from moetrain.grokking import Phase
from moetrain.metrics import table
from moetrain.metrics.cell import HELDOUT, SEEN
from moetrain.metrics.metric import Metric
from moetrain.report import charts
from moetrain.report.charts import Grid, Points
from moetrain.report.findings import metric
from moetrain.report.page import (
    TREND_TEXT,
    Figure,
    Group,
    Legend,
    color,
    curve_lines,
    domain_legend,
    listed,
    short_title,
    time_of,
    unit,
)
from moetrain.report.trend import Trend, trend

if TYPE_CHECKING:
    from moetrain.report.open_run import OpenedRun

_NO_PANEL = "The panel has not been read."


def _missing(run: OpenedRun, readings: str) -> str:
    """Why there is no figure: routing is compared between samples, at least two of them."""
    return f"No domain has had two panel samples trained on {readings}." if run.reading_steps else _NO_PANEL


def sign(row: Metric) -> str:
    """What larger and smaller values mean, from the metric's description; empty where it does not say."""
    found = re.search(r"\*\*Sign:\*\*(.*?)\n- \*\*", row.description, re.DOTALL)
    if found is None:
        return ""
    text = " ".join(found[1].replace("`", "").split())
    return text[0].upper() + text[1:]


@dataclass(frozen=True)
class Stretch:
    """Consecutive readings with the same phase, from the reading before the first to the last of them."""

    phase: Phase
    start: float
    end: float


def phase_stretches(run: OpenedRun, by: str) -> dict[str, list[Stretch]]:
    """The phases of each domain over time, by tokens or steps; empty where phases are not judged."""
    found: dict[str, list[Stretch]] = {}
    for domain in run.domains:
        curve = run.curve(f"phase/{domain}")
        at = curve["tokens" if by == "tokens" else "step"].to_numpy(float)
        for start, end, value in zip(at, at[1:], curve["value"].iloc[1:], strict=False):
            own = found.setdefault(domain, [])
            if own and own[-1].phase == value:
                own[-1] = replace(own[-1], end=float(end))
            else:
                own.append(Stretch(Phase(int(value)), float(start), float(end)))
    return found


def distance_and_loss(run: OpenedRun) -> Group:
    """Pathway distance over loss at each reading, for all domains and for each (as Figure 4 of the paper)."""
    clouds = {}
    for domain in run.domains:
        tags = f"pathway/d_path/{domain}", f"loss/panel_seen/{domain}"
        distance, loss = (run.curve(tag).set_index("step")["value"] for tag in tags)
        both = distance.index.intersection(loss.index)
        if len(both) > 1:
            clouds[domain] = loss[both].to_numpy(), distance[both].to_numpy()
    titled = partial(charts.scatter, x_title="loss, nats per token", y_title="pathway distance, edits")
    own = {domain: trend(x, y) for domain, (x, y) in clouds.items()}
    figures = []
    if len(clouds) > 1:
        points = [Points(*cloud, color(run, domain)) for domain, cloud in clouds.items()]
        pooled = _trend_of_all(list(clouds.values()))
        points.append(Points(np.zeros(0), np.zeros(0), "ink", pooled))
        svg = titled(points, "pathway distance against loss, all domains")
        figures.append(Figure("All domains", svg, _trends_in_words(pooled, own)))
    for domain, (x, y) in clouds.items():
        points = [Points(x, y, color(run, domain), own[domain])]
        svg = titled(points, f"{domain}: pathway distance against loss")
        figures.append(Figure(domain, svg, _trend_in_words(own[domain])))
    legend = domain_legend(run, list(clouds), "filled")
    text = ""
    if any(each is not None for each in own.values()):
        text = f"{TREND_TEXT} The axes are those of the points: an interval that is wider is cut off."
        if len(clouds) > 1:
            legend.append(Legend("trend over all domains", "ink"))
    return Group(figures, legend, "" if figures else _missing(run, "at two readings"), text=text)


def slope(line: Trend) -> float:
    """The slope of a trend."""
    at, value, _, _ = line
    return float((value[-1] - value[0]) / (at[-1] - at[0]))


def _trend_in_words(line: Trend | None) -> str:
    """Which way the distance goes as the loss falls, by the trend of one domain."""
    if line is None:
        return "Too few readings for a trend."
    return f"As the loss falls, the distance {'falls' if slope(line) > 0 else 'rises'}, by the trend."


def _trends_in_words(pooled: Trend | None, own: Mapping[str, Trend | None]) -> str:
    """How the trend over all domains agrees with those of each: pooling can reverse them (Simpson's paradox)."""
    if pooled is None:
        return "Too few readings for a trend."
    known = {domain: slope(line) for domain, line in own.items() if line is not None}
    against = [domain for domain, each in known.items() if each * slope(pooled) < 0]
    said = f"Over all domains, {_direction(slope(pooled))}."
    if not known:
        return f"{said} No domain has readings enough for a trend of its own."
    if len(against) == len(known):
        return (
            f"{said} Within every domain it is the other way: the pooled trend shows how domains differ from each "
            "other, not what training does."
        )
    if against:
        return f"{said} Within {listed(against)} it is the other way: domains also differ from each other."
    return f"{said} So it is within every domain with a trend of its own."


def _direction(rise: float) -> str:
    return "a lower loss goes with a smaller distance" if rise > 0 else "a lower loss goes with a larger distance"


def _trend_of_all(clouds: Sequence[tuple[np.ndarray, np.ndarray]]) -> Trend | None:
    """The trend over all domains; readings are ordered by time, so that a resampled block holds every domain."""
    longest = max(len(x) for x, _ in clouds)
    ordered = [(x[t], y[t]) for t in range(longest) for x, y in clouds if t < len(x)]
    x_T, y_T = np.array(ordered).T
    return trend(x_T, y_T)


def routing(run: OpenedRun) -> Group:
    """The routing metrics of samples trained on over time, one chart per metric."""
    figures = _over_time(run, "routing")
    return Group(figures, domain_legend(run), "" if figures else _missing(run, "at any reading"))


def consistency(run: OpenedRun) -> Group:
    """Pathway consistency and the cosine of consecutive layers (as Figure 6 of the paper)."""
    figures = _over_time(run, "consistency")
    return Group(figures, domain_legend(run), "" if figures else _missing(run, "at any reading"))


def _over_time(run: OpenedRun, group: str) -> list[Figure]:
    figures = []
    for row in table.METRICS:
        if row.figure == group:
            newest = {domain: metric(run, domain, row.tag) for domain in run.domains}
            ends = {domain: (number.low, number.high) for domain, number in newest.items()}
            curves = [
                line
                for domain in run.domains
                for line in curve_lines(run, f"{row.tag}/{domain}", color(run, domain), last=ends[domain])
            ]
            if curves:
                label, title = f"{row.title} by domain", short_title(row.title)
                svg = charts.lines(curves, label, unit(run), row.bounds, row.log, y_title=title)
                barred = [domain for domain, each in newest.items() if math.isfinite(each.half)]
                bars = "" if barred else " There are too few samples for an interval."
                without = [domain for domain in run.domains if not len(run.curve(f"{row.tag}/{domain}"))]
                gone = f" No value for {listed(without)}." if without else ""
                figures.append(Figure(row.title, svg, sign(row) + bars + gone))
    return figures


def by_layer(run: OpenedRun) -> Group:
    """The distance within each layer over time, per domain (as Figure 5 of the paper)."""
    rows = run.by_layer
    known = rows[np.isfinite(rows["d_path"].astype(float))]
    scale = (float(known["d_path"].min()), float(known["d_path"].max())) if len(known) else ()
    figures = []
    for domain in run.domains:
        own = known[known["domain"] == domain]
        if own["step"].nunique() > 1:
            values = own.pivot_table(index="layer", columns="step", values="d_path")
            grid = Grid(time_of(run, values.columns), values.to_numpy(), *scale)
            svg = charts.heat(grid, f"{domain}: distance by layer over the run", unit(run), y_title="layer")
            figures.append(Figure(domain, svg))
    return Group(figures, (), "" if figures else _missing(run, "at two readings"), scale if figures else ())


def control(run: OpenedRun) -> Group:
    """What else changes routing: the distance of held-out samples, load of the experts, learning rate."""
    distance = table.find("d_path_norm")
    figures: list[Figure] = []
    for domain in run.domains:
        seen, heldout = (f"{distance.tag_on(cell)}/{domain}" for cell in (SEEN, HELDOUT))
        curves = [*curve_lines(run, seen, "ink"), *curve_lines(run, heldout, "accent")]
        if len(curves) > 1:
            label, title = f"{domain}: distance of samples trained on and held-out samples", short_title(distance.title)
            svg = charts.lines(curves, label, unit(run), y_title=title)
            figures.append(Figure(domain, svg, distance.title + "."))
    legend = [Legend("trained on", "ink"), Legend("held out", "accent")] if figures else []
    figures += _over_time(run, "controls")
    figures += [*_of_the_model(run, "load_cv"), *_of_the_model(run, "learning_rate")]
    missing = "" if run.reading_steps else _NO_PANEL
    return Group(figures, [*legend, *domain_legend(run)], missing)


def training(run: OpenedRun) -> Group:
    """Loss per domain, and throughput."""
    shown = {"train_loss": "Training loss, nats per token", "bits_per_byte": table.find("bits_per_byte").title}
    figures = []
    for name, title in shown.items():
        tag = table.find(name).tag
        curves = [line for d in run.domains for line in curve_lines(run, f"{tag}/{d}", color(run, d))]
        if curves:
            svg = charts.lines(curves, f"{title}, by domain", unit(run), y_title=title.rpartition(", ")[2])
            figures.append(Figure(title, svg))
    figures += _of_the_model(run, "tokens_per_second", ", training alone")
    return Group(figures, domain_legend(run), "" if figures else "Nothing has been logged yet.")


def _of_the_model(run: OpenedRun, name: str, remark: str = "") -> list[Figure]:
    title = table.find(name).title + remark
    curves = curve_lines(run, table.find(name).tag, "ink")
    return [Figure(title, charts.lines(curves, title, unit(run), y_title=short_title(title)))] if curves else []
