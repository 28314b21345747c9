"""Muon against AdamW: tokens to the same validation loss, or the step at which rules generalize.

    MOETRAIN_DATA=... python tools/muon_trial.py loss --output trial --json tools/results/muon.json
    MOETRAIN_DATA=... python tools/muon_trial.py loss --small --output trial      # a model of one page, minutes a run
    python tools/muon_trial.py grokking --output trial                            # the grokking demonstration, no data

``loss`` trains on four domains of real text, at a constant rate after the warm-up, so that every point of a curve can
be compared. The learning rate of each optimizer is the best of a grid by the last validation loss of the first seed;
where that is at an end of the grid, the grid grows. Both then run with all seeds. ``grokking`` trains the demonstration
with its own settings, and both optimizers at its rate. Runs are trained one after the other, on one thread. A run that
is finished is not trained again, and a killed one is resumed by the same command.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.machine import describe_machine, this_device
from common import ROOT, TRAIN
from common.command_line import make_parser, reports_errors, write_json
from rich.console import Console
from rich.table import Table

from moetrain.report.open_run import open_run
from moetrain.report.records import MissingPackageError, RunError

OPTIMIZERS = ("adamw", "muon")
RATES = (1e-3, 3e-3, 1e-2)
_MOST_RATES = 6
_ACCURATE = 0.8  # held-out accuracy of a domain that has generalized
_T_HALF_WIDTH = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t, 95% two-sided, by the number of values

LOSS = (
    "monitor.enabled=false",
    "probes.tasks=[]",
    "run.report=false",
    "optim.schedule=constant",
    "train.checkpoint_every=200",
)
SMALL = (
    *(f"data.domains.{name}.size=1500000" for name in ("math", "code", "general", "science")),
    "tokenizer.vocab_size=2048",
    "data.seq_len=256",
    "model.hidden_size=128",
    "model.num_hidden_layers=4",
    "model.num_experts=16",
    "model.intermediate_size=64",
    "data.heldout_share=0.05",
    "train.max_steps=160",
    "train.eval_every=20",
    "train.eval_tokens=8192",
    "optim.warmup_steps=20",
)
FULL = ("train.eval_every=25",)
GROKKING = ("probes.readings=41", "panel.readings=11", "run.report=false", "train.checkpoint_every=500")
SMALL_GROKKING = ("train.max_steps=2000",)

Curve = tuple[np.ndarray, np.ndarray]
"""Tokens trained on, and the mean validation loss of the domains in nats per token; both [T]."""


class TrialError(RuntimeError):
    """A run that failed; the message names its log."""


@reports_errors(TrialError, RunError, MissingPackageError)
def main(arguments: list[str] | None = None) -> int:
    """Train what is missing, print the tables and write the result; exit status 0, or 2 where a run failed."""
    parser = make_parser(__doc__)
    parser.add_argument("study", choices=("loss", "grokking"))
    parser.add_argument("--small", action="store_true", help="smaller and shorter runs")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="the grid; one rate is not tuned")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ... of each arm (default 3)")
    parser.add_argument("--output", type=Path, default=Path("runs/muon_trial"), help="folder of the runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result to this file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of all runs")
    options = parser.parse_intermixed_args(arguments)  # overrides may follow options
    study = loss_study if options.study == "loss" else grokking_study
    found = study(options)
    words = ["python", "tools/muon_trial.py", *(sys.argv[1:] if arguments is None else arguments)]
    date = datetime.now(UTC).date().isoformat()
    heading = {"date": date, "command": " ".join(words), "machine": describe_machine(this_device())}
    write_json(options.json, heading | {"settings": found.pop("settings")} | found)
    return 0


def loss_study(options: argparse.Namespace) -> dict[str, Any]:
    """Tune both rates with the first seed, run all seeds, and compare the curves of each seed."""
    settings = [*LOSS, *(SMALL if options.small else FULL), *options.overrides]
    size = "small" if options.small else "full"

    def curve(optimizer: str, rate: float, seed: int) -> Curve:
        name = f"{size}_{optimizer}_{rate:.1e}_{seed}"
        own = (f"optim.name={optimizer}", f"optim.learning_rate={rate}", f"run.seed={seed}")
        return loss_curve(train("four_domains", name, [*settings, *own], options.output))

    def grid(optimizer: str) -> dict[float, float]:
        return tune(options.rates, lambda rate: float(curve(optimizer, rate, 0)[1][-1]))

    grids = {optimizer: grid(optimizer) for optimizer in OPTIMIZERS}
    best = {optimizer: min(grid, key=lambda rate: grid[rate]) for optimizer, grid in grids.items()}
    rows: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        curves = {optimizer: curve(optimizer, best[optimizer], seed) for optimizer in OPTIMIZERS}
        rows.append({"seed": seed} | compare(curves["adamw"], curves["muon"]))
    result = {
        "settings": settings,
        "grid": {optimizer: [[rate, loss] for rate, loss in sorted(grid.items())] for optimizer, grid in grids.items()},
        "rate": best,
        "seeds": rows,
        "token_ratio": geometric_mean([row["token_ratio"] for row in rows]),
        "final_loss_difference": mean_with_interval([row["muon"] - row["adamw"] for row in rows]),
    }
    show_losses(result)
    return result


def grokking_study(options: argparse.Namespace) -> dict[str, Any]:
    """The first reading at which each rule's held-out accuracy reaches 0.8, by optimizer and seed."""
    settings = [*GROKKING, *(SMALL_GROKKING if options.small else ()), *options.overrides]
    size = "small" if options.small else "full"
    rows: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        for optimizer in OPTIMIZERS:
            own = (f"optim.name={optimizer}", f"run.seed={seed}")
            run = train("grokking_demo", f"grokking_{size}_{optimizer}_{seed}", [*settings, *own], options.output)
            for domain in ("add", "subtract", "random_answers"):
                for trained in (False, True):
                    rows.append({"optimizer": optimizer, "seed": seed} | accuracy_steps(run, domain, trained))
    ratios = step_ratios(rows)
    result = {"settings": settings, "accurate": _ACCURATE, "rows": rows, "step_ratios": ratios}
    table = Table("domain", "facts", "optimizer", f"step of accuracy {_ACCURATE}, by seed", "last accuracy, by seed")
    for domain, trained, optimizer in sorted({(r["domain"], r["trained"], r["optimizer"]) for r in rows}):
        arm = [r for r in rows if (r["domain"], r["trained"], r["optimizer"]) == (domain, trained, optimizer)]
        steps = ", ".join("never" if r["step"] is None else str(r["step"]) for r in arm)
        last = ", ".join(f"{r['last']:.2f}" for r in arm)
        table.add_row(domain, "trained on" if trained else "held out", optimizer, steps, last)
    Console().print(table)
    for each in ratios:
        print(each)
    return result


def step_ratios(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Muon's step of accuracy over AdamW's, by domain and facts: the geometric mean over seeds in which both reach it.

    ``ratio`` has a 95% interval by Student's t over the seeds' logarithms.
    """
    steps = {(r["domain"], r["trained"], r["optimizer"], r["seed"]): r["step"] for r in rows}
    found: list[dict[str, Any]] = []
    for domain, trained in sorted({(r["domain"], r["trained"]) for r in rows}):
        seeds = sorted({r["seed"] for r in rows})
        pairs = [[steps[domain, trained, optimizer, seed] for optimizer in OPTIMIZERS] for seed in seeds]
        ratios = [muon / adamw for adamw, muon in pairs if adamw and muon]
        ratio = geometric_mean(ratios) if ratios else None
        found.append({"domain": domain, "trained": trained, "steps": pairs, "ratio": ratio})
    return found


def train(config: str, name: str, overrides: Sequence[str], output: Path) -> Path:
    """The folder of a finished run, trained or resumed if it is not there.

    Raises:
        TrialError: it failed.
    """
    folder, log = output / name, output / f"{name}.log"
    if not (folder / "summary.json").is_file():
        output.mkdir(parents=True, exist_ok=True)
        Console().print(f"training {name}", highlight=False)
        command = [sys.executable, str(TRAIN), str(ROOT / "configs" / f"{config}.yaml"), "train.threads=1", *overrides]
        command += [f"run.name={name}", f"run.output_dir={output}"]
        with log.open("ab") as file:
            done = subprocess.run(command, stdout=file, stderr=file, env=os.environ | {"OMP_NUM_THREADS": "1"})
        if done.returncode or not (folder / "summary.json").is_file():
            raise TrialError(f"{name} ended with status {done.returncode}: see {log}")
    return folder


def tune(rates: Sequence[float], final_loss: Callable[[float], float]) -> dict[float, float]:
    """The final loss by learning rate: on a grid, and beyond it while an end of it is best; a single rate stays."""
    found = {rate: final_loss(rate) for rate in rates}
    while 1 < len(found) < _MOST_RATES:
        best = min(found, key=lambda rate: found[rate])
        if best not in (min(found), max(found)):
            break
        further = float(f"{best * (math.sqrt(10) if best == max(found) else 1 / math.sqrt(10)):.1e}")
        found[further] = final_loss(further)
    return found


def loss_curve(run: Path) -> Curve:
    """The run's validation losses, averaged over its domains."""
    scalars = open_run(run).scalars
    losses = scalars[scalars["tag"].str.startswith("loss/validation/")].groupby("step")
    return losses["tokens"].first().to_numpy(), losses["value"].mean().to_numpy()


def compare(adamw: Curve, muon: Curve) -> dict[str, float]:
    """Final losses, and the tokens that Muon takes to the higher one of them over those that AdamW takes."""
    target = max(adamw[1][-1], muon[1][-1])
    ratio = tokens_to(muon, target) / tokens_to(adamw, target)
    return {"adamw": float(adamw[1][-1]), "muon": float(muon[1][-1]), "target": float(target), "token_ratio": ratio}


def tokens_to(curve: Curve, target: float) -> float:
    """Tokens at which a curve first reaches a loss, linear between two points; it must reach it."""
    tokens, losses = curve
    place = int(np.argmax(losses <= target))
    if place == 0:
        return float(tokens[0])
    share = (losses[place - 1] - target) / (losses[place - 1] - losses[place])
    return float(tokens[place - 1] + share * (tokens[place] - tokens[place - 1]))


def accuracy_steps(run: Path, domain: str, trained: bool) -> dict[str, Any]:
    """The first step at which a domain's accuracy reaches 0.8, None where it never does, and the last accuracy."""
    accuracy = open_run(run).accuracy
    own = accuracy[(accuracy["domain"] == domain) & (accuracy["trained"] == trained)].sort_values("step")
    reached = own[own["accuracy"] >= _ACCURATE]["step"]
    step = None if reached.empty else int(reached.iloc[0])
    return {"domain": domain, "trained": trained, "step": step, "last": float(own["accuracy"].iloc[-1])}


def mean_with_interval(values: Sequence[float]) -> dict[str, float | int | None]:
    """Mean and 95% interval by Student's t over seeds; no interval where there is none for so many."""
    mean, n = float(np.mean(values)), len(values)
    if n not in _T_HALF_WIDTH:
        return {"mean": mean, "low": None, "high": None, "n": n}
    half = _T_HALF_WIDTH[n] * float(np.std(values, ddof=1)) / math.sqrt(n)
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": n}


def geometric_mean(values: Sequence[float]) -> dict[str, float | int | None]:
    """Geometric mean and 95% interval over seeds."""
    found: Mapping[str, Any] = mean_with_interval([math.log(value) for value in values])
    return {key: math.exp(value) if key != "n" and value is not None else value for key, value in found.items()}


def show_losses(result: Mapping[str, Any]) -> None:
    """Print the grid and the comparison."""
    grid = Table("optimizer", "learning rate", "last validation loss, seed 0")
    for optimizer, points in result["grid"].items():
        for rate, loss in points:
            grid.add_row(
                optimizer, f"{rate:g}" + (" (best)" if rate == result["rate"][optimizer] else ""), f"{loss:.4f}"
            )
    seeds = Table("seed", "AdamW", "Muon", "tokens of Muon / AdamW")
    for row in result["seeds"]:
        seeds.add_row(str(row["seed"]), f"{row['adamw']:.4f}", f"{row['muon']:.4f}", f"{row['token_ratio']:.3f}")
    for table in (grid, seeds):
        Console().print(table)
    for what in ("token_ratio", "final_loss_difference"):
        print(what, {key: value if value is None else round(value, 4) for key, value in result[what].items()})


if __name__ == "__main__":
    sys.exit(main())
