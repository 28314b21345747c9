"""Table 3: how fast the norms of routers, experts and attention change over the checkpoints of a run.

Suffixes: T checkpoints, M matrices of one kind.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from moetrain.checkpoint.manager import list_checkpoints, load_checkpoint
from moetrain.grokking.estimate import RESAMPLES, percentiles
from moetrain.paper.results import PaperError, Result, Row, table_picture

LEAST_CHECKPOINTS = 4  # two changes early and two late
PAPER = {"router": (0.151, 5.63), "expert": (0.063, 7.32), "attention": (0.083, 6.01)}
"""Convergence speed and stability of OLMoE, as the paper reports them."""


def kind_of(name: str) -> str | None:
    """router, expert, attention or other, by the name of a parameter; None for what has no matrix of its own."""
    if name.endswith("gate.weight"):
        return "router"
    if ".experts." in name:
        return "expert"
    if any(f"{part}_proj" in name for part in ("q", "k", "v", "o")):
        return "attention"
    return None if "norm" in name or name.endswith("selection_bias") else "other"


def matrix_norms(state: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """[M] L2 norms by kind of parameter, in the order of names; each expert's projections count by themselves."""
    found: dict[str, list[float]] = {}
    for name in sorted(state):
        kind, tensor = kind_of(name), state[name].detach().double()
        if kind is not None:
            parts = tensor.flatten(1) if kind == "expert" and tensor.dim() == 3 else tensor.flatten()[None]
            found.setdefault(kind, []).extend(parts.norm(dim=1).tolist())
    return {kind: np.array(norms) for kind, norms in found.items()}


def speed_and_stability(norms_TM: np.ndarray) -> tuple[float, float]:
    """The paper's two numbers of one kind of parameter.

    A change is the mean absolute difference of norms between consecutive checkpoints, divided by the mean norm.
    Convergence speed is the mean of the early half of the changes minus that of the late half;
    stability is 1 divided by the standard deviation of the changes.
    """
    changes = np.abs(np.diff(norms_TM, axis=0)).mean(1) / norms_TM.mean()
    early, late = changes[: len(changes) // 2].mean(), changes[(len(changes) + 1) // 2 :].mean()
    deviation = changes.std()
    return float(early - late), float(1 / deviation) if deviation > 0 else float("nan")


def parameter_norms(run: Path) -> Result:
    """Table 3, over all checkpoints that the run kept; intervals are over the matrices of a kind.

    Raises:
        PaperError: fewer than four checkpoints.
        CheckpointError: one cannot be read.
    """
    folders = list_checkpoints(run)
    if len(folders) < LEAST_CHECKPOINTS:
        raise PaperError(
            f"{run}: {len(folders)} checkpoints are kept, table3 needs {LEAST_CHECKPOINTS} or more: train with "
            "train.checkpoint_every=N train.keep_every=N"
        )
    steps, found = [], []
    for folder in folders:
        checkpoint = load_checkpoint(folder, owners=("model",))
        steps.append(checkpoint.step)
        found.append(matrix_norms(checkpoint.states["model"]))
    rows: list[Row] = []
    for kind in ("router", "expert", "attention", "other"):
        norms_TM = np.stack([each[kind] for each in found]) if kind in found[0] else np.zeros((0, 0))
        if norms_TM.size:
            rows.append({"kind": kind, **_row(norms_TM)} | _paper(kind))
    notes = []
    if len(set(np.diff(steps))) > 1:
        notes.append("the checkpoints are not evenly spaced, so changes between them do not compare")
    order = sorted((row for row in rows if row["kind"] != "other"), key=lambda row: -row["speed"])
    notes.append(f"by convergence speed: {', '.join(row['kind'] for row in order)} (paper: router, attention, expert)")
    columns = ["parameters", "matrices", "convergence speed", "stability", "paper: speed, stability"]
    cells = [
        [
            row["kind"],
            str(row["n"]),
            _with_interval(row, "speed", ".4f"),
            _with_interval(row, "stability", ".1f"),
            f"{row['paper_speed']}, {row['paper_stability']}" if "paper_speed" in row else "-",
        ]
        for row in rows
    ]
    title = f"Table 3: change of parameter norms, {len(steps)} checkpoints to step {steps[-1]:,}"
    return Result("table3", title, rows, table_picture(columns, cells), {"steps": steps}, notes)


def _row(norms_TM: np.ndarray) -> Row:
    speed, stability = speed_and_stability(norms_TM)
    matrices = norms_TM.shape[1]
    indices_RM = np.random.default_rng(0).integers(matrices, size=(RESAMPLES, matrices))
    replicates = np.array([speed_and_stability(norms_TM[:, chosen]) for chosen in indices_RM])
    ends = [percentiles(column, matrices) for column in replicates.T]
    return {
        "speed": speed,
        "speed_low": ends[0][0],
        "speed_high": ends[0][1],
        "stability": stability,
        "stability_low": ends[1][0],
        "stability_high": ends[1][1],
        "n": matrices,
    }


def _with_interval(row: Row, name: str, form: str) -> str:
    value, low, high = (row[key] for key in (name, f"{name}_low", f"{name}_high"))
    return f"{value:{form}} ({low:{form}} to {high:{form}})" if np.isfinite(low) else f"{value:{form}}"


def _paper(kind: str) -> Row:
    if kind not in PAPER:
        return {}
    speed, stability = PAPER[kind]
    return {"paper_speed": speed, "paper_stability": stability}
