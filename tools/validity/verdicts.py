"""The monitor's verdicts on the study's domains: how often they are right, wrong or missing, and how early."""

from __future__ import annotations

import numpy as np
import pandas as pd

from moetrain.grokking import History, Phase, PhaseThresholds, phases, share
from moetrain.report.history import history_of as of_curves
from validity.units import GENERALIZES, MEMORIZED

GENERALIZING_PHASES = (Phase.GENERALIZING, Phase.SETTLED)
GIVEN, RIGHT = "units with a verdict", "of those, rightly"
FALSE_ALARMS = "memorized units called generalizing at the end"
MISSED = "generalizing units called memorizing at the end"


def judge(readings: pd.DataFrame, units: pd.DataFrame, thresholds: PhaseThresholds | None = None) -> pd.DataFrame:
    """One row per generalizing or memorized unit: its verdict at the end, and its verdicts of generalization.

    ``since`` is the first step of a verdict of generalization that lasts to the end; ``readings_generalizing`` counts
    the readings with such a verdict.
    """
    rows = []
    for unit in units[units["truth"].isin([GENERALIZES, MEMORIZED])].itertuples():
        own = readings[(readings["run"] == unit.run) & (readings["domain"] == unit.domain)]
        verdicts = phases(history_of(own), thresholds)
        generalizing = np.array([verdict.phase in GENERALIZING_PHASES for verdict in verdicts])
        lasting = len(generalizing) - int(np.argmin(generalizing[::-1])) if not generalizing.all() else 0
        rows.append(
            {
                **{name: getattr(unit, name) for name in ("run", "domain", "part", "variant", "kind", "truth")},
                "verdict": verdicts[-1].phase.name.lower(),
                "since": verdicts[lasting].step if generalizing[-1] else np.nan,
                "readings_generalizing": int(generalizing.sum()),
                "readings": len(generalizing),
                "half_rise": unit.half_rise,
                "heldout": unit.heldout,
            }
        )
    return pd.DataFrame(rows)


def history_of(own: pd.DataFrame) -> History:
    """A domain's history as the monitor saw it; held-out texts stand for unseen ones in older runs."""
    if not (own["metric"] == "loss/panel_unseen").any():
        own = own.replace({"metric": {"loss/panel_heldout": "loss/panel_unseen"}})
    return of_curves(own, np.sort(own["step"].unique()).tolist())


def confusion(judged: pd.DataFrame) -> pd.DataFrame:
    """Units by truth and verdict at the end."""
    return pd.crosstab(judged["truth"], judged["verdict"]).reset_index()


def rates(judged: pd.DataFrame) -> pd.DataFrame:
    """Error rates of the verdict: each with numerator, denominator and Wilson's 95% interval."""
    general, memorized = (judged[judged["truth"] == truth] for truth in (GENERALIZES, MEMORIZED))
    decided = judged["verdict"].isin([*_GENERAL, "memorizing"])
    early = general[general["since"] <= general["half_rise"]]
    counts = {
        GIVEN: (int(decided.sum()), len(judged)),
        RIGHT: (int((decided & _right(judged)).sum()), int(decided.sum())),
        FALSE_ALARMS: (int(memorized["verdict"].isin(_GENERAL).sum()), len(memorized)),
        "memorized units ever called so": (int((memorized["readings_generalizing"] > 0).sum()), len(memorized)),
        MISSED: (int((general["verdict"] == "memorizing").sum()), len(general)),
        "generalizing units found by half the rise of held-out accuracy": (len(early), len(general)),
    }
    shares = {what: share(*count) for what, count in counts.items()}
    rows = [(what, *counts[what], each.mean, each.low, each.high) for what, each in shares.items()]
    late = (general["since"] - general["half_rise"]).dropna()
    found = pd.DataFrame(rows, columns=["rate", "units", "of", "share", "low", "high"])
    if len(late):
        numbers = (len(late), len(general), late.median(), *late.quantile([0.25, 0.75]))
        found.loc[len(found)] = ("median steps from half the rise to the verdict", *numbers)
    return found


def by_variant(judged: pd.DataFrame) -> pd.DataFrame:
    """Per variant and truth: the number of units, and how many were judged right, wrong, or not at all."""
    rows = []
    for (variant, truth), own in judged.groupby(["variant", "truth"]):
        right = int(_right(own).sum())
        silent = int(own["verdict"].isin(["undecided", "learning"]).sum())
        rows.append((variant, truth, len(own), right, len(own) - right - silent, silent))
    return pd.DataFrame(rows, columns=["variant", "truth", "units", "right", "wrong", "no verdict"])


_GENERAL = tuple(phase.name.lower() for phase in GENERALIZING_PHASES)


def _right(judged: pd.DataFrame) -> pd.Series:
    return judged["verdict"].isin(_GENERAL) & (judged["truth"] == GENERALIZES) | (
        (judged["verdict"] == "memorizing") & (judged["truth"] == MEMORIZED)
    )
