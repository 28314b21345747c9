"""Figures of learning: memorized samples, losses and gaps, pairs of groups, accuracy and its predictors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from moetrain import grokking
from moetrain.metrics import table
from moetrain.report import charts
from moetrain.report.charts import Line, Link, Points
from moetrain.report.page import Figure, Group, Legend, color, counts_tokens, domain_legend, time_of, two, unit
from moetrain.report.trend import trend

if TYPE_CHECKING:
    import pandas as pd

    from moetrain.report.open_run import OpenedRun

_SHARE = (-0.03, 1.03)
_NO_PANEL = "The run has no panel."


def _interval_line(
    run: OpenedRun, rows: pd.DataFrame, hue: str, dash: str = "solid", column: str = "value"
) -> list[Line]:
    """A frame's column over time with its interval; empty without rows."""
    if not len(rows):
        return []
    value, low, high = (rows[name].to_numpy() for name in (column, "low", "high"))
    return [Line(time_of(run, rows["step"]), value, hue, dash, low, high)]


def memorization(run: OpenedRun) -> Group:
    """Share of samples memorized, accuracy (as Figure 1 of the paper) and leave-one-out accuracy over time."""
    figures = []
    for domain in run.domains:
        steps, share = memorized_share(run, domain)
        curves = [Line(time_of(run, steps), share, "accent")] if len(steps) else []
        curves += _interval_line(run, run.left_out[run.left_out["domain"] == domain], "second")
        own = run.accuracy[run.accuracy["domain"] == domain]
        heldout, trained = own[~own["trained"]], own[own["trained"]]
        if len(heldout):
            x = time_of(run, heldout["step"])
            curves += _interval_line(run, heldout, "ink", column="accuracy")
            curves.append(Line(x[[0, -1]], np.full(2, heldout["chance"].iloc[0]), "faint", "dotted"))
        if len(trained):
            curves.append(Line(time_of(run, trained["step"]), trained["accuracy"].to_numpy(), "ink", "dashed"))
        if curves:
            label = f"{domain}: share of samples memorized, accuracy and leave-one-out accuracy over the run"
            caption = "" if len(steps) else "Nothing counts as memorized: see the notes."
            figures.append(Figure(domain, charts.lines(curves, label, unit(run), _SHARE), caption))
    legend = [
        Legend("samples memorized", "accent"),
        Legend("accuracy", "ink"),
        *([Legend("leave-one-out accuracy, from routing alone", "second")] if len(run.left_out) else []),
        *([Legend("accuracy on trained facts", "ink", "dashed")] if run.accuracy["trained"].any() else []),
        *([Legend("chance", "faint", "dotted")] if len(run.accuracy) else []),
    ]
    return Group(figures, legend, "" if figures else "Nothing counts as memorized, and no probe was read.")


def memorized_share(run: OpenedRun, domain: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps of the panel's readings, and the share of a domain's seen samples memorized by each; empty without eps."""
    own = run.onsets[run.onsets["domain"] == domain]
    if not len(own) or not np.isfinite(own["eps"]).any():
        return np.zeros(0), np.zeros(0)
    steps = np.array(run.reading_steps)
    onset = own["step"].to_numpy()
    return steps, np.array([((onset >= 0) & (onset <= step)).mean() for step in steps])


def losses(run: OpenedRun) -> Group:
    """The mean loss of each cell of the panel over time, per domain."""
    cells = {
        "loss/panel_seen": Legend("trained on", "ink"),
        "loss/panel_to_come": Legend("to come", "second", "dashed"),
        "loss/panel_heldout": Legend("held out", "accent"),
    }
    return _loss_curves(run, cells, "loss of the panel's samples over the run")


def shares(run: OpenedRun) -> Group:
    """The memorized share, per domain."""
    kinds = {"memorized/share": Legend("memorized share", "accent")}
    return _loss_curves(run, kinds, "share of what was learned that is memory", zero=True)


def repeats(run: OpenedRun) -> Group:
    """The worth of the next pass over the passes made, per repeated domain, with the forecast."""
    figures = []
    for domain in run.domains:
        passes, worth = (
            run.curve(f"repeat/{name}/{domain}").set_index("step")["value"] for name in ("passes", "worth")
        )
        both = passes.index.intersection(worth.index)
        if not len(both):
            continue
        x, y = passes[both].to_numpy(), worth[both].to_numpy()
        curves = [Line(x, y, "accent")]
        budget = run.curve(f"repeat/budget/{domain}")["value"]
        caption = f"{x[-1]:.1f} passes; the next is worth {y[-1]:.2f} of fresh text."
        if len(budget):
            along = np.linspace(0, max(x[-1], float(budget.iloc[-1])), 50)
            forecast = np.exp(-((along / budget.iloc[-1]) ** 2) * np.log(2))
            curves.append(Line(along, forecast, "ink", "dashed"))
            caption += f" Half of it after {budget.iloc[-1]:.1f} passes."
        curves.append(Line(np.array([0, max(curve.x[-1] for curve in curves)]), np.ones(2), "faint", "dotted"))
        figures.append(
            Figure(domain, charts.lines(curves, f"{domain}: worth of the next pass over passes", "passes"), caption)
        )
    legend = [Legend("worth of the next pass", "accent"), Legend("fitted forecast", "ink", "dashed")]
    return Group(figures, legend, "" if figures else "No domain is repeated, or none has been measured.")


def gaps(run: OpenedRun) -> Group:
    """How much lower the loss is on samples trained on, per domain."""
    kinds = {
        "memorized/gap": Legend("to samples to come", "second"),
        "memorized/gap_heldout": Legend("to held-out samples", "accent"),
    }
    return _loss_curves(run, kinds, "loss of samples not trained on minus loss of samples trained on", zero=True)


def _loss_curves(run: OpenedRun, metrics: dict[str, Legend], label: str, zero: bool = False) -> Group:
    """One chart per domain of rows of `OpenedRun.loss_curves`; with ``zero``, also a line at 0."""
    figures = []
    for domain in run.domains:
        own = run.loss_curves[run.loss_curves["domain"] == domain]
        curves = []
        for name, style in metrics.items():
            curves += _interval_line(run, own[own["metric"] == name], style.color, style.dash)
        if curves and zero:
            ends = np.array([min(c.x[0] for c in curves), max(c.x[-1] for c in curves)])
            curves.append(Line(ends, np.zeros(2), "faint", "dotted"))
        if curves:
            figures.append(Figure(domain, charts.lines(curves, f"{domain}: {label}", unit(run))))
    return Group(figures, list(metrics.values()), "" if figures else _NO_PANEL)


def pairs(run: OpenedRun) -> Group:
    """Groups of samples with the groups of items paired with them, per domain (as Figure 2 of the paper)."""
    figures, notes = [], []
    for domain, own in run.delays.groupby("domain", sort=False):
        notes += [f"{domain}: {note}." for note in own["note"] if note]
        paired = own[own["note"] == ""].sort_values("memorized_step")
        if not len(paired):
            continue
        start, end = (time_of(run, paired[name]) for name in ("memorized_step", "generalized_step"))
        reach = paired["resolution_tokens" if counts_tokens(run) else "resolution_steps"]
        linked = [
            Link(*numbers, color(run, domain))
            for numbers in zip(start, end, paired["samples"], paired["items"], reach, strict=True)
        ]
        mean, blur = (np.average(paired[f"{name}_steps"], weights=paired["items"]) for name in ("delay", "resolution"))
        caption = (
            f"{len(paired)} pairs, {paired['samples'].sum()} samples, {paired['items'].sum()} items. On average, "
            f"generalization follows {abs(mean):,.0f} steps {'after' if mean > 0 else 'before'} memorization, with a "
            f"resolution of {blur:,.0f} steps."
        )
        figures.append(Figure(domain, charts.links(linked, f"{domain}: pairs of groups", unit(run)), caption))
    if not len(run.delays):
        notes = ["Groups are paired at the end of a run that reads probes."]
    return Group(figures, (), " ".join(notes))


def accuracy(run: OpenedRun) -> Group:
    """Accuracy over the values of each predictor (as Figure 7 of the paper)."""
    rows = run.correlations
    related = [name for name in run.domains if (rows.loc[rows["domain"] == name, "predictor"] != "").any()]
    figures = []
    for name in table.predictors():
        clouds = []
        for domain in related:
            own = _above_chance(run.predictors[run.predictors["domain"] == domain])
            x, y = own[name].to_numpy(float), own["accuracy"].to_numpy(float)
            known = np.isfinite(x)
            if known.any():
                clouds.append(Points(x[known], y[known], color(run, domain), trend(x, y)))
        if clouds:
            title = table.find(name).title
            svg = charts.scatter(clouds, f"accuracy against {title}", bounds=_SHARE)
            figures.append(Figure(title, svg, _in_words(run, name, related)))
    missing = "Accuracy has not exceeded chance in any domain, or no probe was read: there is nothing to correlate."
    return Group(figures, domain_legend(run, related), "" if figures else missing)


def _above_chance(rows: pd.DataFrame) -> pd.DataFrame:
    """The readings that correlations are taken over."""
    first = grokking.first_above_chance(rows["accuracy"], rows["chance"].iloc[0], int(rows["items"].iloc[0]))
    return rows.iloc[first or 0 :]


def _in_words(run: OpenedRun, predictor: str, domains: Sequence[str]) -> str:
    """Rank correlations with a predictor, per domain."""
    rows = run.correlations[(run.correlations["predictor"] == predictor) & (run.correlations["method"] == "spearman")]
    found = []
    for domain in domains:
        by_series = rows[rows["domain"] == domain].set_index("series")
        raw, changes = (by_series["value"].get(series, np.nan) for series in ("raw", "differences"))
        note = by_series["note"].get("raw", "")
        note = f"{note} readings" if note == "too few" else note
        found.append(f"{domain}: {note}" if note else f"{domain}: ρ {two(raw)}, of changes {two(changes)}")
    return "; ".join(found)
