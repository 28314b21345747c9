"""Units of the study: a domain of a run, its truth, and the value of each metric.

The truth is held-out accuracy, which no judged metric uses. At the end of the run a unit **generalizes** if at least
40% of held-out facts are answered correctly, and is **memorized** if at most 10% are. A unit between the two counts
only in the table of truths. In both cases at least 90% of the trained facts must be answered correctly. "At the end" is
the mean of the last three readings.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from validity.plan import Planned

GENERALIZES, MEMORIZED, BETWEEN, UNLEARNED = "generalizes", "memorized", "between", "not learned"
LEARNED, GENERAL, MEMORY = 0.9, 0.4, 0.1
LAST = 3  # readings averaged "at the end"
BAND = (0.05, 0.5)  # nats: units are compared at training losses in this range

METRICS = {
    "memorized/share": "memorized share",
    "kernel/left_out": "leave-one-out accuracy",
    "pathway/d_path": "D_path (paper)",
    "pathway/d_path_norm": "D_path, normalised",
    "pathway/consistency": "consistency (paper)",
    "pathway/cosine": "cosine",
    "pathway/sharing": "sharing",
    "pathway/individuality": "individuality",
    "pathway/spread": "spread",
    "kernel/effective_rank": "effective rank",
    "pathway/layer_cka": "layer CKA",
    "kernel/d_eff": "d_eff",
}
BASELINES = {
    "loss/panel_seen": "training loss",
    "entropy": "router entropy (whole model)",
    "load_cv": "load variation (whole model)",
    "memorized/gap_heldout": "held-out loss minus training loss (reads held-out data)",
}
KINDS = {
    "modular": "rule",
    "reverse": "rule",
    "random": "no rule",
    "random_math": "no rule",
    "easy": "easy rule",
    "text": "text seen once",
    "shuffled": "shuffled text",
}


def curves(readings: pd.DataFrame) -> dict[tuple[str, str], pd.DataFrame]:
    """Per run and domain, a frame of steps by metrics, including the metrics of the whole model."""
    values = readings.pivot_table(index=["run", "domain", "step"], columns="metric", values="value")
    found: dict[tuple[str, str], pd.DataFrame] = {}
    for run, own in values.groupby(level="run"):
        model = own.xs((run, ""), level=("run", "domain")).dropna(axis=1, how="all")
        for domain in own.index.unique("domain"):
            if domain:
                frame = own.xs((run, domain), level=("run", "domain"))
                found[str(run), str(domain)] = frame.drop(columns=model.columns).join(model)
    return found


def make_units(readings: pd.DataFrame, runs: Sequence[Planned]) -> pd.DataFrame:
    """One row per unit, which is a domain whose facts are probed.

    Columns: run, domain, kind, part, variant, truth; trained and heldout: accuracy at the end; memorized and half_rise:
    the steps at which it was memorized and at which held-out accuracy reached half of its final value; and for each
    metric its value at the end (by its name), its change since memorization (``change METRIC``), and its mean while
    training loss was within `BAND` (``band METRIC``).
    """
    planned = {run.name: run for run in runs}
    rows = []
    for (run, domain), frame in curves(readings).items():
        if not {"trained_accuracy", "heldout_accuracy"} <= {*frame.dropna(axis=1, how="all").columns}:
            continue  # text without facts: its truth is unknown
        truth, times = _truth(frame)
        head = {"run": run, "domain": domain, "part": planned[run].part, "variant": planned[run].variant}
        rows.append(head | {"kind": KINDS[domain]} | truth | times | _values(frame, times["memorized"]))
    return pd.DataFrame(rows)


def _truth(frame: pd.DataFrame) -> tuple[dict[str, object], dict[str, float]]:
    answered = frame[["trained_accuracy", "heldout_accuracy"]].dropna()
    trained, heldout = answered["trained_accuracy"], answered["heldout_accuracy"]
    at_end = {"trained": trained.iloc[-LAST:].mean(), "heldout": heldout.iloc[-LAST:].mean()}
    if at_end["trained"] < LEARNED:
        truth = UNLEARNED
    elif at_end["heldout"] >= GENERAL:
        truth = GENERALIZES
    else:
        truth = MEMORIZED if at_end["heldout"] <= MEMORY else BETWEEN
    # The mean of two readings, because one alone varies by a few percent.
    memorized = _first(trained.rolling(2).mean() >= LEARNED)
    half = _first(heldout >= at_end["heldout"] / 2) if truth == GENERALIZES else np.nan
    return {"truth": truth, **at_end}, {"memorized": memorized, "half_rise": half}


def _first(holds: pd.Series) -> float:
    """The first step at which a condition holds; NaN if it never does."""
    return float(holds.index[np.argmax(holds)]) if holds.any() else np.nan


def _values(frame: pd.DataFrame, memorized: float) -> dict[str, float]:
    loss = frame["loss/panel_seen"]
    found = {"length": frame["length"].iloc[-1]}
    within = (loss >= BAND[0]) & (loss <= BAND[1]) & (frame.index >= memorized)
    for metric in (*METRICS, *BASELINES):
        curve = frame[metric] if metric in frame else pd.Series(np.nan, index=frame.index)
        # NaN rather than a mean over fewer readings.
        at_end = curve.iloc[-LAST:].mean(skipna=False)
        since = curve[curve.index >= memorized].iloc[:LAST].mean(skipna=False)
        found |= {metric: at_end, f"change {metric}": at_end - since, f"band {metric}": curve[within].mean()}
    return found
