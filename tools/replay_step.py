"""Replay the step that a run stopped at because its loss or gradient was no longer finite.

    python tools/replay_step.py RUN/dumps/step_XXXXXXXX

Reads the rows of that step through the model as it was, forward and backward, and says where the first number that is
not finite comes up, which samples have the largest loss, and which parameters the largest gradient.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from moetrain.checkpoint.manager import CheckpointError, load_checkpoint
from moetrain.checkpoint.restore import open_model
from moetrain.config import SettingsError
from moetrain.data.stream import IGNORED, Batch
from moetrain.training.balancing import Balancing
from moetrain.training.step import part_of_loss

_SHOWN = 10


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dump", type=Path, help="RUN/dumps/step_XXXXXXXX")
    parser.add_argument("--device", default="cpu", help="where to compute (default cpu)")
    options = parser.parse_args(arguments)
    console = Console()
    try:
        found = replay(options.dump, torch.device(options.device))
    except (CheckpointError, SettingsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console.print(f"step {found['step']}: {found['first'] or 'every number of the forward pass is finite'}")
    console.print(_table("samples by loss, nats a token", ("domain", "document", "piece", "loss"), found["samples"]))
    console.print(_table("parameters by norm of their gradient", ("parameter", "norm"), found["gradients"]))
    return 0


def replay(dump: Path, device: torch.device) -> dict[str, Any]:
    """What the dumped step comes to.

    Returns ``step``; ``first``, the first module of the forward pass whose output is not finite, as a sentence, or
    None; ``samples``: (domain, document, piece, loss), the largest loss first; ``gradients``: (parameter, norm of its
    gradient), likewise. Numbers that are not finite come before all others.

    Raises:
        CheckpointError, SettingsError: the dump or its run cannot be read.
    """
    trained = open_model(dump, device)
    loaded = load_checkpoint(trained.checkpoint, owners=("batch", "balancing"))
    batch = Batch(**loaded.states["batch"]).to(device)
    balancing = Balancing(trained.model, trained.settings.model)
    balancing.load_state(loaded.states["balancing"])
    first: list[str] = []
    _watch(trained.model, first)
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
        "samples": sorted(samples, key=lambda row: _badness(row[-1])),
        "gradients": sorted(gradients, key=lambda row: _badness(row[-1])),
    }


def _watch(model: nn.Module, first: list[str]) -> None:
    """Have the name of each module noted whose output is not finite, in the order in which they are done."""

    def note(name: str, kind: str, output: object) -> None:
        tensors = [x for x in _flat(output) if x.is_floating_point()]
        if not all(bool(x.isfinite().all()) for x in tensors):
            first.append(f"the first output that is not finite is that of {name} ({kind})")

    for name, module in model.named_modules():
        module.register_forward_hook(lambda m, _, out, name=name: note(name or "the model", type(m).__name__, out))


def _flat(value: object) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value if isinstance(value, tuple) else vars(value).values() if hasattr(value, "__dict__") else ()
    return [tensor for part in parts for tensor in _flat(part)]


def _badness(value: float) -> tuple[bool, float]:
    """Numbers that are not finite first, then the largest."""
    finite = abs(value) != float("inf") and value == value
    return finite, -value if finite else 0.0


def _table(title: str, columns: tuple[str, ...], rows: list[tuple]) -> Table:
    table = Table(*columns, title=title, title_justify="left")
    for row in rows[:_SHOWN]:
        table.add_row(*(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row))
    return table


if __name__ == "__main__":
    sys.exit(main())
