"""Rows of the frames of an opened run that follow from its records.

They are computed by the same functions as during training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from moetrain import grokking
from moetrain.grokking import Estimate
from moetrain.grokking.memorization import MIN_TAIL_IN_RUNS
from moetrain.metrics import table
from moetrain.metrics.cell import SEEN
from moetrain.metrics.correlations import as_summary, correlations
from moetrain.metrics.latest import as_metric, moving_average
from moetrain.metrics.metric import Metric
from moetrain.report.records import Records
from moetrain.routing.panel_metrics import panel_cells, panel_metrics

if TYPE_CHECKING:
    import pandas as pd

DELAY_COLUMNS = ["domain", "memorized_step", "generalized_step", "similarity", "samples", "items"]
DELAY_COLUMNS += ["delay_steps", "delay_tokens", "resolution_steps", "resolution_tokens", "note"]

_NO_METRIC = ("phase", "data", "correlation", "delay", "probe")  # groups of tags that summary.json has elsewhere


def metrics_at(run: Records, step: int, rows: Iterable[Metric] | None = None) -> dict[str, Estimate]:
    """The panel metrics of a reading that the run logged at this step, by TensorBoard tag.

    Args:
        run: the records.
        step: of the reading.
        rows: of the table; all of them where None.
    """
    # With twice the step as the run's length, `memorized/gap` always has a value; whether it was logged decides.
    tau, max_pairs = (run.setting(name) for name in ("monitor.tau", "panel.max_pairs"))
    found = panel_metrics(run.reading(step), run.domains, tau, 2 * step, rows, max_pairs)
    if rows is None:
        found |= {f"memorized/fraction/{domain}": memorized_fraction(run, domain, step) for domain in run.domains}
    logged = set(run.scalars.loc[run.scalars["step"] == step, "tag"])
    return {tag: estimate for tag, estimate in found.items() if tag in logged}


def newest_metrics(run: Records, at: Callable[[int], Mapping[str, Estimate]]) -> dict[str, dict[str, Any]]:
    """The newest value of each metric per domain, in the form of ``summary.json``, for a run without one.

    Args:
        run: the records.
        at: the panel metrics at the step of a reading, as `metrics_at`.
    """
    found: dict[str, dict[str, Any]] = {domain: {"metrics": {}} for domain in run.domains}
    newest = run.scalars.groupby("tag").last()
    keys = {metric.tag: metric.summary_key for metric in table.METRICS}
    for tag, step, value in zip(newest.index, newest["step"], newest["value"], strict=True):
        start, _, domain = tag.rpartition("/")
        if domain not in found or start.partition("/")[0] in _NO_METRIC:
            continue
        exact = at(step).get(tag) if step in run.reading_steps else None
        found[domain]["metrics"][keys.get(start, start)] = as_metric(value if exact is None else exact)
    for domain, one in found.items():
        losses = run.curve(f"loss/train/{domain}")["value"].to_numpy()
        if len(losses):
            one["metrics"]["train_loss_average"] = as_metric(float(_averages(losses)[-1]))
    return found


def layer_columns() -> list[str]:
    """The metrics that have a value in each layer, by name."""
    return [metric.name for metric in table.METRICS if metric.by_layer]


def by_layer(run: Records) -> Iterator[tuple[Any, ...]]:
    """The metrics of `layer_columns` on seen panel samples, per domain, reading and layer."""
    steps = run.reading_steps
    tau, max_pairs = (run.setting(name) for name in ("monitor.tau", "panel.max_pairs"))
    rows = [table.find(name) for name in layer_columns()]
    for number, (step, tokens) in enumerate(zip(steps, run.tokens(steps), strict=True)):
        run.progress("reading routing by layer", number, len(steps))
        stored = run.reading(step)
        for domain in run.domains:
            seen = panel_cells(stored, domain, tau, 2 * step, max_pairs)[SEEN]
            for layer, values in enumerate(np.stack([metric.layers(seen) for metric in rows], axis=1)):
                yield domain, step, tokens, layer, *values


def panel_curves(run: Records, names: Iterable[str]) -> Iterator[tuple[Any, ...]]:
    """Metrics of the panel as they were logged, with their intervals: domain, metric, step, tokens, value, ..., n."""
    rows = [table.find(name) for name in names]
    for step, tokens in zip(run.reading_steps, run.tokens(run.reading_steps), strict=True):
        for tag, found in metrics_at(run, step, rows).items():
            metric, _, domain = tag.rpartition("/")
            yield domain, metric, step, tokens, found.mean, found.low, found.high, found.samples


def seen_losses(run: Records, domain: str) -> tuple[pd.DataFrame, np.ndarray]:
    """A domain's seen panel samples, one per row, and their losses [S, T]; one that is not finite is the largest."""
    panel = run.panel
    chosen = panel[(panel["domain"] == domain) & (panel["cell"] == SEEN)]
    readings = max(1, chosen["step"].nunique())
    losses_TS = chosen["loss"].to_numpy(np.float32).reshape(readings, -1)  # each reading in the panel's order
    members = chosen[["document", "piece", "first_step"]].iloc[-losses_TS.shape[1] :]  # of the newest reading
    return members, np.where(np.isfinite(losses_TS), losses_TS, np.finfo(np.float32).max).T


def memorized_fraction(run: Records, domain: str, step: int) -> Estimate:
    """Share of a domain's seen samples that the online rule calls memorized at a reading."""
    members, losses_ST = seen_losses(run, domain)
    so_far = run.reading_steps.index(step) + 1
    now = grokking.memorized_now(losses_ST[:, :so_far], online_eps(run, domain)[:so_far], run.setting("panel.delta"))
    trained = ((members["first_step"] > 0) & (members["first_step"] <= step)).to_numpy()
    return grokking.memorized_fraction(now[trained], members["document"].to_numpy()[trained])


def online_eps(run: Records, domain: str) -> np.ndarray:
    """The online rule's eps of a domain at each reading [T], nats; NaN where too few samples are unseen."""
    given, count = run.setting(f"data.domains.{domain}.eps"), len(run.reading_steps)
    if given is not None:
        return np.full(count, given)
    other = run.panel[(run.panel["domain"] == domain) & (run.panel["cell"] != SEEN)]
    losses_UT, first_UT, step_UT = (
        other[name].to_numpy().reshape(max(1, count), -1).T for name in ("loss", "first_step", "step")
    )
    losses_UT = np.where(np.isfinite(losses_UT), losses_UT, np.finfo(np.float32).max)
    return grokking.online_eps(losses_UT, (first_UT == 0) | (first_UT > step_UT))


def onsets(run: Records) -> Iterator[tuple[Any, ...]]:
    """When each seen panel sample was memorized, by the paper's rule, as in the run's summary."""
    steps, delta = np.array(run.reading_steps), run.setting("panel.delta")
    tokens = run.tokens(steps)
    for domain in run.domains:
        members, losses_ST = seen_losses(run, domain)
        if not losses_ST.size:
            continue
        eps = grokking.choose_eps(losses_ST, delta=delta, min_tail=MIN_TAIL_IN_RUNS)
        found_S = np.full(len(members), -1)
        if eps is not None:
            found_S = grokking.memorized_onsets(losses_ST, eps, delta, MIN_TAIL_IN_RUNS)
        for document, piece, onset in zip(members["document"], members["piece"], found_S, strict=True):
            at = (-1, math.nan) if onset < 0 else (int(steps[onset]), float(tokens[onset]))
            yield domain, document, piece, math.nan if eps is None else eps, *at


def accuracy(run: Records) -> list[dict[str, Any]]:
    """Accuracy over all items of a domain's tasks, by reading; tasks of trained facts by themselves."""
    tasks = run.tasks[run.tasks["trained"].notna()]
    answers = run.probes[run.probes["correct"].notna()].merge(tasks[["task", "trained", "chance"]], on="task")
    rows: list[dict[str, Any]] = []
    for (domain, trained, step), own in answers.groupby(["domain", "trained", "step"], observed=True):
        right, items = int(own["correct"].sum()), len(own)
        found = grokking.share(right, items)
        head = {"domain": domain, "trained": bool(trained), "step": int(step), "tokens": run.tokens([step])[0]}
        rows.append(
            head
            | {"accuracy": found.mean, "low": found.low, "high": found.high}
            | {"items": items, "chance": own["chance"].astype(float).mean()}
        )
    return rows


def predictors(run: Records, accuracies: pd.DataFrame) -> list[dict[str, Any]]:
    """Accuracy on what is not trained, and the newest value of each predictor, per domain and reading of the probes."""
    rows: list[dict[str, Any]] = []
    for domain in run.domains:
        own = accuracies[(accuracies["domain"] == domain) & ~accuracies["trained"]]
        for name in table.predictors():
            own = own.assign(**{name: newest_values(run, table.find(name), domain, own["step"])})
        rows += own.drop(columns="trained").to_dict("records")
    return rows


def newest_values(run: Records, metric: Metric, domain: str, steps: Iterable[int]) -> np.ndarray:
    """The newest value of a metric at each of some steps; NaN before its first."""
    average = metric.name == "train_loss_average"
    curve = run.curve(f"{'loss/train' if average else metric.tag}/{domain}")
    values = curve["value"].to_numpy()
    if average:
        values = _averages(values)
    place = np.searchsorted(curve["step"].to_numpy(), np.asarray(list(steps)), side="right") - 1
    return np.where(place >= 0, values[np.maximum(place, 0)], np.nan) if len(values) else np.full(len(place), np.nan)


def _averages(values: np.ndarray) -> np.ndarray:
    """The moving average at each point, as in the run."""
    found: list[float] = []
    for value in values:
        found.append(moving_average(found[-1] if found else None, value))
    return np.array(found)


def correlation_rows(run: Records, predicted: pd.DataFrame) -> Iterator[tuple[Any, ...]]:
    """Correlation of accuracy with each predictor, from the summary, or of the readings so far."""
    numbers = ("value", "low", "high", "p", "n", "note")
    for domain in run.domains:
        found = run.outcome.get("domains", {}).get(domain, {}).get("correlations") or _correlated(
            run, predicted, domain
        )
        for predictor, by_kind in found.get("predictors", {}).items():
            for kind, each in by_kind.items():
                yield domain, predictor, *kind.split(" "), *(each[name] for name in numbers)
        if "note" in found:
            yield domain, "", "", "", *[math.nan] * 4, 0, found["note"]


def _correlated(run: Records, predicted: pd.DataFrame, domain: str) -> Mapping[str, Any]:
    """A domain's correlations in the form of ``summary.json``, computed from its readings so far."""
    rows = predicted[predicted["domain"] == domain] if len(predicted) else predicted
    if not len(rows):
        return as_summary({}, items=0)
    tokens_T = rows["tokens"].to_numpy()
    if not np.isfinite(tokens_T).all():  # a replay without counts
        tokens_T = rows["step"].to_numpy(float)
    columns = {name: rows[name].to_numpy() for name in table.predictors()}
    chance, items = rows["chance"].iloc[0], int(rows["items"].iloc[0])
    return as_summary(correlations(rows["accuracy"].to_numpy(), chance, items, tokens_T, columns), items)


def delays(run: Records) -> Iterator[tuple[Any, ...]]:
    """Groups of samples and of items that were paired at the end of the run, with the steps of their readings."""
    probe_steps = sorted(run.probes["step"].unique().tolist())
    for domain, found in run.outcome.get("domains", {}).items():
        delay = found.get("delay")
        for pair in delay["pairs"] if delay else ():
            at = run.reading_steps[pair["memorized_at"]], probe_steps[pair["generalized_at"]]
            size = pair["similarity"], pair["samples"], pair["items"]
            late = (pair["delay"][name] for name in ("steps", "tokens", "steps_resolution", "tokens_resolution"))
            yield domain, *at, *size, *late, ""
        if delay and not delay["pairs"]:
            yield domain, -1, -1, math.nan, 0, 0, *[math.nan] * 4, delay["note"]
