"""Figures of learning: memorized samples, losses and gaps, pairs of groups, accuracy and its predictors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from moetrain import grokking
from moetrain.grokking.memorization import MIN_TAIL_IN_RUNS
from moetrain.metrics import table
from moetrain.report import charts
from moetrain.report.charts import Line, Link, Points
from moetrain.report.findings import metric
from moetrain.report.page import (
    TREND_TEXT,
    Figure,
    Group,
    Legend,
    Number,
    color,
    counts_tokens,
    curve_lines,
    domain_legend,
    listed,
    minus,
    plain,
    short_title,
    time_of,
    two,
    unit,
    within,
)
from moetrain.report.trend import trend

if TYPE_CHECKING:
    import pandas as pd

    from moetrain.report.open_run import OpenedRun

_SHARE = (-0.03, 1.03)
_NO_PANEL = "The panel has not been read."
_KNOWN = 2.0  # perplexity; text with a larger one is not known by heart


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
    paper = Legend("memorized by the paper's rule", "accent")
    online = Legend("memorized by the online rule", "accent", "dashed")
    right = Legend("accuracy", "ink")
    trained_right = Legend("accuracy on trained facts", "ink", "dashed")
    by_chance = Legend("chance", "faint", "dotted")
    left_out = Legend("leave-one-out accuracy, from routing alone", "second")
    figures, shown = [], set()
    for domain in run.domains:
        steps, share = memorized_share(run, domain)
        by_rule = run.curve(f"memorized/fraction/{domain}")
        own = run.accuracy[run.accuracy["domain"] == domain]
        heldout, trained = own[~own["trained"]], own[own["trained"]]
        drawn: dict[Legend, list[Line]] = {
            paper: [Line(time_of(run, steps), share, "accent")] if len(steps) else [],
            online: curve_lines(run, f"memorized/fraction/{domain}", "accent", dash="dashed"),
            left_out: _interval_line(run, run.left_out[run.left_out["domain"] == domain], "second"),
            right: _interval_line(run, heldout, "ink", column="accuracy"),
            trained_right: _interval_line(run, trained, "ink", "dashed", column="accuracy"),
        }
        if len(heldout):
            ends = time_of(run, heldout["step"])[[0, -1]]
            drawn[by_chance] = [Line(ends, np.full(2, heldout["chance"].iloc[0]), "faint", "dotted")]
        curves = [line for lines in drawn.values() for line in lines]
        if curves:
            shown |= {entry for entry, lines in drawn.items() if lines}
            names = listed([entry.label for entry, lines in drawn.items() if lines])
            svg = charts.lines(curves, f"{domain}: {names} over the run", unit(run), _SHARE, y_title="share")
            caption = f"{_eps_in_words(run, domain)} {_online_in_words(run, domain, by_rule)}".strip()
            figures.append(Figure(domain, svg, caption))
    entries = [paper, online, left_out, right, trained_right, by_chance]
    legend = [entry for entry in entries if entry in shown]
    return Group(
        figures,
        legend,
        _why_nothing_is_drawn(run) if not figures else "",
        text=_on_memorization(shown, entries, run.setting("panel.delta")),
    )


def _on_memorization(shown: set[Legend], entries: Sequence[Legend], delta: float) -> str:
    """What the curves of `memorization` are, of those that are drawn."""
    paper, online, left_out, right, trained_right, _ = (entry in shown for entry in entries)
    said = []
    if paper:
        said.append(
            "By the paper's rule a panel sample is memorized from the reading on at which its loss stays at or below "
            f"eps, and within {delta:g} nats of its last value. eps is the least that counts a fifth of a domain's "
            "samples: so at least a fifth counts, whatever was memorized: the texts with the lowest losses that no "
            "longer move, known by heart or just predictable, as much natural text is. How much was memorized is shown "
            "further below, as a share of what was learned."
        )
    if online:
        said.append(
            "The online rule uses readings so far: the loss of a sample trained on is settled below the loss of 95% "
            "of the samples not trained on, or below the eps that is set. Without a set eps it is near .05 or less "
            "where nothing is memorized."
        )
    if right or trained_right:
        said.append("Accuracy is over the domain's probe items, with Wilson's 95% interval.")
    if right and (paper or online):
        said.append(
            "Where generalization follows memorization, accuracy rises when the share is already high; where there is "
            "only memorization, the share rises alone."
        )
    if left_out:
        said.append("Leave-one-out accuracy is over samples trained on, with Wilson's 95% interval.")
    return " ".join(said)


def _eps_in_words(run: OpenedRun, domain: str) -> str:
    """The eps of the paper's rule, and what it means for a text."""
    own = run.onsets[run.onsets["domain"] == domain]
    if not len(own):
        return "The panel has no sample trained on."
    eps = float(own["eps"].iloc[0])
    if not np.isfinite(eps):
        readings, least = len(run.reading_steps), MIN_TAIL_IN_RUNS + 1
        if readings < least:
            return (
                f"Nothing counts as memorized by the paper's rule: it takes {least} readings, and there are {readings}."
            )
        return "Nothing counts as memorized by the paper's rule: no eps counts a fifth of the samples."
    perplexity = float(np.exp(eps))
    said = f"eps = {eps:g} nats per token, a perplexity of {plain(perplexity)}"
    known = ": far from text known by heart, whose perplexity is near 1." if perplexity > _KNOWN else "."
    return f"{said}{known} Of {len(own)} samples {int((own['step'] >= 0).sum())} count."


def _online_in_words(run: OpenedRun, domain: str, curve: pd.DataFrame) -> str:
    """The newest share by the online rule."""
    if not len(curve):
        return ""
    number = metric(run, domain, "memorized/fraction")
    value, ends = within(number)
    said = f"Online rule: {value}{f' {ends}' if ends else ''} at step {int(curve['step'].iloc[-1]):,}"
    given = run.setting(f"data.domains.{domain}.eps")
    return said + (f", with the eps of {given:g} that is set." if given is not None else ".")


def _why_nothing_is_drawn(run: OpenedRun) -> str:
    """Why `memorization` has no curve."""
    memorized = "nothing counts as memorized" if run.reading_steps else "the panel has not been read"
    return f"There is no curve: {memorized}, and {without_accuracy(run)}."


def without_accuracy(run: OpenedRun) -> str:
    """Why no domain has an accuracy, as part of a sentence."""
    if not len(run.probes):
        return "no probe was read"
    steps, tasks = run.probes["step"].nunique(), run.tasks["task"].tolist()
    read = f"{steps} {'reading' if steps == 1 else 'readings'} of {listed(tasks)}"
    return f"{read} gave no accuracy for a domain of this run: not answered right or wrong, or of another domain"


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
    return _loss_curves(run, cells, "loss of the panel's samples over the run", "loss, nats per token")


def shares(run: OpenedRun) -> Group:
    """The memorized share, per domain."""
    kinds = {"memorized/share": Legend("memorized share", "accent")}
    missing = (
        "No reading has a memorized share: it needs samples trained on and others of the domain, and a loss that has "
        "fallen by 5%."
    )
    return _loss_curves(run, kinds, "share of what was learned that is memory", "memorized share", missing, zero=True)


def repeats(run: OpenedRun) -> Group:
    """The worth of the next pass over the passes made, per repeated domain, with the forecast."""
    figures = []
    forecast_drawn = False
    for domain in run.domains:
        passes, worth = (
            run.curve(f"repeat/{name}/{domain}").set_index("step")["value"] for name in ("passes", "worth")
        )
        both = passes.index.intersection(worth.index)
        if not len(both):
            continue
        x, y = passes[both].to_numpy(), worth[both].to_numpy()
        number = metric(run, domain, "repeat/worth")
        curves = [Line(x, y, "accent", last=(number.low, number.high))]
        budget = run.curve(f"repeat/budget/{domain}")["value"]
        measured = f"worth {two(y[-1])} of fresh text{_between(number)}"
        caption = f"{x[-1]:.1f} passes; the next is {measured}."
        if passes.index[-1] > both[-1]:
            caption = f"At {x[-1]:.1f} passes the next was {measured}. At {passes.iloc[-1]:.1f} it could not be told."
        if len(budget):
            forecast_drawn = True
            along = np.linspace(0, max(x[-1], float(budget.iloc[-1])), 50)
            forecast = np.exp(-((along / budget.iloc[-1]) ** 2) * np.log(2))
            curves.append(Line(along, forecast, "ink", "dashed"))
            after = metric(run, domain, "repeat/budget")
            half = (
                "Forecast: worth half of it"
                if budget.iloc[-1] >= passes.iloc[-1]
                else "By all readings it was worth half of that"
            )
            caption += f" {half} after {budget.iloc[-1]:.1f} passes{_between(after, 1)}."
        curves.append(Line(np.array([0, max(curve.x[-1] for curve in curves)]), np.ones(2), "faint", "dotted"))
        label = f"{domain}: worth of the next pass over passes"
        svg = charts.lines(curves, label, "passes", y_title="worth of the next pass")
        figures.append(Figure(domain, svg, caption))
    legend = [Legend("measured, with the interval of the newest", "accent"), Legend("fresh text", "faint", "dotted")]
    if forecast_drawn:
        legend.insert(1, Legend("curve through all readings, and its forecast", "ink", "dashed"))
    repeated = [name for name in run.domains if run.setting(f"data.domains.{name}.repeats") != 1]
    missing = "No domain is repeated."
    if repeated:
        missing = f"Nothing has been measured yet that tells what a pass over {listed(repeated)} is worth."
    return Group(figures, legend, "" if figures else missing)


def _between(number: Number, places: int = 2) -> str:
    """The ends of an interval in words, in brackets; empty without one."""
    if not math.isfinite(number.low):
        return ""
    low, high = (minus(f"{end:.{places}f}") for end in (number.low, number.high))
    return f" ({low} to {high if math.isfinite(number.high) else 'more than can be told'})"


def gaps(run: OpenedRun) -> Group:
    """How much lower the loss is on samples trained on, per domain."""
    kinds = {
        "memorized/gap": Legend("to samples to come", "second"),
        "memorized/gap_heldout": Legend("to held-out samples", "accent"),
    }
    label = "loss of samples not trained on minus loss of samples trained on"
    missing = "No reading has samples trained on and others of the domain."
    return _loss_curves(run, kinds, label, "gap, nats per token", missing, zero=True)


def _loss_curves(
    run: OpenedRun, metrics: dict[str, Legend], label: str, y_title: str, missing: str = _NO_PANEL, zero: bool = False
) -> Group:
    """One chart per domain of rows of `OpenedRun.loss_curves`; with ``zero``, also a line at 0."""
    figures, shown = [], set()
    for domain in run.domains:
        own = run.loss_curves[run.loss_curves["domain"] == domain]
        curves = []
        for name, style in metrics.items():
            lines = _interval_line(run, own[own["metric"] == name], style.color, style.dash)
            curves += lines
            shown |= {name} if lines else set()
        if curves and zero:
            ends = np.array([min(c.x[0] for c in curves), max(c.x[-1] for c in curves)])
            curves.append(Line(ends, np.zeros(2), "faint", "dotted"))
        if curves:
            figures.append(Figure(domain, charts.lines(curves, f"{domain}: {label}", unit(run), y_title=y_title)))
    legend = [style for name, style in metrics.items() if name in shown]
    if zero and figures:
        legend.append(Legend("0", "faint", "dotted"))
    return Group(figures, legend, "" if figures else missing if run.reading_steps else _NO_PANEL)


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
        figures.append(
            Figure(domain, charts.links(linked, f"{domain}: pairs of groups", unit(run)), _delay_in_words(paired))
        )
    if not len(run.delays):
        notes = ["Groups are paired at the end of a run."] if not run.finished else [f"None: {_why_unpaired(run)}."]
    legend = [
        Legend("samples memorized, by the paper's rule", "faint", "hollow"),
        Legend("items answered correctly", "faint", "filled"),
        Legend("resolution of the delay", "faint", "band"),
    ]
    return Group(figures, legend, " ".join(notes))


def _why_unpaired(run: OpenedRun) -> str:
    return "the panel was not read" if not run.reading_steps else "no probe was read"


def _delay_in_words(paired: pd.DataFrame) -> str:
    """The mean delay of a domain's pairs, weighted by items, with its resolution."""
    mean, blur = (np.average(paired[f"{name}_steps"], weights=paired["items"]) for name in ("delay", "resolution"))
    count = f"{len(paired)} {'pair' if len(paired) == 1 else 'pairs'}"
    found = f"{count}, {paired['samples'].sum()} samples, {paired['items'].sum()} items. On average "
    if abs(mean) <= blur:
        return (
            f"{found}generalization and memorization lie {abs(mean):,.0f} steps apart, no more than the resolution of "
            f"{blur:,.0f} steps: which came first cannot be told."
        )
    order = "follows" if mean > 0 else "precedes"
    return (
        f"{found}generalization {order} memorization by {abs(mean):,.0f} steps, with a resolution of {blur:,.0f} steps."
    )


def accuracy(run: OpenedRun) -> Group:
    """Accuracy over the values of each predictor (as Figure 7 of the paper)."""
    rows = run.correlations
    related = [name for name in run.domains if (rows.loc[rows["domain"] == name, "predictor"] != "").any()]
    figures, trends = [], False
    for name in table.predictors():
        clouds = []
        for domain in related:
            own = _above_chance(run.predictors[run.predictors["domain"] == domain])
            x, y = own[name].to_numpy(float), own["accuracy"].to_numpy(float)
            known = np.isfinite(x)
            if known.any():
                clouds.append(Points(x[known], y[known], color(run, domain), trend(x, y)))
        if clouds:
            trends |= any(cloud.trend is not None for cloud in clouds)
            title = table.find(name).title
            titles = {"x_title": short_title(title), "y_title": "accuracy"}
            svg = charts.scatter(clouds, f"accuracy against {title}", _SHARE, **titles)
            figures.append(Figure(title, svg, _in_words(run, name, related)))
    missing = "" if figures else _why_uncorrelated(run)
    text = TREND_TEXT if trends else ""
    return Group(figures, domain_legend(run, related, "filled"), missing, text=text)


def _why_uncorrelated(run: OpenedRun) -> str:
    if not (run.accuracy["domain"].isin(run.domains) & ~run.accuracy["trained"]).any():
        said = without_accuracy(run)
        return f"{said[0].upper()}{said[1:]}: there is nothing to correlate."
    return (
        "Accuracy has exceeded chance by two standard errors at three readings in a row in no domain: there is "
        "nothing to correlate."
    )


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
