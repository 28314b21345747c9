"""The paper's claims, tested on the study's runs: each holds, fails, or is undecided, with n and interval.

A claim is the sign of one number per unit, where units are the generalizing domains of the test runs. It **holds** if
the 95% interval of the mean over units is on the claimed side of zero, **fails** if it is on the other side, and is
**undecided** if it contains zero. Intervals are bootstrapped over runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from validity.separation import over_runs
from validity.units import GENERALIZES, curves

LEAST = 6  # points of a correlation
LEAST_UNITS = 3


@dataclass(frozen=True)
class Case:
    """The data of one unit."""

    curves: pd.DataFrame  # steps by metrics
    correlations: pd.DataFrame
    delays: pd.DataFrame
    onsets: pd.DataFrame
    layers: pd.DataFrame


@dataclass(frozen=True)
class Claim:
    title: str
    number: str  # the quantity that is averaged over units
    sign: int  # its claimed sign
    of: Callable[[Case], float]  # NaN where it is undefined


def test_claims(tables: Mapping[str, pd.DataFrame], units: pd.DataFrame) -> pd.DataFrame:
    """claim, number, value, low, high, units, verdict; one row per claim."""
    chosen = units[(units["truth"] == GENERALIZES) & (units["part"] == "test")]
    by_unit = curves(tables["readings"])
    cases = [
        (run, Case(by_unit[run, domain], *(_own(tables[name], run, domain) for name in _FRAMES)))
        for run, domain in zip(chosen["run"], chosen["domain"], strict=True)
    ]
    return pd.DataFrame([_test(claim, cases) for claim in CLAIMS])


_FRAMES = ("correlations", "delays", "onsets", "layers")


def _own(frame: pd.DataFrame, run: str, domain: str) -> pd.DataFrame:
    return frame[(frame["run"] == run) & (frame["domain"] == domain)]


def _test(claim: Claim, cases: list[tuple[str, Case]]) -> dict[str, object]:
    found = pd.DataFrame([(run, claim.of(case)) for run, case in cases], columns=["run", "value"]).dropna()
    value = low = high = float("nan")
    verdict = f"undecided: fewer than {LEAST_UNITS} units have a value"
    if len(found) >= LEAST_UNITS:
        value, low, high = over_runs(found, lambda of: float(of["value"].mean()))
        verdict = "undecided" if low <= 0 <= high else "holds" if (low > 0) == (claim.sign > 0) else "fails"
    head = {"claim": claim.title, "number": claim.number, "value": value, "low": low, "high": high}
    return head | {"units": len(found), "verdict": verdict}


def _logged(predictor: str, series: str) -> Callable[[Case], float]:
    """Rank correlation of accuracy with a predictor, as reported by the run."""

    def of(case: Case) -> float:
        rows = case.correlations
        rows = rows[(rows["predictor"] == predictor) & (rows["series"] == series) & (rows["method"] == "spearman")]
        return float(rows["value"].iloc[0]) if len(rows) else float("nan")

    return of


def _together(first: str, second: str, differences: bool = False) -> Callable[[Case], float]:
    """Rank correlation of two curves over the readings where both have a value."""

    def of(case: Case) -> float:
        if first not in case.curves or second not in case.curves:
            return float("nan")
        both = case.curves[[first, second]].dropna()
        both = both.diff().iloc[1:] if differences else both
        return float(spearmanr(both[first], both[second]).statistic) if len(both) >= LEAST else float("nan")

    return of


def _spread_of_onsets(case: Case) -> float:
    """Interquartile range of the steps at which samples were memorized, minus the interval between readings."""
    steps = case.onsets.loc[case.onsets["step"] >= 0, "step"]
    if len(steps) < LEAST:
        return float("nan")
    between = float(np.diff(case.curves.index).max())
    return float(steps.quantile(0.75) - steps.quantile(0.25)) - between


def _later_waits(case: Case) -> float:
    """Rank correlation of a group's memorization step and the delay until its items generalize."""
    pairs = case.delays[case.delays["memorized_step"] >= 0]
    if len(pairs) < LEAST or pairs["memorized_step"].nunique() < 2:
        return float("nan")
    return float(spearmanr(pairs["memorized_step"], pairs["delay_steps"]).statistic)


def _early_first(case: Case) -> float:
    """Change of distance of the last layer minus that of the first, from the first three readings to the last three."""
    by_layer = case.layers.pivot_table(index="step", columns="layer", values="d_path").dropna()
    if len(by_layer) < LEAST:
        return float("nan")
    change = by_layer.iloc[-3:].mean() - by_layer.iloc[:3].mean()
    return float(change.iloc[-1] - change.iloc[0])


_TREND = "... beyond the trend that both have"
_OVER_READINGS, _DIFFERENCES = "rank correlation over readings", "rank correlation of first differences"
_LEFT_OUT, _HELDOUT = "kernel/left_out", "heldout_accuracy"
CLAIMS = (
    Claim("D_path falls as accuracy rises", _OVER_READINGS, -1, _logged("d_path", "raw")),
    Claim(_TREND, _DIFFERENCES, -1, _logged("d_path", "differences")),
    Claim("consistency rises with accuracy", _OVER_READINGS, 1, _logged("consistency", "raw")),
    Claim(_TREND, _DIFFERENCES, 1, _logged("consistency", "differences")),
    Claim(
        "samples are memorized at different times", "steps between quartiles, less one reading", 1, _spread_of_onsets
    ),
    Claim("what is memorized later waits longer", "rank correlation of onset and delay", 1, _later_waits),
    Claim("early layers simplify first", "change of distance, last layer less first", 1, _early_first),
    Claim("d_eff falls with D_path", _OVER_READINGS, 1, _together("kernel/d_eff", "pathway/d_path")),
    Claim(_TREND, _DIFFERENCES, 1, _together("kernel/d_eff", "pathway/d_path", differences=True)),
    Claim("not the paper's: training loss falls as accuracy rises", _OVER_READINGS, -1, _logged("train_loss", "raw")),
    Claim(
        "not the paper's: leave-one-out accuracy rises with accuracy", _OVER_READINGS, 1, _together(_LEFT_OUT, _HELDOUT)
    ),
    Claim(_TREND, _DIFFERENCES, 1, _together(_LEFT_OUT, _HELDOUT, differences=True)),
)
