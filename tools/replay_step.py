"""Repeat the step at which a run stopped because its loss or gradient was not finite.

    python tools/replay_step.py RUN/dumps/step_XXXXXXXX

Runs forward and backward on the rows and weights of that step. Prints the first module with a non-finite output, the
samples with the largest loss, and the parameters with the largest gradient.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import torch
from common.command_line import make_parser, reports_errors
from rich.console import Console
from rich.table import Table
from torch import nn

from moetrain.checkpoint.manager import CheckpointError, load_checkpoint
from moetrain.checkpoint.restore import open_model
from moetrain.config import SettingsError
from moetrain.data.batch import IGNORED, Batch
from moetrain.training.balancing import Balancing
from moetrain.training.step import part_of_loss

_SHOWN = 10


@reports_errors(CheckpointError, SettingsError)
def main(arguments: list[str] | None = None) -> int:
    """Replay and print; returns the exit status: 0 done, 2 the dump or its run cannot be read."""
    parser = make_parser(__doc__)
    parser.add_argument("dump", type=Path, help="RUN/dumps/step_XXXXXXXX")
    parser.add_argument("--device", default="cpu", help="device to compute on (default cpu)")
    options = parser.parse_args(arguments)
    console = Console()
    found = replay(options.dump, torch.device(options.device))
    console.print(f"step {found['step']}: {found['first'] or 'all outputs of the forward pass are finite'}")
    console.print(_table("samples by loss, nats per token", ("domain", "document", "piece", "loss"), found["samples"]))
    console.print(_table("parameters by gradient norm", ("parameter", "norm"), found["gradients"]))
    return 0


def replay(dump: Path, device: torch.device) -> dict[str, Any]:
    """Repeat the dumped step.

    Returns ``step``; ``first``: a sentence that names the first module with a non-finite output, or None; ``samples``:
    (domain, document, piece, loss); ``gradients``: (parameter, gradient norm). Both are in descending order, with
    non-finite numbers first.

    Raises:
        CheckpointError, SettingsError: the dump or its run cannot be read.
    """
    trained = open_model(dump, device)
    loaded = load_checkpoint(trained.checkpoint, owners=("batch", "balancing"))
    batch = Batch(**loaded.states["batch"]).to(device)
    balancing = Balancing(trained.model, trained.settings.model)
    balancing.load_state(loaded.states["balancing"])
    first: list[str] = []
    _record_non_finite(trained.model, first)
    output = trained.model(batch.model_input(trained.settings.watches_routing))
    predicted, real = int((batch.targets_BT != IGNORED).sum()), int((batch.slots_BT >= 0).sum())
    part_of_loss(output, balancing, trained.settings, predicted, real).backward()
    sums_BS, tokens_BS = batch.sum_by_sample(output.loss_BT.detach().cpu().numpy())
    there_BS = batch.samples_BS.numpy() >= 0
    losses = (sums_BS / tokens_BS.clip(min=1))[there_BS].tolist()
    named = loaded.record["samples"]
    samples = list(zip(named["domain"], named["document"], named["piece"], losses, strict=True))
    gradients = [(name, float(p.grad.norm())) for name, p in trained.model.named_parameters() if p.grad is not None]
    return {
        "step": trained.step,
        "first": first[0] if first else None,
        "samples": sorted(samples, key=lambda row: _descending(row[-1])),
        "gradients": sorted(gradients, key=lambda row: _descending(row[-1])),
    }


def _record_non_finite(model: nn.Module, first: list[str]) -> None:
    """Add hooks that append every module with a non-finite output, in the order of execution."""

    def note(name: str, kind: str, output: object) -> None:
        tensors = [x for x in _flat(output) if x.is_floating_point()]
        if not all(bool(x.isfinite().all()) for x in tensors):
            first.append(f"the first non-finite output is that of {name} ({kind})")

    for name, module in model.named_modules():
        module.register_forward_hook(lambda m, _, out, name=name: note(name or "the model", type(m).__name__, out))


def _flat(value: object) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value if isinstance(value, tuple) else vars(value).values() if hasattr(value, "__dict__") else ()
    return [tensor for part in parts for tensor in _flat(part)]


def _descending(value: float) -> tuple[bool, float]:
    """A sort key: non-finite numbers first, then the largest."""
    return (True, -value) if math.isfinite(value) else (False, 0.0)


def _table(title: str, columns: tuple[str, ...], rows: list[tuple]) -> Table:
    table = Table(*columns, title=title, title_justify="left")
    for row in rows[:_SHOWN]:
        table.add_row(*(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row))
    return table


if __name__ == "__main__":
    sys.exit(main())
