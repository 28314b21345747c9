"""Reading a run back, for comparison."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moetrain.checkpoint.manager import load_checkpoint


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Every scalar's points, (step, value), by tag; those of the clock and the machine left out."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if not tag.startswith("system/")
    }


def states(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, by file and name."""
    checkpoint = load_checkpoint(folder)
    return {f"{file}/{name}": value for file, state in checkpoint.states.items() for name, value in state.items()}


def events(run: Path) -> list[dict]:
    """The events of a run, in order."""
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
