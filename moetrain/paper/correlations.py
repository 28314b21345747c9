"""Tables 1, 4 and 5 and figure 7: correlation of accuracy with routing metrics and losses over checkpoints.

The paper's numbers are over 4 to 6 checkpoints each. The same statistics are given here with n, p and interval; where n
is 8 or more, also those of `moetrain.grokking.correlate`, which takes trends into account.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from moetrain import grokking
from moetrain.grokking.correlation import LEAST_READINGS, Method, Series
from moetrain.grokking.paper import CORRELATIONS
from moetrain.metrics import table
from moetrain.paper.dynamics import INCONSISTENCY, distance
from moetrain.paper.groups import DomainSamples
from moetrain.paper.results import COLORS, PaperError, Result, Row, grid, table_picture, titled
from moetrain.report.derived import newest_values
from moetrain.report.open_run import OpenedRun

METHODS: tuple[Method, Method] = ("pearson", "spearman")
LEAST = 4  # checkpoints: the paper's fewest; Fisher's interval needs as many
LOGGED = ("d_path", "consistency", "cosine", "train_loss", "train_loss_average", "validation_loss")
TITLES = {
    "d_path_memorized": "pathway distance, memorized samples",
    "consistency_memorized": "pathway consistency (1 - C_i), memorized samples",
    "d_path": "pathway distance, all samples trained on",
    "consistency": "pathway consistency, all samples trained on",
    "cosine": "cosine of consecutive layers",
    "train_loss": "training loss",
    "train_loss_average": "training loss, moving average",
    "validation_loss": "validation loss",
}
_PAPER_NAMES = {"d_path_memorized": "d_path", "consistency_memorized": "consistency"}


@dataclass(frozen=True)
class Accuracy:
    """Accuracy of one domain or task at each checkpoint, and since when it is above chance."""

    name: str
    domain: str  # of the run, whose metrics it is correlated with
    steps: np.ndarray  # [T]
    values: np.ndarray  # [T]
    items: int
    chance: float

    @property
    def first(self) -> int | None:
        """The first of three checkpoints in a row above chance by two standard errors; None without."""
        return grokking.first_above_chance(self.values, self.chance, self.items)


def predictor_values(run: OpenedRun, domain: str, steps: Sequence[int]) -> dict[str, np.ndarray]:
    """Each predictor of `TITLES` at given steps [T]; NaN where there is none.

    Distance and consistency of memorized samples are over the samples that the paper's rule counts as memorized at any
    reading of the run, the same at all steps.

    Raises:
        PaperError: a step at which the panel was not read.
    """
    missing = sorted(set(steps) - set(run.reading_steps))
    if missing:
        raise PaperError(
            f"{run.path}: no reading of the panel at step {missing[0]}, of which there is a checkpoint: give with "
            f"--readings the output of python tools/replay.py {run.path} --output FOLDER"
        )
    found = {name: newest_values(run, table.find(name), domain, steps) for name in LOGGED}
    samples = DomainSamples(run, domain)
    members = np.flatnonzero(samples.onsets() >= 0)
    places = [run.reading_steps.index(step) for step in steps]
    nothing = np.full(len(places), np.nan)
    if len(members) < 2:
        return {"d_path_memorized": nothing, "consistency_memorized": nothing, **found}
    return {
        "d_path_memorized": distance().of(samples, members, 0).values[places],
        "consistency_memorized": 1 - INCONSISTENCY.of(samples, members, 0).values[places],
        **found,
    }


def correlation(x: np.ndarray, y: np.ndarray, method: Method) -> Row:
    """Pearson's or Spearman's coefficient with p and Fisher's 95% interval, which takes the readings as independent."""
    known = np.isfinite(x) & np.isfinite(y)
    x, y, n = x[known], y[known], int(known.sum())
    nan = float("nan")
    if n < LEAST or np.ptp(x) == 0 or np.ptp(y) == 0:
        note = f"{n} checkpoints: fewer than {LEAST}" if n < LEAST else "constant"
        return {"value": nan, "low": nan, "high": nan, "p": nan, "n": n, "note": note}
    result = stats.pearsonr(x, y) if method == "pearson" else stats.spearmanr(x, y)
    value = float(result.statistic)
    # Fisher's z; for ranks with the variance of Bonett and Wright (2000).
    variance = (1.0 if method == "pearson" else 1 + value**2 / 2) / (n - 3)
    z, half = math.atanh(min(max(value, -1 + 1e-12), 1 - 1e-12)), 1.959964 * math.sqrt(variance)
    found = {"value": value, "low": math.tanh(z - half), "high": math.tanh(z + half), "p": float(result.pvalue), "n": n}
    return found | {"note": ""}


def correlation_rows(accuracy: Accuracy, predictors: Mapping[str, np.ndarray]) -> list[Row]:
    """Both coefficients of each predictor, from the checkpoint on at which accuracy exceeds chance."""
    first = accuracy.first
    rows: list[Row] = []
    for name, values_T in predictors.items():
        for method in METHODS:
            head = {"panel": accuracy.name, "predictor": name, "method": method}
            if first is None:
                nan = float("nan")
                note = "accuracy did not exceed chance in three checkpoints in a row"
                rows.append(head | {"value": nan, "low": nan, "high": nan, "p": nan, "n": 0, "note": note})
                continue
            found = correlation(values_T[first:], accuracy.values[first:], method)
            rows.append(
                head | found | _with_controls(accuracy, values_T, first, method) | _paper(accuracy, name, method)
            )
    return rows


def _with_controls(accuracy: Accuracy, values_T: np.ndarray, first: int, method: Method) -> Row:
    """Coefficients of first differences and of residuals on log steps, where there are enough checkpoints."""
    first = max(first, int(np.argmax(accuracy.steps > 0)))
    if len(values_T) - first < LEAST_READINGS:
        return {}
    found = grokking.correlate(values_T[first:], accuracy.values[first:], accuracy.steps[first:])
    kinds: tuple[Series, Series] = ("differences", "residuals")
    return {f"{kind}_{key}": getattr(found[kind, method], key) for kind in kinds for key in ("value", "low", "high")}


def _paper(accuracy: Accuracy, name: str, method: str) -> Row:
    known = CORRELATIONS.get(_PAPER_NAMES.get(name, name), {}).get(accuracy.name)
    return {"paper": known[f"raw {method}"]} if known else {}


def table_of(
    name: str, title: str, measured: Sequence[tuple[Accuracy, Mapping[str, np.ndarray]]], facts: Mapping[str, Any]
) -> Result:
    """The table of correlations: one row for each predictor, two columns for each domain or task.

    Args:
        measured: accuracies, each with the predictors at its steps.
    """
    rows: list[Row] = []
    each = [accuracy for accuracy, _ in measured]
    for accuracy, predictors in measured:
        rows += correlation_rows(accuracy, predictors)
    for accuracy, predictors in measured:
        for place, step in enumerate(accuracy.steps):
            found = grokking.share(round(accuracy.values[place] * accuracy.items), accuracy.items)
            own = {name: values_T[place] for name, values_T in predictors.items()}
            rows.append(
                {"panel": accuracy.name, "predictor": "accuracy", "step": int(step)}
                | {"value": found.mean, "low": found.low, "high": found.high, "n": accuracy.items}
                | own
            )
    by_place = {(row["panel"], row["predictor"], row["method"]): row for row in rows if "method" in row}
    columns = ["", "metric", *METHODS, "paper"]
    cells = []
    for accuracy in each:
        for number, predictor in enumerate(TITLES):
            both = [by_place[accuracy.name, predictor, method] for method in METHODS]
            published = ", ".join(f"{row['paper']:+.2f}" for row in both if "paper" in row)
            cells.append(["" if number else accuracy.name, TITLES[predictor], *map(_cell, both), published])
    notes = [
        f"{accuracy.name}: accuracy {accuracy.values[0]:.3f} to {accuracy.values[-1]:.3f} over {len(accuracy.steps)} "
        f"checkpoints, {accuracy.items} items; "
        + (
            "above chance at none"
            if accuracy.first is None
            else f"above chance from step {accuracy.steps[accuracy.first]:,}"
        )
        for accuracy in each
    ]
    return Result(name, title, rows, table_picture(columns, cells), facts, notes)


def _cell(row: Row) -> str:
    if not math.isfinite(row["value"]):
        return "-"
    return f"{row['value']:+.2f} ({row['low']:+.2f} to {row['high']:+.2f}), n={row['n']}"


def scatter(run: OpenedRun, domain: str | None = None) -> Result:
    """Figure 7: accuracy against each metric over the readings of the probes, with a line, its MSE and R².

    Accuracy is that of the run's own probes, standardized as in the paper. Without a given domain it is the first whose
    accuracy exceeds chance, or else varies.

    Raises:
        PaperError: no domain has an accuracy at four readings of the panel, or it does not vary.
    """
    known = [recorded_accuracy(run, name) for name in ([domain] if domain else run.domains)]
    varying = [accuracy for accuracy in known if accuracy is not None and np.ptp(accuracy.values) > 0]
    if not varying:
        raise PaperError(
            f"{run.path}: figure7: no domain has an accuracy that varies over {LEAST} readings of the panel"
        )
    accuracy = next((each for each in varying if each.first is not None), varying[0])
    first = accuracy.first or 0
    predictors = predictor_values(run, accuracy.domain, accuracy.steps.tolist())
    y = accuracy.values[first:]
    standard = (y - y.mean()) / y.std() if y.std() > 0 else np.full(len(y), np.nan)
    rows: list[Row] = []
    for name, values_T in predictors.items():
        x = values_T[first:]
        known = np.isfinite(x) & np.isfinite(standard)
        line: Row = {"mse": float("nan"), "r2": float("nan"), "slope": float("nan"), "intercept": float("nan")}
        if known.sum() >= LEAST and np.ptp(x[known]) > 0:
            found = stats.linregress(x[known], standard[known])
            rest = standard[known] - found.intercept - found.slope * x[known]
            line = {"mse": float((rest**2).mean()), "r2": found.rvalue**2, "slope": found.slope}
            line["intercept"] = found.intercept
        for step, a, b in zip(accuracy.steps[first:], x, y, strict=True):
            share = grokking.share(round(b * accuracy.items), accuracy.items)
            found_at = {"panel": name, "step": int(step), "x": a, "accuracy": b, "low": share.low, "high": share.high}
            rows.append(found_at | {"items": accuracy.items, "n": int(known.sum()), **line})

    def picture(plt: Any) -> Any:
        figure, axes = grid(plt, len(predictors))
        for axis, name in zip(axes, predictors, strict=True):
            own = [row for row in rows if row["panel"] == name]
            x = np.array([row["x"] for row in own], float)
            titled(axis, f"MSE={own[0]['mse']:.3f}, R²={own[0]['r2']:.3f}", x=TITLES[name], y="accuracy, standardized")
            axis.scatter(x, standard, s=12, color=COLORS[0])
            if math.isfinite(own[0]["slope"]):
                at = np.array([np.nanmin(x), np.nanmax(x)])
                axis.plot(at, own[0]["intercept"] + own[0]["slope"] * at, color=COLORS[1], linewidth=1.2)
        return figure

    title = f"Figure 7: accuracy and metrics, {accuracy.name}, {len(y)} readings from step {accuracy.steps[first]:,}"
    above = (
        "from the first of three readings above chance"
        if accuracy.first is not None
        else "never above chance: all readings"
    )
    return Result("figure7", title, rows, picture, {"domain": accuracy.domain, "readings": above})


def recorded_accuracy(run: OpenedRun, domain: str) -> Accuracy | None:
    """Accuracy of a domain's probes as the run recorded it, where the panel was read too; None below four readings."""
    own = run.accuracy
    own = own[(own["domain"] == domain) & ~own["trained"] & own["step"].isin(run.reading_steps)]
    if len(own) < LEAST:
        return None
    steps, values = own["step"].to_numpy(), own["accuracy"].to_numpy()
    return Accuracy(domain, domain, steps, values, int(own["items"].iloc[0]), float(own["chance"].iloc[0]))
