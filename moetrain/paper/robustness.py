"""Figures 5 and 9 to 13: distance by layer, under other thresholds, across domains, and against router entropy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from moetrain import grokking
from moetrain.grokking import Trajectory
from moetrain.paper.dynamics import PER, Measure, Series, distance, draw, group_series, in_words, numbers
from moetrain.paper.groups import DomainSamples, samples_of
from moetrain.paper.results import COLORS, PaperError, Result, Row, band, grid, titled
from moetrain.report.open_run import OpenedRun

TAUS = (0.5, 0.6, 0.7, 0.8)
DELTAS = (0.03, 0.04, 0.05)
EPS_STEPS = (-0.2, -0.1, 0.0, 0.1, 0.2, 0.3)  # nats, around the eps of the paper's rule


def _with_groups(run: OpenedRun, domain: str | None, name: str) -> DomainSamples:
    """The given domain's samples, or those of the first domain that has memorized groups.

    Raises:
        PaperError: none has.
    """
    each = samples_of(run, [domain] if domain else None)
    for samples in each:
        if samples.early_groups():
            return samples
    raise PaperError(
        f"{name}: no samples of {', '.join(samples.domain for samples in each)} count as memorized by the paper's "
        "rule: it takes four readings or more whose loss no longer moves by panel.delta; train longer, or read often"
    )


def _result(name: str, title: str, series: Sequence[Series], facts: dict[str, Any], y: str) -> Result:
    notes = [in_words(one) for one in series]
    rows = [row for one in series for row in one.rows]
    fits = {"fits": [one.facts for one in series]}
    return Result(name, title, rows, lambda plt: draw(plt, series, y), facts | fits, notes)


def by_layer(run: OpenedRun, domain: str | None = None) -> Result:
    """Figure 5: the distance within each layer, of one memorization group, with a line from its onset on."""
    samples = _with_groups(run, domain, "figure5")
    group = samples.early_groups()[-1]
    layers = samples.weights[0].shape[1]
    tau, max_pairs = run.setting("monitor.tau"), run.setting("panel.max_pairs")

    def of_layer(layer: int) -> Measure:
        def of(own: DomainSamples, members: np.ndarray, seed: int) -> Trajectory:
            readings = [weights[:, [layer]] for weights in own.routing(members)]
            return grokking.distance_trajectory(readings, tau, max_pairs=max_pairs, seed=seed)

        return Measure("", of)

    series = [group_series(samples, group, of_layer(layer), f"layer {layer}") for layer in range(layers)]
    title = f"Figure 5: pathway distance by layer, {samples.domain}, group {group.name} (n={len(group.members)})"
    facts = {"domain": samples.domain, "group": group.step, "eps": samples.eps, "tau": tau}
    return _result("figure5", title, series, facts, "distance in the layer, edits")


def by_tau(run: OpenedRun, domain: str | None = None, taus: Sequence[float] = TAUS) -> Result:
    """Figure 9: the distance of memorization groups under several cumulative routing weights."""
    samples = _with_groups(run, domain, "figure9")
    series = [
        group_series(samples, group, distance(tau), f"tau = {tau:g}")
        for tau in taus
        for group in samples.early_groups()
    ]
    title = f"Figure 9: pathway distance by threshold tau, {samples.domain}"
    return _result("figure9", title, series, {"domain": samples.domain, "eps": samples.eps}, "distance, edits")


def by_eps(run: OpenedRun, domain: str | None = None, eps: Sequence[float] | None = None) -> Result:
    """Figure 10: the distance of memorization groups under several eps; None takes six around the rule's own."""
    samples = _with_groups(run, domain, "figure10")
    values = eps or eps_around(samples)
    series, empty = _by_rule(samples, [(f"eps = {value:g}", value, None) for value in values])
    facts = {"domain": samples.domain, "eps": list(values), "delta": samples.delta, "without_groups": empty}
    title = f"Figure 10: pathway distance by eps, {samples.domain}, delta = {samples.delta:g}"
    return _result("figure10", title, series, facts, "distance, edits")


def by_delta(
    run: OpenedRun, domain: str | None = None, deltas: Sequence[float] = DELTAS, eps: float | None = None
) -> Result:
    """Figure 11: the distance of memorization groups under several delta, at the largest eps of figure 10."""
    samples = _with_groups(run, domain, "figure11")
    fixed = eps if eps is not None else max(eps_around(samples))
    series, empty = _by_rule(samples, [(f"delta = {delta:g}", fixed, delta) for delta in deltas])
    facts = {"domain": samples.domain, "eps": fixed, "delta": list(deltas), "without_groups": empty}
    title = f"Figure 11: pathway distance by delta, {samples.domain}, eps = {fixed:g}"
    return _result("figure11", title, series, facts, "distance, edits")


def eps_around(samples: DomainSamples) -> list[float]:
    """Six eps around that of the rule, in steps of 0.1; those not above 0 are left out."""
    assert samples.eps is not None
    return [round(samples.eps + step, 10) for step in EPS_STEPS if samples.eps + step > 1e-9]


def _by_rule(
    samples: DomainSamples, rules: Sequence[tuple[str, float, float | None]]
) -> tuple[list[Series], list[str]]:
    """Series of the groups under each rule (panel, eps, delta), and the panels without a group.

    Raises:
        PaperError: no rule gives a group.
    """
    series, empty = [], []
    for panel, eps, delta in rules:
        groups = samples.early_groups(eps=eps, delta=delta)
        series += [group_series(samples, group, distance(), panel) for group in groups]
        if not groups:
            empty.append(panel)
    if not series:
        raise PaperError(
            f"{samples.domain}: no samples count as memorized under any of {', '.join(empty)}: give larger"
        )
    return series, empty


def across_domains(run: OpenedRun, domains: Sequence[str] | None = None) -> Result:
    """Figure 12: the distance between samples of two domains at each reading, beside that within each.

    Only domains whose samples have equal numbers of tokens are compared: a longer sample has a longer pathway.

    Raises:
        PaperError: no two such domains.
    """
    each = samples_of(run, domains)
    tau, max_pairs = run.setting("monitor.tau"), run.setting("panel.max_pairs")
    pairs = [(a, b) for a, b in combinations(each, 2) if a.tokens[0] == b.tokens[0]]
    if not pairs:
        raise PaperError(
            f"figure12: no two of {', '.join(samples.domain for samples in each)} have samples of equal length: "
            "set panel.tokens, or data.domains.NAME.panel_tokens, alike"
        )
    rows: list[Row] = []
    for a, b in pairs:
        for step, of_a, of_b in zip(a.steps, a.weights, b.weights, strict=True):
            found = grokking.d_path_between(of_a, of_b, tau, max_pairs=max_pairs)
            rows.append({"panel": f"{a.domain} × {b.domain}", "series": "between", "step": int(step), **numbers(found)})
    within = list({samples.domain: samples for pair in pairs for samples in pair}.values())
    for samples in within:
        trajectory = distance().of(samples, np.arange(len(samples)), 0)
        rows += Series(samples.domain, "within", samples.steps, trajectory, None, "global").rows
    trends = {panel: _line(run, [row for row in rows if row["panel"] == panel]) for panel in _panels(rows)}
    notes = [slope_in_words(panel, each) for panel, each in trends.items()]

    def picture(plt: Any) -> Any:
        between = [panel for panel in _panels(rows) if "×" in panel]
        figure, axes = grid(plt, len(between), columns=3)
        for axis, panel in zip(axes, between, strict=True):
            titled(axis, panel, y="distance, edits")
            for color, name in zip(COLORS, [panel, *panel.split(" × ")], strict=False):
                own = [row for row in rows if row["panel"] == name]
                label = "between" if name == panel else f"within {name}"
                band(axis, [row["step"] for row in own], own, color, label, "-" if name == panel else "--")
            axis.legend(fontsize=5.5, frameon=False)
        return figure

    return Result("figure12", "Figure 12: pathway distance across domains", rows, picture, {"trends": trends}, notes)


def _panels(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["panel"] for row in rows))


def slope_in_words(panel: str, line: Mapping[str, float]) -> str:
    """What figure 12 says of a distance's slope."""
    readings = f"{line['n']} readings after the first step"
    if not np.isfinite(line["slope"]):
        return f"{panel}: too few readings for a slope: {readings}"
    between = f"{line['low']:+.3g} to {line['high']:+.3g}"
    return f"{panel}: {line['slope']:+.3g} ({between}) edits per 1,000 steps, Student's interval over {readings}"


def _line(run: OpenedRun, rows: Sequence[Row]) -> dict[str, float]:
    """Slope per 1,000 steps of the readings after step 0, with Student's interval over readings."""
    later = [row for row in rows if row["step"] > 0]
    values = np.array([row["value"] for row in later])
    alone = Trajectory(values, values[None], 0, 0)  # no resamples: the interval is over readings
    found = grokking.fit([row["step"] for row in later], alone)
    if found is None:
        return {"slope": np.nan, "low": np.nan, "high": np.nan, "n": len(later)}
    slope, low, high = (each * PER for each in (found.slope.mean, found.low_over_readings, found.high_over_readings))
    return {"slope": slope, "low": low, "high": high, "n": found.readings}
