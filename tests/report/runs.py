"""Runs that the tests of pages and frames look at, trained once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from moetrain.config import load_settings
from moetrain.train import train
from tests.conftest import small_run

PROBES = ["probes.tasks=[quiz.jsonl]", "probes.readings=5"]


def trained(corpus: Path, output: Path, cache: Path, *overrides: str) -> Path:
    """The folder of a small run with probes, stored samples and 10 readings of the panel."""
    base = small_run(corpus, output, cache)
    more = ["panel.readings=10", "monitor.store_top=2", "data.domains.sums.eps=9.0", *PROBES, *overrides]
    assert train(load_settings(None, [*base, *more])) == 0
    return output / "runs" / "run"


def left_unfinished(run: Path, copy: Path) -> Path:
    """A copy as it stands while the run still trains: no summary, and the last event not all there."""
    shutil.copytree(run, copy)
    (copy / "summary.json").unlink()
    with open(copy / "events.jsonl", "a") as file:
        file.write(json.dumps({"type": "guard", "step": 12})[:-5])
    return copy
