"""The folder of a watched training, and the state in it from which a resumed training goes on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from moetrain.checkpoint.manager import Checkpoint, checkpoint_folder, load_checkpoint
from moetrain.integrations.rows import MonitorError


def find_state(wanted: Path, step: int, panel: str) -> tuple[Path, Checkpoint | None]:
    """The folder to write to, and the state to resume from; None where training begins, or no folder has a state.

    Args:
        wanted: the folder, if it is free; training may have been written to FOLDER-2, FOLDER-3, ...
        step: at which training goes on.
        panel: fingerprint of the panel.

    Raises:
        MonitorError: the folders hold states, but none of this training at this step.
        CheckpointError: the state is corrupt.
    """
    folders = numbered_folders(wanted)
    if not step or not any((folder / "checkpoints").is_dir() for folder in folders):
        return _numbered(wanted, len(folders) + 1), None
    for folder in reversed(folders):
        if (state := checkpoint_folder(folder, step)).is_dir():
            checkpoint = load_checkpoint(state)
            if checkpoint.record["panel_of"] == panel:
                return folder, checkpoint
    raise MonitorError(
        f"{wanted} has no state of this training at step {step}, at which it is resumed: give the output_dir of the "
        "training that is resumed, with the same data and options, or a new one"
    )


def numbered_folders(wanted: Path) -> list[Path]:
    """FOLDER, FOLDER-2, FOLDER-3, ..., as far as they exist and hold something."""
    found: list[Path] = []
    while (folder := _numbered(wanted, len(found) + 1)).exists() and not (
        folder.is_dir() and not any(folder.iterdir())
    ):
        found.append(folder)
    return found


def _numbered(wanted: Path, number: int) -> Path:
    return wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")


@torch.no_grad()
def weight_sums(model: nn.Module) -> dict[str, float]:
    """The sum of absolute values of each parameter: tells whether weights are those that were saved."""
    return {name: float(weight.detach().double().abs().sum()) for name, weight in model.named_parameters()}


def check_weights(model: nn.Module, saved: Mapping[str, float], step: int) -> None:
    """Raise MonitorError where a weight is not the one whose `weight_sums` were saved."""
    found = weight_sums(model)
    for name, value in saved.items():
        if not math.isclose(found.get(name, math.nan), value, rel_tol=1e-4, abs_tol=1e-4):
            raise MonitorError(
                f"the trainer has not restored the weight {name} of step {step}. transformers' Trainer does not "
                "restore stacked experts (5.24): load the model with from_pretrained(CHECKPOINT) before "
                "train(resume_from_checkpoint=CHECKPOINT)"
            )
