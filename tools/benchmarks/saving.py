"""How long training waits for a checkpoint: written at once, and by a thread from a copy; the two in turns.

The state is that of the configuration's model and its optimizer, with random values. ``pause`` is what the training
loop waits for, ``written`` the time until the checkpoint is on disk. The first checkpoint of a thread, which also
allocates the copy, is reported apart.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from benchmarks.configs import add_configs, load_configs
from moetrain.checkpoint.background import CheckpointWriter
from moetrain.checkpoint.manager import State, save_checkpoint
from moetrain.config import Settings, SettingsError
from moetrain.distributed.mesh import ParallelLayout
from moetrain.models.transformer import Transformer
from moetrain.optim.builder import initial_optimizer_state, make_optimizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_configs(parser, "peers")
    parser.add_argument("--turns", type=int, default=5, help="checkpoints of each kind (default 5)")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each checkpoint of each kind."""
    settings = load_configs(options)[0]
    layout = ParallelLayout(device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    states = random_states(settings, layout.device)
    sides = {background: CheckpointWriter(layout, background) for background in (False, True)}
    found: dict[str, dict[str, list[float]]] = {}
    first = None
    with tempfile.TemporaryDirectory() as place:
        for turn in range(options.turns + 1):
            for background, writer in sides.items():
                pause, written = _save(writer, states, Path(place))
                if turn:  # the first is a warm-up
                    side = found.setdefault("thread" if background else "at once", {"pause": [], "written": []})
                    side["pause"].append(pause)
                    side["written"].append(written)
                elif background:
                    first = pause
    for writer in sides.values():
        writer.close()
    ratios = [a / b for a, b in zip(found["thread"]["pause"], found["at once"]["pause"], strict=True)]
    return {
        "bytes": sum(tensor.nbytes for state in states.values() for tensor in state.values()),
        "first_pause": first,
        "sides": found,
        "pause_ratio": {"median": statistics.median(ratios), "each": ratios},
    }


def random_states(settings: Settings, device: torch.device) -> dict[str, State]:
    """A model's weights and its optimizer's state, as a checkpoint holds them, of random values."""
    if settings.tokenizer.model is not None:
        raise SettingsError("saving: give tokenizer.vocab_size instead of tokenizer.model")
    with device:
        model = Transformer(settings.model, settings.tokenizer.vocab_size, torch.float32)
    states: dict[str, State] = {
        "model": model.state_dict(),
        "optimizer": initial_optimizer_state(model, make_optimizer(model, settings.optim)),
    }
    with torch.no_grad():
        for state in states.values():
            for tensor in state.values():
                tensor.normal_()
    return states


def _save(writer: CheckpointWriter, states: Mapping[str, State], place: Path) -> tuple[float, float]:
    def write(tensors: Mapping[str, State], layout: ParallelLayout) -> list[str]:
        save_checkpoint(place, 1, tensors, {}, {}, layout)
        return []

    begin = time.perf_counter()
    writer.write(1, states, write)
    pause = time.perf_counter() - begin
    outcome = writer.finish()
    written = time.perf_counter() - begin
    assert outcome is not None
    if not outcome.saved:
        raise OSError(outcome.problem)
    shutil.rmtree(place / "checkpoints")
    return pause, written


def tables(result: dict[str, Any]) -> Iterator[Table]:
    """Medians of both kinds."""
    ratio = result["pause_ratio"]["median"]
    title = f"a checkpoint of {result['bytes'] / 1e6:.0f} MB: the thread's pause is {ratio:.2f} of the other"
    table = Table("written", "pause, s (median)", "smallest to largest", "until written, s (median)", title=title)
    for name, seconds in result["sides"].items():
        pause = seconds["pause"]
        spread = f"{min(pause):.2f} to {max(pause):.2f}"
        table.add_row(name, f"{statistics.median(pause):.2f}", spread, f"{statistics.median(seconds['written']):.2f}")
    yield table


def draw(result: dict[str, Any], path: Path) -> None:
    """Nothing to draw.

    Raises:
        SettingsError: always.
    """
    raise SettingsError(f"{path}: saving has no figure: leave --figure out")
