"""The study on natural text: its readings, how each measure separates memorized units, and error rates of the verdict.

A unit is a domain of a run. Its truth is the memorized share of texts that the monitor never reads (`text_truth`), at
the last step: at least `MEMORIZED` of what was learned is memory, or at most `CARRIES_OVER`; a unit between the two
counts only in the table of truths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

import moetrain
from moetrain.grokking import Phase, PhaseThresholds, phases, share
from moetrain.report.open_run import OpenedRun
from moetrain.routing.panel_metrics import panel_metrics
from validity import readings as stored
from validity.plan import FINISHED, Planned, StudyError
from validity.router_memory import router_memory
from validity.separation import auc, over_runs
from validity.text_truth import RunData, panel_texts
from validity.text_truth import measure as measure_truth
from validity.verdicts import history_of

MEMORIZED, CARRIES_OVER = 0.12, 0.06
TRUTHS = (MEMORY, GENERAL, BETWEEN) = ("memorized", "carries over", "between")
TRUTH_READINGS = (1, 2, 3, 5, 7, 10)  # readings, from 0, after which the truth is measured too
MEASURES = {
    "memorized/share": "memorized share",
    "memorized/gap_heldout": "gap to held-out texts",
    "claim_ratio": "claim ratio (trained samples only)",
    "memorized/excess_confidence": "excess confidence (trained samples only)",
    "loss/panel_seen": "training loss",
    "loss/fallen": "fall of the training loss, of its value before the training",
    "kernel/d_eff": "d_eff",
    "kernel/effective_rank": "effective rank",
    "pathway/d_path": "D_path (paper)",
    "pathway/d_path_norm": "D_path, normalised",
    "pathway/consistency": "consistency (paper)",
    "pathway/cosine": "cosine",
    "pathway/spread": "spread",
    "pathway/layer_cka": "layer CKA",
    "pathway/individuality": "individuality",
    "pathway/sharing": "sharing",
    "seen less held-out D_path": "D_path, seen less held-out",
    "seen less held-out cosine": "cosine, seen less held-out",
    "seen less held-out spread": "spread, seen less held-out (relative)",
    "router/drift": "routing drift, seen over held-out",
    "router/membership": "seen told from held-out by routing",
    "router/membership_late": "... by the later layers",
    "text/membership": "control: ... by their tokens",
}
ROUTING = [name for name in MEASURES if name.startswith(("kernel", "pathway", "router", "seen less"))]


def measure(
    runs: Sequence[Planned], output: Path, progress: Callable[[str, int, int], None] = lambda *_: None
) -> pd.DataFrame:
    """run, domain, step, metric, value, low, high, n: panel metrics, losses by exposure, router memory, and the truth.

    Raises:
        StudyError: no run is finished.
    """
    finished = [run for run in runs if (output / run.name / FINISHED).is_file()]
    if not finished:
        raise StudyError(f"{output}: no finished run of the study: train them with `validate_monitor.py run`")
    parts = []
    for number, planned in enumerate(finished):
        progress(planned.name, number, len(finished))
        run = moetrain.open_run(output / planned.name)
        steps = [step for place, step in enumerate(run.reading_steps) if place in TRUTH_READINGS]
        data = RunData(output / planned.name)
        truth = pd.DataFrame(measure_truth(data, steps))
        whole = pd.concat([_panel(run), _exposures(run), _router(run, data), truth], ignore_index=True)
        parts.append(whole.assign(run=planned.name))
    return pd.concat(parts, ignore_index=True)


def _panel(run: OpenedRun) -> pd.DataFrame:
    rows = []
    for step in run.reading_steps:
        found = panel_metrics(run.reading(step), run.domains, run.setting("monitor.tau"), 2 * step)
        for tag, each in found.items():
            metric, _, domain = tag.rpartition("/")
            rows.append((domain, step, metric, each.mean, each.low, each.high, each.samples))
    return _frame(rows)


def _exposures(run: OpenedRun) -> pd.DataFrame:
    """Losses by exposure and excess confidence as logged, and the newest with their intervals."""
    rows = []
    for tag, step, value in zip(run.scalars["tag"], run.scalars["step"], run.scalars["value"], strict=True):
        metric, _, domain = tag.rpartition("/")
        if metric.startswith(("loss/first_exposure", "loss/exposure_", "memorized/excess_confidence")):
            rows.append((domain, step, metric, value, np.nan, np.nan, 0))
    return _frame(rows)


def _router(run: OpenedRun, data: RunData) -> pd.DataFrame:
    found = router_memory([run.reading(step) for step in run.reading_steps], panel_texts(data))
    step = run.reading_steps[-1]
    rows = [(name, value) for own in found.values() for name, value in own.items()]
    domains = [domain for domain, own in found.items() for _ in own]
    return _frame([(domain, step, *row, np.nan, np.nan, 0) for domain, row in zip(domains, rows, strict=True)])


def _frame(rows: Sequence[tuple[object, ...]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["domain", "step", "metric", "value", "low", "high", "n"])


def make_units(table: pd.DataFrame, runs: Sequence[Planned]) -> pd.DataFrame:
    """One row per unit: run, domain, part, variant, truth, true share with interval, and each measure at the end."""
    planned = {run.name: run for run in runs}
    rows = []
    for (run, domain), own in table.groupby(["run", "domain"]):
        newest = own.sort_values("step", kind="stable").groupby("metric").last()
        if "true/share" not in newest.index or str(run) not in planned:
            continue
        value = newest["value"]
        true, low, high = (float(newest.loc["true/share", column]) for column in ("value", "low", "high"))
        truth = MEMORY if true >= MEMORIZED else GENERAL if true <= CARRIES_OVER else BETWEEN
        made = {
            "seen less held-out D_path": value.get("pathway/d_path_norm", np.nan)
            - value.get("pathway_heldout/d_path_norm", np.nan),
            "seen less held-out cosine": value.get("pathway/cosine", np.nan)
            - value.get("pathway_heldout/cosine", np.nan),
            "seen less held-out spread": value.get("pathway/spread", np.nan)
            / value.get("pathway_heldout/spread", np.nan),
            "loss/fallen": 1 - value["loss/panel_seen"] / own.loc[own["step"] == 0, "value"].max(),
        }
        part, variant = planned[str(run)].part, planned[str(run)].variant
        head = {"run": run, "domain": domain, "part": part, "variant": variant, "truth": truth}
        measured = {name: made[name] if name in made else value.get(name, np.nan) for name in MEASURES}
        rows.append(head | {"true share": true, "true low": low, "true high": high} | measured)
    return pd.DataFrame(rows)


def separation(units: pd.DataFrame) -> pd.DataFrame:
    """Per measure: its sign (chosen on the fit runs), AUC on fit and test runs, the latter with interval.

    ``at like loss``: of the residual on the training loss and its fall, whose lines are fitted on the fit runs;
    ``easy``: easy text met once against all memorized text.
    """
    judged = units[units["truth"] != BETWEEN]
    rows = []
    for name, title in MEASURES.items():
        known = judged[judged[name].notna()]
        known = known.assign(plain=known[name])
        fit, test = (known[known["part"] == part] for part in ("fit", "test"))
        if not len(test) or test["truth"].nunique() < 2 or fit["truth"].nunique() < 2:
            continue
        sign = 1 if not _auc(fit, "plain") < 0.5 else -1
        value, low, high = over_runs(test, partial(_auc, column="plain", sign=sign))
        easy = test[(test["truth"] == MEMORY) | (test["domain"] == "easy")]
        rest = _residual(known, name)
        rest_sign = 1 if not _auc(rest[rest["part"] == "fit"], "rest") < 0.5 else -1
        rows.append(
            {
                "measure": title,
                "sign": "+" if sign > 0 else "-",
                "fit": _auc(fit, "plain", sign),
                "auc": value,
                "low": low,
                "high": high,
                "easy": _auc(easy, "plain", sign),
                "at like loss": _auc(rest[rest["part"] == "test"], "rest", rest_sign),
                "memorized": int((test["truth"] == MEMORY).sum()),
                "carries over": int((test["truth"] == GENERAL).sum()),
            }
        )
    return pd.DataFrame(rows)


def _residual(known: pd.DataFrame, name: str) -> pd.DataFrame:
    others = [other for other in ("loss/panel_seen", "loss/fallen") if other != name]
    known = known.dropna(subset=others)
    design = np.column_stack([np.ones(len(known)), known[others]])
    fit = (known["part"] == "fit").to_numpy()
    line, *_ = np.linalg.lstsq(design[fit], known.loc[fit, name].to_numpy(), rcond=None)
    return known.assign(rest=known[name] - design @ line)


def _auc(units: pd.DataFrame, column: str, sign: int = 1) -> float:
    memorized, general = (sign * units.loc[units["truth"] == truth, column].to_numpy() for truth in (MEMORY, GENERAL))
    return auc(memorized, general)


def judge(table: pd.DataFrame, units: pd.DataFrame, thresholds: PhaseThresholds | None = None) -> pd.DataFrame:
    """Per unit: its verdict at the end, and readings at which memorization was found and was true.

    ``alarms`` counts readings with a verdict against the truth at that reading, of ``checked``, readings whose truth is
    known and not between; ``sure_alarms`` and ``sure_checked`` only where the interval of the truth excludes the other
    kind. ``found``: first reading from which on the share's interval is above 0; ``tenth``: first
    measured one at which the true gap exceeds a tenth of its last value.
    """
    rows = []
    for unit in units.itertuples():
        own = table[(table["run"] == unit.run) & (table["domain"] == unit.domain)]
        panel = own[own["metric"].str.startswith(("loss/panel", "memorized/share", "kernel/left_out"))]
        verdicts = phases(history_of(panel), thresholds)
        by_step = {verdict.step: verdict.phase for verdict in verdicts}
        truth = own[own["metric"] == "true/share"].set_index("step").dropna(subset="value")
        true = truth["value"]
        gap = own[own["metric"] == "true/gap"].set_index("step")["value"].dropna()
        shares = own[own["metric"] == "memorized/share"].set_index("step").sort_index()
        above = (shares["low"] > 0).to_numpy()
        lasting = len(above) - int(np.argmin(above[::-1])) if not above.all() else 0
        checked = {step: by_step[step] for step, value in true.items() if not CARRIES_OVER < value < MEMORIZED}
        false = [s for s, phase in checked.items() if _wrong(phase, true[s])]
        low, high = truth["low"], truth["high"]
        sure = {s for s in checked if (low[s] > CARRIES_OVER if true[s] >= MEMORIZED else high[s] < MEMORIZED)}
        rows.append(
            {
                **{name: getattr(unit, name) for name in ("run", "domain", "part", "variant", "truth")},
                "verdict": verdicts[-1].phase.name.lower(),
                "alarms": len(false),
                "checked": len(checked),
                "sure_alarms": len(sure.intersection(false)),
                "sure_checked": len(sure),
                "found": float(shares.index[lasting]) if len(above) and above[-1] else np.nan,
                "tenth": float(gap.index[np.argmax(gap >= gap.iloc[-1] / 10)]) if len(gap) else np.nan,
            }
        )
    return pd.DataFrame(rows)


def _wrong(phase: Phase, true_share: float) -> bool:
    general = phase in (Phase.GENERALIZING, Phase.SETTLED)
    return true_share >= MEMORIZED if general else phase == Phase.MEMORIZING and true_share <= CARRIES_OVER


GIVEN, RIGHT, FALSE_ALARMS = "units with a verdict", "of those, rightly", "texts that carry over, called memorizing"


def rates(judged: pd.DataFrame) -> pd.DataFrame:
    """Error rates of the verdict: each with numerator, denominator and Wilson's 95% interval."""
    general, memorized = (judged[judged["truth"] == truth] for truth in (GENERAL, MEMORY))
    both = pd.concat([general, memorized])
    said = ["generalizing", "settled"]
    decided = both["verdict"].isin([*said, "memorizing"])
    right = both["verdict"].isin(said) & (both["truth"] == GENERAL)
    right |= (both["verdict"] == "memorizing") & (both["truth"] == MEMORY)
    by_tenth = memorized[memorized["found"].notna() & (memorized["found"] <= memorized["tenth"])]
    counts = {
        GIVEN: (int(decided.sum()), len(both)),
        RIGHT: (int((decided & right).sum()), int(decided.sum())),
        FALSE_ALARMS: (int((general["verdict"] == "memorizing").sum()), len(general)),
        "memorized texts, called generalizing or settled": (int(memorized["verdict"].isin(said).sum()), len(memorized)),
        "units with a verdict against the truth at any reading": (int((judged["alarms"] > 0).sum()), len(judged)),
        "... where the truth's interval excludes the other kind": (
            int((judged["sure_alarms"] > 0).sum()),
            int((judged["sure_checked"] > 0).sum()),
        ),
        "readings with a verdict against their truth": (int(judged["alarms"].sum()), int(judged["checked"].sum())),
        "memorized units found by a tenth of the final gap": (len(by_tenth), len(memorized)),
    }
    shares = {what: share(*count) for what, count in counts.items()}
    return pd.DataFrame(
        [(what, *counts[what], each.mean, each.low, each.high) for what, each in shares.items()],
        columns=["rate", "units", "of", "share", "low", "high"],
    )


def report(table: pd.DataFrame, runs: Sequence[Planned]) -> dict[str, pd.DataFrame]:
    """Every table of the study by title."""
    units = make_units(table, runs)
    judged = judge(table, units)
    test = judged[judged["part"] == "test"]
    by_domain = units[units["part"] == "test"].groupby("domain")
    overview = by_domain.agg(
        **{
            "units": ("run", "size"),
            "true share, median": ("true share", "median"),
            "smallest": ("true share", "min"),
            "largest": ("true share", "max"),
            "measured, median": ("memorized/share", "median"),
        }
    ).reset_index()
    verdicts = pd.crosstab(test["domain"], test["verdict"]).reset_index()
    lag = (test["found"] - test["tenth"])[test["truth"] == MEMORY].dropna()
    late = pd.DataFrame(
        [("steps from a tenth of the true gap until it is found", len(lag), lag.median(), *lag.quantile([0.25, 0.75]))],
        columns=["number", "units", "median", "quartile", "quartile 3"],
    )
    return {
        "true shares on the test runs": overview,
        "units by truth": units.groupby(["part", "truth"]).size().unstack(fill_value=0).reset_index(),
        "AUC at the end": separation(units),
        "verdicts on the test runs, by domain": verdicts,
        "verdicts on the fit runs": pd.crosstab(
            judged.loc[judged["part"] == "fit", "truth"], judged.loc[judged["part"] == "fit", "verdict"]
        ).reset_index(),
        "verdicts on the test runs": pd.crosstab(test["truth"], test["verdict"]).reset_index(),
        "error rates on the test runs": rates(test),
        "how early": late,
    }


def summary(found: dict[str, pd.DataFrame], table: pd.DataFrame, runs: Sequence[Planned]) -> dict[str, object]:
    """The main numbers of the study, from its test runs: values with 95% intervals."""
    measured = [run.part for run in runs if run.name in set(table["run"])]
    first = found["AUC at the end"].set_index("measure").loc["memorized share"]
    error = found["error rates on the test runs"].set_index("rate")
    numbers: dict[str, object] = {
        "runs": {part: measured.count(part) for part in ("fit", "test")},
        "units": {"carries_over": int(first["carries over"]), "memorized": int(first["memorized"])},
        "auc_heldout": round(float(first["auc"]), 6),
        "auc_heldout_interval": [round(float(first[end]), 6) for end in ("low", "high")],
    }
    for name, rate in (("verdict_share", GIVEN), ("right_share", RIGHT), ("false_alarm_rate", FALSE_ALARMS)):
        numbers[name] = round(float(error.loc[rate, "share"]), 6)
        numbers[f"{name}_interval"] = [round(float(error.loc[rate, end]), 6) for end in ("low", "high")]
    return numbers


def save(table: pd.DataFrame, folder: Path) -> None:
    """Write the readings; rows of runs that are not among them are kept."""
    stored.save({"readings": stored.with_other_runs(table, folder / "readings.parquet")}, folder)


def load(folder: Path) -> pd.DataFrame:
    """Read the saved readings.

    Raises:
        StudyError: there are none.
    """
    if not (folder / "readings.parquet").is_file():
        raise StudyError(
            f"{folder}/readings.parquet: missing: write it with `validate_monitor.py measure --study text`"
        )
    return pd.read_parquet(folder / "readings.parquet")
