"""Figures of what a run learned: memorized samples, losses and gaps, pairs of groups, accuracy and its predictors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from moetrain import grokking
from moetrain.metrics import table
from moetrain.report import charts
from moetrain.report.charts import Line, Link, Points
from moetrain.report.page import (
    Figure,
    Group,
    Legend,
    color,
    counts_tokens,
    domain_legend,
    time_of,
    two,
    unit,
)
from moetrain.report.trend import trend

if TYPE_CHECKING:
    import pandas as pd

    from moetrain.report.open_run import OpenedRun

_INTERVAL = ("value", "low", "high")
_SHARE = (-0.03, 1.03)
_NO_PANEL = "The run has no panel."


def memorization(run: OpenedRun) -> Group:
    """Share of samples memorized, accuracy (as the paper's Figure 1) and leave-one-out accuracy by domain."""
    figures = []
    for domain in run.domains:
        steps, share = memorized_share(run, domain)
        curves = [Line(time_of(run, steps), share, "accent")] if len(steps) else []
        own = run.left_out[run.left_out["domain"] == domain]
        if len(own):
            value, low, high = (own[column].to_numpy() for column in _INTERVAL)
            curves.append(Line(time_of(run, own["step"]), value, "second", "solid", low, high))
        for trained in (False, True):
            rows = run.accuracy[(run.accuracy["domain"] == domain) & (run.accuracy["trained"] == trained)]
            if not len(rows):
                continue
            x, (y, low, high) = time_of(run, rows["step"]), (rows[c].to_numpy() for c in ("accuracy", "low", "high"))
            if trained:
                curves.append(Line(x, y, "ink", "dashed"))
            else:
                curves.append(Line(x, y, "ink", "solid", low, high))
                curves.append(Line(x[[0, -1]], np.full(2, rows["chance"].iloc[0]), "faint", "dotted"))
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
    """By domain, the mean loss of each of the panel's cells over time."""
    cells = {
        "loss/panel_seen": ("ink", "solid"),
        "loss/panel_to_come": ("second", "dashed"),
        "loss/panel_heldout": ("accent", "solid"),
    }
    figures = _by_domain(run, cells, "loss of the panel's samples over the run")
    legend = [Legend("trained on", "ink"), Legend("still to come", "second", "dashed"), Legend("held out", "accent")]
    return Group(figures, legend, "" if figures else _NO_PANEL)


def gaps(run: OpenedRun) -> Group:
    """By domain, how much lower the loss is on samples trained on."""
    kinds = {"memorized/gap": ("second", "solid"), "memorized/gap_heldout": ("accent", "solid")}
    figures = _by_domain(run, kinds, "loss of samples not trained on minus loss of samples trained on", zero=True)
    legend = [Legend("to samples still to come", "second"), Legend("to held-out samples", "accent")]
    return Group(figures, legend, "" if figures else _NO_PANEL)


def _by_domain(run: OpenedRun, metrics: dict[str, tuple[str, str]], label: str, zero: bool = False) -> list[Figure]:
    rows, figures = run.loss_curves, []
    for domain in run.domains:
        curves = []
        for name, (hue, dash) in metrics.items():
            own = rows[(rows["domain"] == domain) & (rows["metric"] == name)]
            if len(own):
                value, low, high = (own[column].to_numpy() for column in _INTERVAL)
                curves.append(Line(time_of(run, own["step"]), value, hue, dash, low, high))
        if curves:
            if zero:
                ends = np.array([min(c.x[0] for c in curves), max(c.x[-1] for c in curves)])
                curves.append(Line(ends, np.zeros(2), "faint", "dotted"))
            figures.append(Figure(domain, charts.lines(curves, f"{domain}: {label}", unit(run))))
    return figures


def pairs(run: OpenedRun) -> Group:
    """By domain, groups of samples with the groups of items that follow them (as Figure 2 of the paper)."""
    figures, notes = [], []
    for domain, own in run.delays.groupby("domain", sort=False):
        whole = own[own["note"] == ""].sort_values("memorized_step")
        notes += [f"{domain}: {note}." for note in own["note"] if note]
        if not len(whole):
            continue
        start, end = (time_of(run, whole[name]) for name in ("memorized_step", "generalized_step"))
        reach = whole["resolution_tokens" if counts_tokens(run) else "resolution_steps"]
        linked = [
            Link(*numbers, color(run, domain))
            for numbers in zip(start, end, whole["samples"], whole["items"], reach, strict=True)
        ]
        mean, blur = (np.average(whole[f"{name}_steps"], weights=whole["items"]) for name in ("delay", "resolution"))
        caption = (
            f"{len(whole)} pairs, {whole['samples'].sum()} samples, {whole['items'].sum()} items. Generalization comes "
            f"{abs(mean):,.0f} steps {'after' if mean > 0 else 'before'} memorization on average, known to within "
            f"{blur:,.0f}."
        )
        figures.append(Figure(domain, charts.links(linked, f"{domain}: pairs of groups", unit(run)), caption))
    if not len(run.delays):
        notes = ["Groups are paired at the end of a run that reads probes."]
    return Group(figures, (), " ".join(notes))


def accuracy(run: OpenedRun) -> Group:
    """By predictor, accuracy over its values (as Figure 7 of the paper)."""
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
            figures.append(Figure(title, svg, _told(run, name, related)))
    missing = "Accuracy has not left chance in any domain, or no probe was read: there is nothing to relate."
    return Group(figures, domain_legend(run, related), "" if figures else missing)


def _above_chance(rows: pd.DataFrame) -> pd.DataFrame:
    """The readings from which on correlations are taken."""
    first = grokking.first_above_chance(rows["accuracy"], rows["chance"].iloc[0], int(rows["items"].iloc[0]))
    return rows.iloc[first or 0 :]


def _told(run: OpenedRun, predictor: str, domains: Sequence[str]) -> str:
    """Rank correlations in words."""
    rows = run.correlations[(run.correlations["predictor"] == predictor) & (run.correlations["method"] == "spearman")]
    told = []
    for domain in domains:
        by_series = rows[rows["domain"] == domain].set_index("series")
        raw, changes = (by_series["value"].get(series, np.nan) for series in ("raw", "differences"))
        note = by_series["note"].get("raw", "")
        note = f"{note} readings" if note == "too few" else note
        told.append(f"{domain}: {note}" if note else f"{domain}: ρ {two(raw)}, of changes {two(changes)}")
    return "; ".join(told)
