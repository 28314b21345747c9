"""Does the monitor tell the truth? Runs with planted truth, what each measure says of them, how often the verdict errs.

    python tools/validate_monitor.py run --output runs/validity      # 37 runs of about 3 core-minutes, or what is left
    python tools/validate_monitor.py measure --output runs/validity  # their readings and tools/results/validity.json
    python tools/validate_monitor.py tables                          # every number of the report, from those alone

`run --only 13_base 16_text` makes some of the runs; `tables --row "leave-one-out accuracy"` gives one row per table.
configs/study/plan.yaml says which runs there are, and tools/results/validity.md what came out.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

try:
    import pandas as pd
except ModuleNotFoundError:
    sys.exit("error: the study's tables need pandas: pip install 'moetrain[report]'")
from validity import claims, readings, separation, verdicts
from validity.plan import ROOT, Planned, StudyError, make_runs, read_plan
from validity.units import make_units

from moetrain.grokking import PhaseThresholds
from moetrain.loggers.terminal import Terminal
from moetrain.report.open_run import MissingPackageError, RunError, need

RESULTS = ROOT / "tools" / "results" / "validity"


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0 done, 2 what was asked for cannot be done."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "measure", "tables"))
    parser.add_argument("--output", type=Path, default=Path("runs/validity"), metavar="FOLDER", help="of the runs")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help="of the tables")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), metavar="N", help="runs at once (a core each)")
    parser.add_argument("--only", nargs="+", metavar="RUN", help="these of the planned runs")
    parser.add_argument("--row", metavar="TEXT", help="rows of the tables that hold this text")
    parser.add_argument("--json", type=Path, metavar="FILE", help="with tables: write the main numbers here")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="with tables: draw the figure here")
    options = parser.parse_args(arguments)
    terminal = Terminal()
    try:
        runs = _chosen(read_plan(), options.only)
        if options.what == "run":
            make_runs(runs, options.output, options.workers, terminal.preparing)
        elif options.what == "measure":
            tables = readings.measure(runs, options.output, terminal.preparing)
            tables = readings.renew(tables, options.results)
            readings.save(tables, options.results)
            _write_summary(report(tables, read_plan()), tables, options.results.with_suffix(".json"))
            terminal.note(f"{tables['readings']['run'].nunique()} runs: {options.results}")
        else:
            tables = readings.load(options.results)
            found = report(tables, runs, options.figure)
            for title, frame in found.items():
                _show(terminal, title, frame, options.row)
            if options.json:
                _write_summary(found, tables, options.json)
    except (StudyError, RunError, MissingPackageError, OSError) as error:
        terminal.error(str(error))
        return 2
    return 0


def report(
    tables: dict[str, pd.DataFrame], runs: Sequence[Planned], figure: Path | None = None
) -> dict[str, pd.DataFrame]:
    """Every table of the study by its title; with ``figure`` the figure is drawn there."""
    units = make_units(tables["readings"], runs)
    by_aspect = separation.tables(units)
    judged = verdicts.judge(tables["readings"], units)
    test = judged[judged["part"] == "test"]
    if figure is not None:
        need("matplotlib", "the figure")
        from validity.figures import draw

        rule = PhaseThresholds()
        draw(units, by_aspect["at the end"], (rule.memorizing, rule.generalizing), figure)
    return {
        "units by truth": units.groupby(["part", "domain", "truth"]).size().unstack(fill_value=0).reset_index(),
        **{f"AUC {aspect}": frame for aspect, frame in by_aspect.items()},
        "AUC with random answers as a yardstick": separation.yardstick(units),
        "verdicts on the fit runs": verdicts.confusion(judged[judged["part"] == "fit"]),
        "verdicts on the test runs": verdicts.confusion(test),
        "error rates on the test runs": verdicts.rates(test),
        "verdicts by variant": verdicts.by_variant(test),
        "the paper's claims": claims.test_claims(tables, units),
    }


def summary(found: dict[str, pd.DataFrame], tables: dict[str, pd.DataFrame]) -> dict[str, Any]:
    """The study in a few numbers, of its test runs: shares with 95% intervals (AUC's over runs, the others Wilson's),
    null where the runs measured so far do not give one."""
    measured = [run.part for run in read_plan() if run.name in set(tables["readings"]["run"])]
    left_out = found["AUC at the end"].set_index("measure").loc["leave-one-out accuracy"]
    rates = found["error rates on the test runs"].set_index("rate")
    numbers: dict[str, Any] = {
        "runs": {part: measured.count(part) for part in ("fit", "test")},
        "units": {"generalizing": int(left_out["generalize"]), "memorized": int(left_out["memorized"])},
        "auc_heldout": _number(left_out["auc"]),
        "auc_heldout_interval": [_number(left_out[end]) for end in ("low", "high")],
    }
    for name, rate in (
        ("verdict_share", verdicts.GIVEN),
        ("right_share", verdicts.RIGHT),
        ("false_alarm_rate", verdicts.FALSE_ALARMS),
    ):
        numbers[name] = _number(rates.loc[rate, "share"])
        numbers[f"{name}_interval"] = [_number(rates.loc[rate, end]) for end in ("low", "high")]
    return numbers


def _number(value: float) -> float | None:
    return None if pd.isna(value) else round(float(value), 6)


def _write_summary(found: dict[str, pd.DataFrame], tables: dict[str, pd.DataFrame], path: Path) -> None:
    path.write_text(json.dumps(summary(found, tables), indent=1) + "\n")


def _chosen(runs: list[Planned], only: Sequence[str] | None) -> list[Planned]:
    if unknown := set(only or ()) - {run.name for run in runs}:
        raise StudyError(f"--only {min(unknown)}: no such run: they are {', '.join(run.name for run in runs)}")
    return [run for run in runs if only is None or run.name in only]


def _show(terminal: Terminal, title: str, frame: pd.DataFrame, row: str | None) -> None:
    shown = [[_word(value) for value in values] for values in frame.itertuples(index=False)]
    if row is not None:
        shown = [words for words in shown if any(row in word for word in words)]
    if shown:
        terminal.table(title, [str(column) for column in frame.columns], shown)


def _word(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    raise SystemExit(main())
