"""Figures 4, 6, 14 and 15: a routing metric of memorization groups over time, with fits and controls."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moetrain import grokking
from moetrain.grokking import Estimate, Fit, Trajectory
from moetrain.paper.groups import DomainSamples, Group, samples_of
from moetrain.paper.results import COLORS, GREY, Result, Row, band, grid, titled
from moetrain.report.open_run import OpenedRun
from moetrain.routing.panel import HELDOUT

PER = 1000  # steps to which slopes are stated


@dataclass(frozen=True)
class Measure:
    """A quantity of a group's samples over the readings."""

    title: str
    of: Callable[[DomainSamples, np.ndarray, int], Trajectory]  # samples, members, seed


def distance(tau: float | None = None) -> Measure:
    """D_path in edits; ``tau`` None takes the run's."""

    def of(samples: DomainSamples, members: np.ndarray, seed: int) -> Trajectory:
        run = samples.run
        chosen = run.setting("monitor.tau") if tau is None else tau
        return grokking.distance_trajectory(
            samples.routing(members), chosen, max_pairs=run.setting("panel.max_pairs"), seed=seed
        )

    return Measure("pathway distance, edits", of)


def _inconsistency(samples: DomainSamples, members: np.ndarray, seed: int) -> Trajectory:
    return grokking.inconsistency_trajectory(samples.routing(members), samples.blocks, seed)


INCONSISTENCY = Measure("C_i, higher is more erratic", _inconsistency)


@dataclass(frozen=True)
class Series:
    """A curve of one panel of a figure, with the fit drawn through it."""

    panel: str
    name: str
    steps: np.ndarray
    trajectory: Trajectory
    fit: Fit | None
    kind: str  # global, group, heldout, rest
    losses: np.ndarray | None = None  # [T] mean loss of a group's samples

    @property
    def rows(self) -> list[Row]:
        """A row for each reading."""
        return [
            {"panel": self.panel, "series": self.name, "step": int(step)}
            | numbers(each)
            | ({} if self.losses is None else {"loss": float(self.losses[place])})
            for place, (step, each) in enumerate(zip(self.steps, self.trajectory.estimates(), strict=True))
        ]

    @property
    def facts(self) -> dict[str, Any]:
        """The fit, with slopes per 1,000 steps."""
        about = {"panel": self.panel, "series": self.name, "samples": self.trajectory.samples}
        if self.fit is None:
            return about | {"fit": None, "note": "too few readings for a fit"}
        slope, scale = self.fit.slope, PER
        return about | {
            "fit": list(self.fit.coefficients),
            "from_step": int(self.steps[self.fit.first]),
            "readings": self.fit.readings,
            "slope_per_1000_steps": slope.mean * scale,
            "low_over_samples": slope.low * scale,
            "high_over_samples": slope.high * scale,
            "low_over_readings": self.fit.low_over_readings * scale,
            "high_over_readings": self.fit.high_over_readings * scale,
            "relative_change": self.fit.relative,
            "r2": self.fit.r2,
        }


def numbers(estimate: Estimate) -> Row:
    """An estimate as columns."""
    found: Row = {"value": estimate.mean, "low": estimate.low, "high": estimate.high, "n": estimate.samples}
    return found | ({"pairs": estimate.pairs} if estimate.pairs else {})


def mean_of(trajectories: Sequence[Trajectory]) -> Trajectory:
    """The mean over domains, each with equal weight; their resamples are independent."""
    return Trajectory(
        np.mean([each.values for each in trajectories], axis=0),
        np.mean([each.replicates for each in trajectories], axis=0),
        sum(each.samples for each in trajectories),
        sum(each.pairs for each in trajectories),
    )


def group_series(samples: DomainSamples, group: Group, measure: Measure, panel: str, seed: int = 0) -> Series:
    """The curve of a group, with a line through the readings from its onset on."""
    trajectory = measure.of(samples, group.members, seed)
    line = grokking.fit(samples.steps, trajectory, first=group.reading)
    losses_T = samples.losses_ST[group.members].mean(0)
    return Series(panel, group.name, samples.steps, trajectory, line, "group", losses_T)


def controls(samples: DomainSamples, measure: Measure, first: int, seed: int) -> list[Series]:
    """Held-out samples, and samples trained on that were not memorized: a line from the first group's onset on."""
    found = []
    heldout = DomainSamples(samples.run, samples.domain, HELDOUT)
    rest = np.flatnonzero(samples.onsets() < 0)
    for name, kind, own, members in (
        ("held out", "heldout", heldout, np.arange(len(heldout))),
        ("trained on, not memorized", "rest", samples, rest),
    ):
        if len(members) > 1:
            trajectory = measure.of(own, members, seed)
            line = grokking.fit(samples.steps, trajectory, first=first)
            found.append(Series(samples.domain, name, samples.steps, trajectory, line, kind))
    return found


def dynamics(run: OpenedRun, name: str, title: str, measure: Measure, domains: Sequence[str] | None = None) -> Result:
    """The figure: all domains with a quadratic through all readings, then each domain's two earliest groups.

    Raises:
        PaperError: as `samples_of`.
    """
    each = samples_of(run, domains)
    steps = each[0].steps
    everything = [measure.of(samples, np.arange(len(samples)), seed) for seed, samples in enumerate(each)]
    overall = mean_of(everything)
    quadratic = grokking.fit(steps, overall, degree=2)
    series = [Series("all domains", "all samples trained on", steps, overall, quadratic, "global")]
    notes, compared = [], []
    for seed, samples in enumerate(each):
        groups = samples.early_groups()
        found = [group_series(samples, group, measure, samples.domain, seed) for group in groups]
        if not groups:
            notes.append(f"{samples.domain}: no group of samples was memorized: {_why_none(samples)}")
        others = controls(samples, measure, groups[0].reading if groups else 0, seed + len(each))
        series += [*found, *others]
        heldout = next((other.fit for other in others if other.kind == "heldout"), None)
        for one in found:
            notes.append(in_words(one))
            if one.fit is not None and heldout is not None and one is found[0]:
                apart = _difference(one.fit, heldout)
                compared.append({"panel": one.panel, "series": one.name, **apart})
                notes.append(_compared_in_words(apart, heldout))
    facts = {
        "fits": [one.facts for one in series],
        "slope_minus_that_of_heldout_per_1000_steps": compared,
        "eps": {samples.domain: samples.eps for samples in each},
        "delta": each[0].delta,
        "tau": run.setting("monitor.tau"),
        "samples_not_finite": {samples.domain: samples.broken for samples in each},
    }
    rows = [row for one in series for row in one.rows]
    return Result(name, title, rows, lambda plt: draw(plt, series, measure.title), facts, notes)


def in_words(series: Series) -> str:
    """What the line through a group says, from its interval over samples."""
    fit = series.fit
    if fit is None:
        return f"{series.panel}, {series.name}: too few readings follow for a line"
    slope = fit.slope
    if not math.isfinite(slope.low):
        return f"{series.panel}, {series.name} (n={slope.samples}): too few samples for an interval"
    way = "falls" if slope.high < 0 else "rises" if slope.low > 0 else "has no clear trend"
    low, high = slope.low * PER, slope.high * PER
    return (
        f"{series.panel}, {series.name} (n={slope.samples}): {way} afterwards, by {slope.mean * PER:+.3g} "
        f"({low:+.3g} to {high:+.3g}) per 1,000 steps over {fit.readings} readings"
    )


def _compared_in_words(difference: Row, control: Fit) -> str:
    """The slope of a group beside that of held-out samples over the same readings."""
    value, low, high = (difference[name] for name in ("value", "low", "high"))
    slope = control.slope.mean * PER
    if not math.isfinite(low):
        return f"  control: held-out samples {slope:+.3g}; too few samples to compare"
    way = "no other slope" if low <= 0 <= high else "a smaller slope" if high < 0 else "a larger slope"
    return f"  control: held-out samples {slope:+.3g}; the group has {way}, by {value:+.3g} ({low:+.3g} to {high:+.3g})"


def _why_none(samples: DomainSamples) -> str:
    return "no eps counts a fifth of them" if samples.eps is None else "each group has a single sample"


def _difference(fit: Fit, control: Fit) -> Row:
    """Slope of a group minus that of its control, per 1,000 steps; the two sets of samples are independent."""
    a, b = fit.slope, control.slope
    half = math.hypot((a.high - a.low) / 2, (b.high - b.low) / 2)
    mean = a.mean - b.mean
    return {"value": mean * PER, "low": (mean - half) * PER, "high": (mean + half) * PER, "n": a.samples + b.samples}


def draw(plt: Any, series: Sequence[Series], y_title: str) -> Any:
    """One panel for each value of `Series.panel`."""
    panels = list(dict.fromkeys(one.panel for one in series))
    figure, axes = grid(plt, len(panels), columns=min(5, len(panels)))
    for axis, panel in zip(axes, panels, strict=True):
        titled(axis, panel, y=y_title)
        own = [one for one in series if one.panel == panel]
        colors = iter(COLORS)
        right = axis.twinx() if any(one.losses is not None for one in own) else None
        for one in own:
            color = GREY if one.kind in ("heldout", "rest") else next(colors)
            style = {"heldout": ":", "rest": "--"}.get(one.kind, "-")
            band(axis, one.steps, one.rows, color, f"{one.name} (n={one.trajectory.samples})", style)
            draw_fit(axis, one, color)
            if right is not None and one.losses is not None:
                right.plot(one.steps, one.losses, color=color, linewidth=0.8, alpha=0.5, linestyle="-.")
        if right is not None:
            right.set_ylabel("loss, nats (dash-dotted)", fontsize=6)
            right.tick_params(labelsize=6)
        axis.legend(fontsize=5.5, frameon=False)
    return figure


def draw_fit(axis: Any, series: Series, color: str) -> None:
    """The fit over its readings, and a vertical line where a group's begins."""
    if series.fit is None or series.kind in ("heldout", "rest"):
        return
    at = np.linspace(series.steps[series.fit.first], series.steps[-1], 60)
    axis.plot(at, series.fit.at(at), color=color, linewidth=2.2, alpha=0.55)
    if series.kind == "group":
        axis.axvline(series.steps[series.fit.first], color=color, linewidth=0.7, linestyle="--")
