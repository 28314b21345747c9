"""How well a metric separates generalizing units from memorized ones: AUC with intervals."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd

from validity.units import BASELINES, GENERALIZES, MEMORIZED, METRICS

RESAMPLES = 2000


def auc(general: np.ndarray, memorized: np.ndarray) -> float:
    """The chance that a generalizing unit's value is above a memorized one's, ties counting half; NaN without both."""
    if not len(general) or not len(memorized):
        return float("nan")
    above = (general[:, None] > memorized[None]).mean() + 0.5 * (general[:, None] == memorized[None]).mean()
    return float(above)


def over_runs(
    units: pd.DataFrame, statistic: Callable[[pd.DataFrame], float], seed: int = 0
) -> tuple[float, float, float]:
    """A statistic of units and its 95% interval, bootstrapped over runs, because units of a run are not independent."""
    runs = list(units.groupby("run").indices.values())
    rng = np.random.default_rng(seed)
    choices = (rng.integers(len(runs), size=len(runs)) for _ in range(RESAMPLES))
    drawn = (statistic(units.iloc[np.concatenate([runs[k] for k in chosen])]) for chosen in choices)
    low, high = np.nanpercentile(list(drawn), [2.5, 97.5])
    return statistic(units), float(low), float(high)


YARDSTICK = "random"
"""The study's table of random answers, which cannot generalize in any run."""
_LEFT_OUT = "kernel/left_out"

ASPECTS = {
    "at the end": "{}",
    "at like training loss": "band {}",
    "change since memorization": "change {}",
    "without loss, entropy, load and length": "rest",
}
"""The judged value of a metric, and its column in the table of units."""


def tables(units: pd.DataFrame, resample: bool = True) -> dict[str, pd.DataFrame]:
    """A table per aspect, with a row per metric.

    Its columns are the metric's sign (chosen on the fit runs), its AUC on the fit runs, its AUC on the test runs with
    interval, and the numbers of generalizing and memorized units in the test runs.
    """
    judged = units[units["truth"].isin([GENERALIZES, MEMORIZED])]
    found = {}
    for aspect, column in ASPECTS.items():
        rows = []
        for metric, title in (METRICS | BASELINES).items():
            of = without(judged, metric) if column == "rest" else judged
            rows.append({"measure": title} | _judge(of, column.format(metric), resample))
        found[aspect] = pd.DataFrame(rows)
    return found


def yardstick(units: pd.DataFrame, resample: bool = True) -> pd.DataFrame:
    """Leave-one-out accuracy, and the same minus that of the run's random answers, over all other domains."""
    of_run = units[units["domain"] == YARDSTICK].set_index("run")[_LEFT_OUT]
    others = units[units["truth"].isin([GENERALIZES, MEMORIZED]) & (units["domain"] != YARDSTICK)]
    others = others.assign(difference=others[_LEFT_OUT] - others["run"].map(of_run))
    columns = {METRICS[_LEFT_OUT]: _LEFT_OUT, "minus that of the run's random answers": "difference"}
    rows = [{"measure": title} | _judge(others, column, resample) for title, column in columns.items()]
    return pd.DataFrame(rows)


def _judge(units: pd.DataFrame, column: str, resample: bool) -> dict[str, object]:
    known = units.loc[units[column].notna(), ["run", "part", "truth", column]]
    fit, test = (known[known["part"] == part] for part in ("fit", "test"))
    sign = 1 if not _auc(fit, column) < 0.5 else -1
    counts = [int((test["truth"] == truth).sum()) for truth in (GENERALIZES, MEMORIZED)]

    def statistic(of: pd.DataFrame) -> float:
        return _auc(of, column, sign)

    value, low, high = over_runs(test, statistic) if resample and all(counts) else (statistic(test), np.nan, np.nan)
    fitted = statistic(fit)
    head: dict[str, object] = {"sign": "+" if sign > 0 else "-", "fit": fitted, "auc": value, "low": low, "high": high}
    return head | {"generalize": counts[0], "memorized": counts[1]}


def _auc(units: pd.DataFrame, column: str, sign: int = 1) -> float:
    general, memorized = (
        sign * units.loc[units["truth"] == truth, column].to_numpy() for truth in (GENERALIZES, MEMORIZED)
    )
    return auc(general, memorized)


def without(units: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Units with ``rest``: the metric's residual after regression on training loss, entropy, load and sample length.

    The linear fit uses all units of the fit runs, whatever their truth, and is subtracted from all units.
    """
    itself = {"loss/panel_seen": "log loss"}.get(metric, metric)
    others = [name for name in ("log loss", "entropy", "load_cv", "length") if name != itself]
    known = units.assign(**{"log loss": np.log(units["loss/panel_seen"])}).dropna(subset=[metric, *others])
    design = np.column_stack([np.ones(len(known)), known[others]])
    fit = (known["part"] == "fit").to_numpy()
    if not fit.any():
        return known.assign(rest=np.nan)
    line, *_ = np.linalg.lstsq(design[fit], known.loc[fit, metric].to_numpy(), rcond=None)
    return known.assign(rest=known[metric] - design @ line)
