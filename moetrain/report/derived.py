"""What follows from a run's records by the definitions of `moetrain.grokking`, as rows of the frames of an opened run.

Nothing here is stored: it is computed again, by the functions that computed it live.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from moetrain import grokking
from moetrain.grokking import Estimate
from moetrain.grokking.memorization import MIN_TAIL_IN_RUNS
from moetrain.loggers.summary import PREDICTORS
from moetrain.metrics.latest import as_metric
from moetrain.routing.panel import CELLS, HELDOUT, SEEN, TO_COME
from moetrain.routing.panel_metrics import dimension_by_layer, distance_by_layer, left_out_accuracy, panel_metrics

if TYPE_CHECKING:
    import pandas as pd

    from moetrain.report.open_run import OpenedRun

DELAY_COLUMNS = ["domain", "memorized_step", "generalized_step", "similarity", "samples", "items"]
DELAY_COLUMNS += ["delay_steps", "delay_tokens", "resolution_steps", "resolution_tokens", "note"]

_TAGS = {"train_loss": "loss/train", "validation_loss": "loss/validation", "bits_per_byte": "loss/validation_bpb"}
"""The tag behind a metric of ``summary.json``; all others are called the same."""
_AVERAGED = 0.9  # of the moving average, what stays at each point
NOT_ABOVE_CHANCE = "accuracy did not exceed chance by two standard errors in three readings in a row"


class Clock:
    """Text tokens trained on by step, from the counts by domain that a run logs."""

    def __init__(self, scalars: pd.DataFrame) -> None:
        counts = scalars[scalars["tag"].str.startswith("data/tokens/")]
        total = counts.groupby("step")["value"].sum()
        self._steps = np.array([0, *total.index])
        self._tokens = np.array([0.0, *total])

    def tokens(self, steps: Iterable[int]) -> np.ndarray:
        """Tokens at given steps, float64; NaN without any counts. After the newest count, as if it went on evenly."""
        asked = np.asarray(list(steps), float)
        if len(self._steps) < 2:
            return np.full(len(asked), np.nan)
        rate = (self._tokens[-1] - self._tokens[-2]) / (self._steps[-1] - self._steps[-2])
        beyond = np.maximum(asked - self._steps[-1], 0.0) * rate
        return np.interp(asked, self._steps, self._tokens) + beyond


def metrics_at(run: OpenedRun, step: int) -> dict[str, Estimate]:
    """The metrics of a stored reading; those that the run did not log at this step are left out."""
    # Twice the step as the run's length: then `memorized/gap` is always taken, and the run's own curve says if it was.
    found = panel_metrics(run.reading(step), run.domains, run.setting("monitor.tau"), 2 * step)
    so_far = run.reading_steps.index(step) + 1
    for domain in run.domains:
        eps = run.setting(f"data.domains.{domain}.eps")
        if eps is not None:
            now = grokking.memorized_now(seen_losses(run, domain)[1][:, :so_far], eps)
            found[f"memorized/fraction/{domain}"] = grokking.mean_of_samples(now)
    logged = set(run.scalars.loc[run.scalars["step"] == step, "tag"])
    return {tag: estimate for tag, estimate in found.items() if tag in logged}


def newest_metrics(run: OpenedRun) -> dict[str, dict[str, Any]]:
    """By domain the newest value of each of its metrics, in the form of ``summary.json``, for a run without one."""
    found: dict[str, dict[str, Any]] = {domain: {"metrics": {}} for domain in run.domains}
    newest = run.scalars.groupby("tag").last()
    titles = {tag: metric for metric, tag in _TAGS.items()}
    for tag, step, value in zip(newest.index, newest["step"], newest["value"], strict=True):
        start, _, domain = tag.rpartition("/")
        group = start.partition("/")[0]
        if domain not in found or group in ("phase", "data", "correlation", "delay", "probe"):
            continue
        exact = run.metrics_at(step).get(tag) if step in run.reading_steps else None
        found[domain]["metrics"][titles.get(start, start)] = as_metric(value if exact is None else exact)
    for domain, one in found.items():
        losses = run.curve(f"loss/train/{domain}")["value"].to_numpy()
        if len(losses):
            one["metrics"]["train_loss_average"] = as_metric(float(_moving_average(losses)[-1]))
    return found


def by_layer(run: OpenedRun) -> Iterator[tuple[Any, ...]]:
    """Distance and effective dimension of seen panel samples by domain, reading and layer."""
    steps, tau = run.reading_steps, run.setting("monitor.tau")
    for number, (step, tokens) in enumerate(zip(steps, run.tokens(steps), strict=True)):
        run.tell("reading routing by layer", number, len(steps))
        stored = run.reading(step)
        for domain in run.domains:
            distance_L, dimension_L = distance_by_layer(stored, domain, tau), dimension_by_layer(stored, domain)
            for layer, (distance, dimension) in enumerate(zip(distance_L, dimension_L, strict=True)):
                yield domain, step, tokens, layer, distance, dimension


def loss_curves(run: OpenedRun) -> Iterator[tuple[Any, ...]]:
    """Losses of the panel's cells and the gaps between them, as they were logged, with their intervals."""
    panel, logged = run.panel, set(zip(run.scalars["tag"], run.scalars["step"], strict=True))
    for (step, domain), own in panel.groupby(["step", "domain"], observed=True, sort=False):
        losses = own.loc[np.isfinite(own["loss"])]
        met = (losses["first_step"] > 0) & (losses["first_step"] <= step)
        cells = {
            "panel_seen": losses.loc[(losses["cell"] == CELLS[SEEN]) & met, "loss"].to_numpy(),
            "panel_to_come": losses.loc[losses["cell"] == CELLS[TO_COME], "loss"].to_numpy(),
            "panel_heldout": losses.loc[losses["cell"] == CELLS[HELDOUT], "loss"].to_numpy(),
        }
        found = {f"loss/{name}": grokking.mean_of_samples(values) for name, values in cells.items()}
        for name, cell in (("gap", "panel_to_come"), ("gap_heldout", "panel_heldout")):
            found[f"memorized/{name}"] = grokking.memorized_gap(cells[cell], cells["panel_seen"])
        for metric, each in found.items():
            if (f"{metric}/{domain}", step) in logged:
                yield domain, metric, int(step), run.tokens([step])[0], each.mean, each.low, each.high, each.samples


def left_out(run: OpenedRun) -> Iterator[tuple[Any, ...]]:
    """Leave-one-out accuracy of each domain at the readings that it was logged at, with its interval."""
    for domain in run.domains:
        steps = run.curve(f"kernel/left_out/{domain}")["step"].tolist()
        for step, tokens in zip(steps, run.tokens(steps), strict=True):
            if step in run.reading_steps:
                found = left_out_accuracy(run.reading(step), domain)
                yield domain, step, tokens, found.mean, found.low, found.high, found.samples


def seen_losses(run: OpenedRun, domain: str) -> tuple[pd.DataFrame, np.ndarray]:
    """A domain's seen panel samples, one a row, and their losses [S, T]; one that is not finite is the largest."""
    panel = run.panel
    chosen = panel[(panel["domain"] == domain) & (panel["cell"] == CELLS[SEEN])]
    readings = max(1, chosen["step"].nunique())
    losses_TS = chosen["loss"].to_numpy(np.float32).reshape(readings, -1)  # each reading in the panel's order
    members = chosen[["document", "piece"]].iloc[: losses_TS.shape[1]]
    return members, np.where(np.isfinite(losses_TS), losses_TS, np.finfo(np.float32).max).T


def onsets(run: OpenedRun) -> Iterator[tuple[Any, ...]]:
    """When each seen panel sample was memorized, by the paper's rule, as the run's summary has it."""
    steps = np.array(run.reading_steps)
    tokens = run.tokens(steps)
    for domain in run.domains:
        members, losses_ST = seen_losses(run, domain)
        if not losses_ST.size:
            continue
        eps = grokking.choose_eps(losses_ST, min_tail=MIN_TAIL_IN_RUNS)
        found_S = np.full(len(members), -1)
        if eps is not None:
            found_S = grokking.memorized_onsets(losses_ST, eps, min_tail=MIN_TAIL_IN_RUNS)
        for document, piece, onset in zip(members["document"], members["piece"], found_S, strict=True):
            never = onset < 0
            at = (-1, math.nan) if never else (int(steps[onset]), float(tokens[onset]))
            yield domain, document, piece, math.nan if eps is None else eps, *at


def accuracy(run: OpenedRun) -> list[dict[str, Any]]:
    """Accuracy over all items of a domain's tasks that are answered right or wrong, by reading; trained facts apart."""
    asked = run.tasks[run.tasks["trained"].notna()]
    answers = run.probes[run.probes["correct"].notna()].merge(asked[["task", "trained", "chance"]], on="task")
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


def predictors(run: OpenedRun) -> list[dict[str, Any]]:
    """Accuracy on what is not trained, and the newest value of each predictor, by domain and reading of the probes."""
    rows: list[dict[str, Any]] = []
    for domain in run.domains:
        own = run.accuracy[(run.accuracy["domain"] == domain) & ~run.accuracy["trained"]]
        for name, metric in PREDICTORS.items():
            own = own.assign(**{name: _newest(run, metric, domain, own["step"])})
        rows += own.drop(columns="trained").to_dict("records")
    return rows


def _newest(run: OpenedRun, metric: str, domain: str, steps: Iterable[int]) -> np.ndarray:
    """The newest value of a metric at each of some steps; NaN before it has one."""
    average = metric == "train_loss_average"
    curve = run.curve(f"{_TAGS.get('train_loss' if average else metric, metric)}/{domain}")
    values = curve["value"].to_numpy()
    if average:
        values = _moving_average(values)
    place = np.searchsorted(curve["step"].to_numpy(), np.asarray(list(steps)), side="right") - 1
    return np.where(place >= 0, values[np.maximum(place, 0)], np.nan) if len(values) else np.full(len(place), np.nan)


def _moving_average(values: np.ndarray) -> np.ndarray:
    """The average as the run kept it: each point weighs a tenth, the first one stands for what was before."""
    found: list[float] = []
    for value in values:
        before = found[-1] if found else value
        found.append(_AVERAGED * before + (1 - _AVERAGED) * value)
    return np.array(found)


def correlations(run: OpenedRun) -> Iterator[tuple[Any, ...]]:
    """Correlation of accuracy with each predictor, from the summary, or of the readings so far."""
    numbers = ("value", "low", "high", "p", "n", "note")
    for domain in run.domains:
        table = run.outcome.get("domains", {}).get(domain, {}).get("correlations") or _correlated(run, domain)
        for predictor, by_kind in table.get("predictors", {}).items():
            for kind, each in by_kind.items():
                yield domain, predictor, *kind.split(" "), *(each[name] for name in numbers)
        if "note" in table:
            yield domain, "", "", "", *[math.nan] * 4, 0, table["note"]


def _correlated(run: OpenedRun, domain: str) -> Mapping[str, Any]:
    """A domain's table in the form of ``summary.json``, computed from its readings so far."""
    rows = run.predictors
    rows = rows[rows["domain"] == domain] if len(rows) else rows
    if not len(rows):
        return {"note": "no task of this domain that is answered right or wrong"}
    accuracy_T, tokens_T = rows["accuracy"].to_numpy(), rows["tokens"].to_numpy()
    if not np.isfinite(tokens_T).all():  # a replay without counts
        tokens_T = rows["step"].to_numpy(float)
    first = grokking.first_above_chance(accuracy_T, rows["chance"].iloc[0], int(rows["items"].iloc[0]))
    if first is None:
        return {"note": NOT_ABOVE_CHANCE}
    first = max(first, int(np.argmax(tokens_T > 0)))
    found: dict[str, dict[str, Any]] = {}
    for predictor in PREDICTORS:
        table = grokking.correlate(rows[predictor].to_numpy()[first:], accuracy_T[first:], tokens_T[first:])
        found[predictor] = {
            f"{series} {method}": {name: getattr(each, name) for name in ("value", "low", "high", "p", "n", "note")}
            for (series, method), each in table.items()
        }
    return {"predictors": found}


def delays(run: OpenedRun) -> Iterator[tuple[Any, ...]]:
    """Groups of samples and of items that were paired at the end of the run, with steps for their readings."""
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
