"""Validation of the monitor: runs with planted truth, how each metric separates them, error rates of the verdict.

    python tools/validate_monitor.py run --output runs/validity      # train the rest of 37 runs, 3 core-minutes each
    python tools/validate_monitor.py measure --output runs/validity  # write tables and tools/results/validity.json
    python tools/validate_monitor.py tables                          # print all numbers of the report, from the tables

`--study text` does the same for the study on natural text, which needs MOETRAIN_DATA. `worth --study text` continues
its runs from their checkpoints, to compare what a repeat is worth. `run --only 13_base 16_text` trains some of the
runs; `tables --row "leave-one-out accuracy"` gives one row per table. `frequencies` adds the loss under
token frequencies to readings from before runs recorded it. configs/study/plan.yaml and
configs/study_text/plan.yaml list the runs, tools/results/validity.md and validity_text.md have the results.
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
from common.command_line import make_parser, reports_errors, write_json
from validity import claims, readings, separation, text_study, verdicts
from validity.plan import ROOT, Planned, StudyError, make_runs, read_plan
from validity.units import make_units

from moetrain.grokking import PhaseThresholds
from moetrain.loggers.terminal import Terminal
from moetrain.report.open_run import MissingPackageError, RunError, need

RESULTS = ROOT / "tools" / "results" / "validity"
SUMMARY = RESULTS.with_suffix(".json")
_STUDIES = ("planted", "text")


@reports_errors(StudyError, RunError, MissingPackageError, OSError)
def main(arguments: list[str] | None = None) -> int:
    """Train, measure or print; returns the exit status: 0 done, 2 an invalid request or a failed run."""
    parser = make_parser(__doc__)
    parser.add_argument("what", choices=("run", "measure", "frequencies", "worth", "tables"))
    parser.add_argument("--study", choices=_STUDIES, default="planted", help="planted facts, or natural text")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/validity"), metavar="FOLDER", help="folder of the runs"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help="folder of the tables")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), metavar="N", help="parallel runs, one core each")
    parser.add_argument("--only", nargs="+", metavar="RUN", help="only these of the planned runs")
    parser.add_argument("--row", metavar="TEXT", help="only table rows that contain this text")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the main numbers to this file")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="with tables: write the figure to this file")
    options = parser.parse_args(arguments)
    terminal = Terminal()
    runs = _chosen(read_plan(options.study), options.only)
    output, results = (path / options.study for path in (options.output, options.results))
    if options.what == "run":
        make_runs(runs, output, options.workers, terminal.preparing)
    elif options.study == "text":
        _text(options, runs, output, results, terminal)
    elif options.what == "worth":
        raise StudyError("worth: only the study on natural text repeats domains by number: give --study text")
    elif options.what == "frequencies":
        tables = readings.load(results)
        readings.save(
            tables | {"readings": readings.with_frequencies(tables["readings"], runs, terminal.preparing)}, results
        )
    elif options.what == "measure":
        tables = readings.renew(readings.measure(runs, output, terminal.preparing), results)
        readings.save(tables, results)
        _write_summary(options.json or SUMMARY, "planted", summary(report(tables, read_plan()), tables))
        terminal.note(f"{tables['readings']['run'].nunique()} runs: {results}")
    else:
        tables = readings.load(results)
        found = report(tables, runs, options.figure)
        for title, frame in found.items():
            _show(terminal, title, frame, options.row)
        if options.json:
            _write_summary(options.json, "planted", summary(found, tables))
    return 0


def _text(
    options: argparse.Namespace, runs: Sequence[Planned], output: Path, results: Path, terminal: Terminal
) -> None:
    """Measure the runs on natural text, or the truth of the worth of their repeats, or print their tables."""
    if options.what == "frequencies":
        raise StudyError("frequencies: only the study of planted facts marks answers: leave --study text out")
    if options.what == "worth":
        from validity import repeat_truth

        repeat_truth.save(repeat_truth.measure(runs, output, terminal.preparing), results)
        return
    if options.what == "measure":
        text_study.save(text_study.measure(runs, output, terminal.preparing), results)
        if options.only:
            return
    table = text_study.load(results)
    found = text_study.report(table, read_plan("text")) | repeat_worths(results)
    for title, frame in found.items():
        _show(terminal, title, frame, options.row)
    path = options.json or (SUMMARY if options.what == "measure" else None)
    if path:
        _write_summary(path, "text", text_study.summary(found, table, read_plan("text")))
    if options.figure:
        need("matplotlib", "the figure")
        from validity import repeat_truth
        from validity.text_figures import draw as draw_text
        from validity.text_figures import draw_worth

        draw_text(table, text_study.make_units(table, read_plan("text")), options.figure)
        if (results / repeat_truth.FILE).is_file():
            draw_worth(results / repeat_truth.FILE, options.figure.with_stem(options.figure.stem + "_repeats"))


def repeat_worths(results: Path) -> dict[str, pd.DataFrame]:
    """The tables of the worth of repeats, if it was measured."""
    from validity import repeat_truth

    path = results / repeat_truth.FILE
    return repeat_truth.tables(pd.read_parquet(path)) if path.is_file() else {}


def _write_summary(path: Path, study: str, numbers: dict[str, Any]) -> None:
    """Write the main numbers of a study, beside those of the other that the file holds."""
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    write_json(path, {name: before[name] for name in _STUDIES if name in before} | {study: numbers})


def report(
    tables: dict[str, pd.DataFrame], runs: Sequence[Planned], figure: Path | None = None
) -> dict[str, pd.DataFrame]:
    """Every table of the study by title; also writes the figure if a path is given."""
    tables = tables | {"readings": readings.with_share(tables["readings"])}
    units = make_units(tables["readings"], runs)
    by_aspect = separation.tables(units)
    judged = verdicts.judge(tables["readings"], units)
    test = judged[judged["part"] == "test"]
    if figure is not None:
        need("matplotlib", "the figure")
        from validity.figures import draw

        rule = PhaseThresholds()
        draw(units, by_aspect["at the end"], rule.memorized_answers, figure)
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
    """The main numbers of the study, from its test runs: values with 95% intervals.

    The interval of the AUC is bootstrapped over runs, the others are Wilson's. Undefined values are None.
    """
    measured = [run.part for run in read_plan() if run.name in set(tables["readings"]["run"])]
    share = found["AUC at the end"].set_index("measure").loc["memorized share"]
    rates = found["error rates on the test runs"].set_index("rate")
    numbers: dict[str, Any] = {
        "runs": {part: measured.count(part) for part in ("fit", "test")},
        "units": {"generalizing": int(share["generalize"]), "memorized": int(share["memorized"])},
        "auc_heldout": _number(share["auc"]),
        "auc_heldout_interval": [_number(share[end]) for end in ("low", "high")],
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


def _chosen(runs: list[Planned], only: Sequence[str] | None) -> list[Planned]:
    if unknown := set(only or ()) - {run.name for run in runs}:
        raise StudyError(f"--only {min(unknown)}: no such run: choose from {', '.join(run.name for run in runs)}")
    return [run for run in runs if only is None or run.name in only]


def _show(terminal: Terminal, title: str, frame: pd.DataFrame, row: str | None) -> None:
    cells = [
        [f"{value:.3g}" if isinstance(value, float) else str(value) for value in values]
        for values in frame.itertuples(index=False)
    ]
    shown = [line for line in cells if row is None or any(row in cell for cell in line)]
    if shown:
        terminal.table(title, [str(column) for column in frame.columns], shown)


if __name__ == "__main__":
    raise SystemExit(main())
