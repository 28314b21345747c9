"""The planned runs of the study, and how they are trained: several in parallel, resumed if stopped."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
_CONFIGS = ROOT / "configs"
STUDIES = {"planted": _CONFIGS / "study", "text": _CONFIGS / "study_text", "dense": _CONFIGS / "study_dense"}
FINISHED = "summary.json"


@dataclass(frozen=True)
class Planned:
    """One run of the study."""

    study: str  # one of STUDIES
    name: str
    part: str  # "fit": thresholds may be chosen on it; "test": they must not
    variant: str
    seed: int
    overrides: tuple[str, ...]


class StudyError(RuntimeError):
    """A study that cannot continue; the message names the place and the remedy."""


def read_plan(study: str = "planted") -> list[Planned]:
    """The runs of a study's plan, fit and test alternating, so that an unfinished study has some of both."""
    path = STUDIES[study] / "plan.yaml"
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    found: dict[str, list[Planned]] = {}
    for part, variants in tree["runs"].items():
        for variant, seeds in variants.items():
            if variant not in tree["variants"]:
                raise StudyError(
                    f"{path}: runs.{part} names {variant!r}, which is not in variants: correct one of them"
                )
            for seed in seeds:
                chosen = [rule["overrides"] for rule in tree["by_seed"] if seed % rule["of"] in rule["rest"]]
                settings = [f"run.seed={seed}", *_domains(tree, seed), *itertools.chain(*chosen)]
                settings += tree["variants"][variant]
                run = Planned(study, f"{seed:02d}_{variant}", part, variant, seed, tuple(settings))
                found.setdefault(part, []).append(run)
    if len({run.name for runs in found.values() for run in runs}) < sum(map(len, found.values())):
        raise StudyError(f"{path}: two runs of a variant have the same seed: give each its own")
    alternating = [(number / len(runs), run) for runs in found.values() for number, run in enumerate(runs)]
    return [run for _, run in sorted(alternating, key=lambda each: (each[0], each[1].name))]


def _domains(tree: Mapping[str, Any], seed: int) -> list[str]:
    """The domains of a run whose plan has slots: the source of each is ``place`` plus the seed, modulo their number."""
    found = []
    for name, slot in tree.get("slots", {}).items():
        sources = tree["sources"][slot["from"]]
        settings = dict(sources[(slot["place"] + seed) % len(sources)])
        if source := settings.pop("source", None):
            settings["filter"] = f"source == {source!r}"
        settings |= {key: value for key, value in slot.items() if key not in ("from", "place")}
        found.append(f"data.domains.{name}={json.dumps(settings)}")
    return found


def make_runs(
    runs: Sequence[Planned], output: Path, workers: int, progress: Callable[[str, int, int], None] = lambda *_: None
) -> None:
    """Train the unfinished runs, ``workers`` in parallel with one thread each; stopped runs resume.

    Raises:
        StudyError: a run failed.
    """
    output.mkdir(parents=True, exist_ok=True)
    waiting = [run for run in runs if not (output / run.name / FINISHED).is_file()]
    running: dict[Planned, subprocess.Popen[bytes]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                run = waiting.pop(0)
                running[run] = _start(run, output)
            time.sleep(1)
            for run in [run for run, process in running.items() if process.poll() is not None]:
                if status := running.pop(run).returncode:
                    raise StudyError(f"{run.name} ended with status {status}: see {output / run.name}.log")
            progress(", ".join(run.name for run in running), len(runs) - len(waiting) - len(running), len(runs))
    finally:
        for process in running.values():
            process.terminate()  # it saves a checkpoint; the same command resumes
        for process in running.values():
            process.wait()


def command(run: Planned, output: Path) -> list[str]:
    """The command that trains a run."""
    words = [sys.executable, str(ROOT / "moetrain" / "train.py"), str(STUDIES[run.study] / "base.yaml")]
    return [*words, f"run.name={run.name}", f"run.output_dir={output}", *run.overrides]


def _start(run: Planned, output: Path) -> subprocess.Popen[bytes]:
    with (output / f"{run.name}.log").open("ab") as log:
        return subprocess.Popen(command(run, output), stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
