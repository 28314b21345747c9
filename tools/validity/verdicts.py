"""The monitor's verdict on the study's domains: how often it is right, wrong or silent, and how early it is right."""

from __future__ import annotations

import numpy as np
import pandas as pd

from moetrain.grokking import History, Phase, PhaseThresholds, curve, phases, share
from validity.units import GENERALIZES, MEMORIZED

SAYS_GENERALIZES = (Phase.GENERALIZING, Phase.SETTLED)
GIVEN, RIGHT = "units with a verdict", "of those, rightly"
FALSE_ALARMS = "memorized units called generalizing at the end"


def judge(readings: pd.DataFrame, units: pd.DataFrame, thresholds: PhaseThresholds | None = None) -> pd.DataFrame:
    """run, domain, part, variant, truth, the verdict at the end, the first step of a verdict of generalization that
    stays to the end, how many readings had one at all, and half_rise; one row a unit of either truth."""
    rows = []
    for unit in units[units["truth"].isin([GENERALIZES, MEMORIZED])].itertuples():
        own = readings[(readings["run"] == unit.run) & (readings["domain"] == unit.domain)]
        verdicts = phases(_history(own), thresholds)
        says = np.array([verdict.phase in SAYS_GENERALIZES for verdict in verdicts])
        stays = len(says) - int(np.argmin(says[::-1])) if not says.all() else 0
        rows.append(
            {
                "run": unit.run,
                "domain": unit.domain,
                "part": unit.part,
                "variant": unit.variant,
                "kind": unit.kind,
                "truth": unit.truth,
                "verdict": verdicts[-1].phase.name.lower(),
                "since": verdicts[stays].step if says[-1] else np.nan,
                "readings_generalizing": int(says.sum()),
                "readings": len(says),
                "half_rise": unit.half_rise,
                "heldout": unit.heldout,
            }
        )
    return pd.DataFrame(rows)


def _history(own: pd.DataFrame) -> History:
    """A domain's history as the monitor had it; steps stand for tokens, since every step has as many."""
    steps = np.sort(own["step"].unique())
    by_metric = {str(metric): rows.set_index("step").reindex(steps) for metric, rows in own.groupby("metric")}
    nothing = pd.DataFrame({"value": np.nan, "low": np.nan, "high": np.nan, "n": 0}, index=steps)
    loss, left_out = (by_metric.get(metric, nothing) for metric in ("loss/panel_seen", "kernel/left_out"))
    counts = [part["n"].fillna(0).to_numpy(np.int64) for part in (loss, left_out)]
    curves = [curve(part[["value", "low", "high"]].to_numpy(float)) for part in (loss, left_out)]
    return History(steps, steps + 1, *counts, *curves)


def confusion(judged: pd.DataFrame) -> pd.DataFrame:
    """Units by truth and verdict at the end."""
    return pd.crosstab(judged["truth"], judged["verdict"]).reset_index()


def rates(judged: pd.DataFrame) -> pd.DataFrame:
    """What the verdict is worth: each rate with its numerator, denominator and Wilson's 95% interval."""
    general, memorized = (judged[judged["truth"] == truth] for truth in (GENERALIZES, MEMORIZED))
    decided = judged["verdict"].isin([*_GENERAL, "memorizing"])
    early = general[general["since"] <= general["half_rise"]]
    counts = {
        GIVEN: (int(decided.sum()), len(judged)),
        RIGHT: (int((decided & _right(judged)).sum()), int(decided.sum())),
        FALSE_ALARMS: (
            int(memorized["verdict"].isin(_GENERAL).sum()),
            len(memorized),
        ),
        "memorized units ever called so": (int((memorized["readings_generalizing"] > 0).sum()), len(memorized)),
        "generalizing units called memorizing at the end": (
            int((general["verdict"] == "memorizing").sum()),
            len(general),
        ),
        "generalizing units found by half the rise of held-out accuracy": (len(early), len(general)),
    }
    shares = {what: share(*count) for what, count in counts.items()}
    rows = [(what, *counts[what], each.mean, each.low, each.high) for what, each in shares.items()]
    late = (general["since"] - general["half_rise"]).dropna()
    found = pd.DataFrame(rows, columns=["rate", "units", "of", "share", "low", "high"])
    if len(late):
        median = (
            "median steps from half the rise to the verdict",
            len(late),
            len(general),
            late.median(),
            *late.quantile([0.25, 0.75]),
        )
        found.loc[len(found)] = median
    return found


def by_variant(judged: pd.DataFrame) -> pd.DataFrame:
    """Units of each truth by variant: how many, how many judged rightly, how many wrongly."""
    rows = []
    for (variant, truth), own in judged.groupby(["variant", "truth"]):
        right = int(_right(own).sum())
        silent = int(own["verdict"].isin(["undecided", "learning"]).sum())
        rows.append((variant, truth, len(own), right, len(own) - right - silent, silent))
    return pd.DataFrame(rows, columns=["variant", "truth", "units", "right", "wrong", "no verdict"])


_GENERAL = tuple(phase.name.lower() for phase in SAYS_GENERALIZES)


def _right(judged: pd.DataFrame) -> pd.Series:
    return judged["verdict"].isin(_GENERAL) & (judged["truth"] == GENERALIZES) | (
        (judged["verdict"] == "memorizing") & (judged["truth"] == MEMORIZED)
    )
