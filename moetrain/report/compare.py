"""Comparison of runs at one number of tokens: settings that differ, then values, phases and curves.

Every value is a run's newest at that number of tokens. Intervals are computed from the stored readings by the functions
that training calls.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moetrain.grokking import Phase
from moetrain.loggers.monitor_page import Chart
from moetrain.loggers.tensorboard import TensorBoard
from moetrain.metrics import table
from moetrain.report import charts
from moetrain.report.charts import Line
from moetrain.report.open_run import OpenedRun, RunError
from moetrain.report.page import NOTHING, PHASES, Figure, Group, Legend, Number, counts_tokens, render, short_title
from moetrain.report.routing_figures import phase_stretches
from moetrain.version import __version__

# Settings that do not change what is trained.
_IGNORED = ("run.name", "run.output_dir", "run.report", "data.cache_dir", "data.root", "data.workers", "train.resume")


@dataclass(frozen=True)
class Setting:
    """A setting in which runs differ, and its value in each."""

    name: str
    values: list[Any]


@dataclass(frozen=True)
class Cell:
    """A run's newest value at the moment of comparison, and when it was measured."""

    number: Number
    at: float  # tokens, or steps
    text: str = ""  # shown instead of the number


@dataclass(frozen=True)
class Row:
    """One metric in every run."""

    domain: str  # empty for metrics of the whole model
    title: str
    cells: list[Cell]

    @property
    def different(self) -> bool:
        """Whether two of the runs have intervals that do not overlap."""
        known = [cell.number for cell in self.cells if math.isfinite(cell.number.half)]
        return len(known) > 1 and max(number.low for number in known) > min(number.high for number in known)


@dataclass(frozen=True)
class Comparison:
    """Runs and what differs between them."""

    runs: list[OpenedRun]
    labels: list[str]
    unit: str  # tokens, or steps where one of the runs does not count them
    at: float
    settings: list[Setting]
    rows: list[Row]

    @property
    def domains(self) -> list[str]:
        """Domains of any of the runs."""
        return list(dict.fromkeys(domain for run in self.runs for domain in run.domains))


def compare(runs: Sequence[OpenedRun], at: float | None = None) -> Comparison:
    """The runs at a number of tokens (steps, where one of them does not count tokens).

    Args:
        runs: two or more.
        at: None takes the most that all of them have reached.

    Raises:
        RunError: fewer than two runs, one without any curve, or one that has not reached ``at``.
    """
    if len(runs) < 2:
        raise RunError("a comparison needs two runs or more")
    unit = "tokens" if all(map(counts_tokens, runs)) else "steps"
    reached = []
    for run in runs:
        if not len(run.scalars):
            raise RunError(f"{run.path}: it has not logged anything yet: wait, or leave it out")
        reached.append(float(_time(run.scalars, unit).max()))
    common = min(reached)
    if at is not None and at > common:
        raise RunError(f"{runs[int(np.argmin(reached))].path}: it has reached only {common:,.0f} {unit}: compare there")
    moment = common if at is None else at
    rows = list(_rows(runs, unit, moment))
    return Comparison(list(runs), labels(runs), unit, moment, differing_settings(runs), rows)


def labels(runs: Sequence[OpenedRun]) -> list[str]:
    """A name for each run: its folder, with as many parent folders as make the names unique."""
    parts = [run.path.resolve().parts for run in runs]
    depth = 1
    while len({part[-depth:] for part in parts}) < len(set(parts)):
        depth += 1
    return ["/".join(part[-depth:]) for part in parts]


def differing_settings(runs: Sequence[OpenedRun]) -> list[Setting]:
    """Settings that are not the same in all runs; one that an older run does not have counts as its default."""
    by_run = [dict(run.settings[["setting", "value"]].itertuples(index=False)) for run in runs]
    defaults = {name: default for run in runs for name, _, default in run.settings.itertuples(index=False)}
    found = []
    for name, default in defaults.items():
        values = [settings.get(name, default) for settings in by_run]
        different = any(_or_null(value) != _or_null(values[0]) for value in values)
        if name not in _IGNORED and different:
            found.append(Setting(name, values))
    return found


def _or_null(value: Any) -> Any:
    """A value, with None for empty ones: an older run may not have a setting that is empty in a newer one."""
    return None if value in ([], {}) else value


def _rows(runs: Sequence[OpenedRun], unit: str, at: float) -> Iterator[Row]:
    compared = table.compared()
    for domain in dict.fromkeys(domain for run in runs for domain in run.domains):
        phases = [_phase(run, domain, unit, at) for run in runs]
        if any(cell.text for cell in phases):
            yield Row(domain, "Phase", phases)
        for tag, metric in compared.items():
            if not metric.of_model:
                cells = [_newest(run, f"{tag}/{domain}", unit, at) for run in runs]
                yield from _known(Row(domain, metric.title, cells))
        tasks = [task for run in runs for task in run.tasks.loc[run.tasks["domain"] == domain, "task"]]
        for task in dict.fromkeys(tasks):
            for metric in table.probe_metrics():
                if metric.compared:
                    cells = [_probed(run, task, metric.name, unit, at) for run in runs]
                    yield from _known(Row(domain, f"{task}: {metric.title}", cells))
    for tag, metric in compared.items():
        if metric.of_model:
            yield from _known(Row("", metric.title, [_newest(run, tag, unit, at) for run in runs]))


def _known(row: Row) -> Iterator[Row]:
    if any(cell.number for cell in row.cells):
        yield row


def _newest(run: OpenedRun, tag: str, unit: str, at: float) -> Cell:
    curve = run.curve(tag)
    curve = curve[_time(curve, unit) <= at]
    if not len(curve):
        return Cell(NOTHING, math.nan)
    last = curve.iloc[-1]
    step, number = int(last["step"]), Number(float(last["value"]))
    if step in run.reading_steps and tag in (found := run.metrics_at(step)):
        estimate = found[tag]
        number = Number(estimate.mean, estimate.low, estimate.high, estimate.samples)
    return Cell(number, float(_time(curve, unit).iloc[-1]))


def _phase(run: OpenedRun, domain: str, unit: str, at: float) -> Cell:
    cell = _newest(run, f"phase/{domain}", unit, at)
    return Cell(NOTHING, cell.at, Phase(int(cell.number.value)).name.lower() if cell.number else "")


def _probed(run: OpenedRun, task: str, metric: str, unit: str, at: float) -> Cell:
    events = [event for event in run.events_of("probe") if event["task"] == task and metric in event["metrics"]]
    when = run.tokens([event["step"] for event in events]) if unit == "tokens" else [event["step"] for event in events]
    before = [(moment, event) for moment, event in zip(when, events, strict=True) if moment <= at]
    if not before:
        return Cell(NOTHING, math.nan)
    moment, event = before[-1]
    found = (event["metrics"][metric][key] for key in ("value", "low", "high", "n"))
    return Cell(Number(*(math.nan if value is None else float(value) for value in found)), float(moment))


def _time(curve: Any, unit: str) -> Any:
    return curve["tokens" if unit == "tokens" else "step"]


def overlays(comparison: Comparison) -> dict[str, Group]:
    """Charts of each domain, by title; each line is a run."""
    shown = table.compared()
    legend = [Legend(label, _color(number)) for number, label in enumerate(comparison.labels)]
    found: dict[str, Group] = {}
    for tag, metric in shown.items():
        curves = {domain: _lines(comparison, f"{tag}/{domain}") for domain in comparison.domains}
        figures = [_overlay(comparison, domain, metric.title, own) for domain, own in curves.items() if own]
        if figures and metric.per_domain:
            found[metric.title] = Group(figures, legend)
    tasks = dict.fromkeys(task for run in comparison.runs for task in run.tasks["task"])
    probed = {task: _lines(comparison, f"probe/{task}/accuracy") for task in tasks}
    if figures := [_overlay(comparison, task, "accuracy", own) for task, own in probed.items() if own]:
        found["Probes: accuracy"] = Group(figures, legend)
    loads = {metric.title: _lines(comparison, tag) for tag, metric in shown.items() if tag.startswith("experts/")}
    if figures := [_overlay(comparison, title, title, own) for title, own in loads.items() if own]:
        found["Experts"] = Group(figures, legend)
    return found


def _lines(comparison: Comparison, tag: str) -> list[Line]:
    found = []
    for number, run in enumerate(comparison.runs):
        curve = run.curve(tag)
        if len(curve):
            dash = charts.DASHES[number // charts.COLORS % len(charts.DASHES)]
            time = _time(curve, comparison.unit).to_numpy(float)
            found.append(Line(time, curve["value"].to_numpy(), _color(number), dash))
    return found


def _overlay(comparison: Comparison, name: str, title: str, curves: Sequence[Line]) -> Figure:
    label = f"{name}: {title} in each run"
    return Figure(name, charts.lines(curves, label, comparison.unit, y_title=short_title(title)))


def _color(number: int) -> str:
    return f"d{number % charts.COLORS}"


def comparison_page(comparison: Comparison) -> str:
    """The comparison as a single self-contained HTML page."""
    return render(
        "compare.html.j2",
        comparison=comparison,
        version=__version__,
        colors=[_color(number) for number in range(len(comparison.runs))],
        groups=overlays(comparison),
        phases=PHASES,
        stretches=[phase_stretches(run, comparison.unit) for run in comparison.runs],
    )


def write_overlay(comparison: Comparison, folder: Path) -> None:
    """Write a TensorBoard folder that overlays the runs, by tokens where all of them count tokens.

    Each run's curves are copied under its label, with tokens in place of steps. A page of custom scalars has a chart
    per metric and domain, in which each line is a run.

    Raises:
        RunError: the folder exists: nothing is overwritten.
        OSError: it cannot be written.
    """
    if folder.exists():
        raise RunError(f"{folder} exists, and nothing is overwritten: give a new folder")
    tags = set().union(*(run.scalars["tag"] for run in comparison.runs))
    layout: dict[str, dict[str, Chart]] = {}
    shown = {"phase": table.find("phase"), **table.compared()}
    for domain in comparison.domains:
        by_title = {
            metric.title: Chart((f"{tag}/{domain}",), smoothed=not metric.categories) for tag, metric in shown.items()
        }
        layout[domain] = {title: chart for title, chart in by_title.items() if chart.tags[0] in tags}
    tasks = dict.fromkeys(task for run in comparison.runs for task in run.tasks["task"])
    layout["probes"] = {task: Chart((f"probe/{task}/accuracy",)) for task in tasks if f"probe/{task}/accuracy" in tags}
    layout["experts and speed"] = {
        metric.title: Chart((tag,)) for tag, metric in shown.items() if metric.of_model and tag in tags
    }
    for number, (run, label) in enumerate(zip(comparison.runs, comparison.labels, strict=True)):
        place = folder / label.replace("/", "-")
        place.mkdir(parents=True)
        board = TensorBoard(place)
        if number == 0:
            board.lay_out_charts({title: pages for title, pages in layout.items() if pages})
        points = run.scalars.sort_values(["step", "tag"])
        for tag, value, time in zip(points["tag"], points["value"], _time(points, comparison.unit), strict=True):
            board.scalar(tag, value, round(time))
        board.flush(durable=True)
