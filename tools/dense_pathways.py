"""Pathways of a dense model beside those of a mixture of experts: which measure tells a rule from random answers?

    python tools/dense_pathways.py run      # train the runs of configs/study_dense/plan.yaml
    python tools/dense_pathways.py measure  # their numbers, and with other blocks: tools/results/dense_pathways.json
    python tools/dense_pathways.py tables   # print every number of tools/results/dense_pathways.md

Each run has two rules and a table of random answers. `run --only 00_moe 00_dense` trains some of the runs; `measure`
takes those that are finished.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

try:
    import pandas as pd
except ModuleNotFoundError:
    sys.exit("error: the study's tables need pandas: pip install 'moetrain[report]'")
from benchmarks.machine import processor
from common.command_line import make_parser, reports_errors, write_json
from validity.dense_blocks import other_blocks
from validity.dense_tables import of_study, tables
from validity.plan import FINISHED, ROOT, Planned, StudyError, make_runs, read_plan
from validity.readings import answer_accuracies, load, panel_values

import moetrain
from moetrain.checkpoint.manifest import CheckpointError
from moetrain.config import SettingsError
from moetrain.loggers.terminal import Terminal
from moetrain.report.open_run import RunError

RESULTS = ROOT / "tools" / "results" / "dense_pathways.json"
VALIDITY = ROOT / "tools" / "results" / "validity" / "planted"
_OTHERS = "last reading with other blocks"


@reports_errors(StudyError, RunError, SettingsError, CheckpointError, OSError)
def main(arguments: list[str] | None = None) -> int:
    """Train, measure or print; returns the exit status: 0 done, 2 an invalid request or a failed run."""
    parser = make_parser(__doc__)
    parser.add_argument("what", choices=("run", "measure", "tables"))
    parser.add_argument(
        "--output", type=Path, default=Path("runs/dense_pathways"), metavar="FOLDER", help="folder of the runs"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count(), metavar="N", help="parallel runs, one core each")
    parser.add_argument("--only", nargs="+", metavar="RUN", help="only these of the planned runs")
    parser.add_argument("--json", type=Path, default=RESULTS, metavar="FILE", help="file of the numbers")
    options = parser.parse_args(arguments)
    terminal = Terminal()
    planned = read_plan("dense")
    if unknown := sorted(set(options.only or ()) - {run.name for run in planned}):
        raise StudyError(f"--only: {unknown[0]} is not in the plan, which has {', '.join(run.name for run in planned)}")
    runs = [run for run in planned if run.name in (options.only or [each.name for each in planned])]
    if options.what == "run":
        make_runs(runs, options.output, options.workers, terminal.preparing)
    elif options.what == "measure":
        before = json.loads(options.json.read_text(encoding="utf-8")) if options.json.is_file() else {}
        write_json(options.json, measure(runs, options.output, before, terminal))
    else:
        if not options.json.is_file():
            raise StudyError(f"{options.json}: missing: write it with `dense_pathways.py measure`")
        shown = tables(json.loads(options.json.read_text(encoding="utf-8")))
        study = of_study(load(VALIDITY)["readings"])
        shown["mixture of experts, the runs of validate_monitor.py: a rule and random answers"] = study
        for title, frame in shown.items():
            rows = [[str(value) for value in row] for row in frame.itertuples(index=False)]
            terminal.table(title, list(frame.columns), rows)
    return 0


def measure(runs: Sequence[Planned], output: Path, before: Mapping[str, Any], terminal: Terminal) -> dict[str, Any]:
    """The numbers of the finished runs: each metric of each domain at each reading, by kind of model and seed.

    Args:
        before: what the file holds; numbers of other runs are kept.

    Raises:
        StudyError: no run is finished, or the file's runs were read at other steps.
    """
    finished = [run for run in runs if (output / run.name / FINISHED).is_file()]
    if not finished:
        raise StudyError(f"{output}: no finished run: train them with `dense_pathways.py run`")
    values: dict[str, Any] = dict(before.get("values", {}))
    blocks: dict[str, Any] = dict(before.get(_OTHERS, {}))
    steps: list[int] = []
    for number, planned in enumerate(finished):
        terminal.preparing(planned.name, number, len(finished))
        run = moetrain.open_run(output / planned.name)
        steps = run.reading_steps
        if steps != before.get("steps", steps):
            raise StudyError(f"{planned.name}: other steps of readings than the file's runs: give another --json")
        frame = pd.concat([panel_values(run), answer_accuracies(run)], ignore_index=True)
        values.setdefault(planned.variant, {})[str(planned.seed)] = _nested(frame, steps)
        if planned.variant == "dense":
            for name, of_blocks in other_blocks(output / planned.name).items():
                blocks.setdefault(name, {})[str(planned.seed)] = _nested(of_blocks, steps[-1:])
    return {
        "what": "panel metrics per domain at each reading, of mixtures of experts and of their dense twins",
        "date": datetime.now(UTC).date().isoformat(),
        "command": "python tools/dense_pathways.py measure",
        "processor": processor(),
        "steps": steps,
        "values": values,
        _OTHERS: blocks,
    }


def _nested(frame: pd.DataFrame, steps: Sequence[int]) -> Mapping[str, Mapping[str, list[float | None]]]:
    """By metric and domain, the values at ``steps``; None where there is none."""
    wide = frame.pivot_table(index=["metric", "domain"], columns="step", values="value").reindex(columns=list(steps))
    found: dict[str, dict[str, list[float | None]]] = {}
    for (metric, domain), row in wide.iterrows():
        found.setdefault(metric, {})[domain] = [None if pd.isna(x) else float(f"{x:.5g}") for x in row]
    return found


if __name__ == "__main__":
    sys.exit(main())
