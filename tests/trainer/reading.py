"""Reading a run back, for comparison."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
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


def assert_types_of_events(run: Path, expected: list[str]) -> None:
    """The events of a run are of these types, in order, and besides one of each change of a phase's curve."""
    found = events(run)
    assert [event["type"] for event in found if event["type"] != "phase"] == expected
    changes = []
    for tag, points in scalars(run).items():
        if tag.startswith("phase/"):
            values = [0.0, *(value for _, value in points)]  # undecided before the first reading
            for (step, after), before in zip(points, values, strict=False):
                if after != before:
                    changes.append((step, tag.removeprefix("phase/")))
    assert sorted((event["step"], event["domain"]) for event in found if event["type"] == "phase") == sorted(changes)


def assert_same_scalars(actual: dict[str, list[tuple[int, float]]], expected: dict[str, list[tuple[int, float]]]):
    """Two runs' `scalars`, up to rounding: more after the first step, and more where experts are counted."""
    assert actual.keys() == expected.keys()
    for tag, points in expected.items():
        assert [step for step, _ in actual[tag]] == [step for step, _ in points]
        for (step, value), (_, same) in zip(points, actual[tag], strict=True):
            discrete = tag.startswith(("stream/", "experts/"))
            tolerance = 0.02 if discrete else 1e-5 if step <= 1 else 1e-3
            assert same == pytest.approx(value, rel=tolerance, abs=1e-3), (tag, step)


def assert_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], owners, tolerance: float):
    """What `states` returned of a checkpoint, as far as these owners' tensors go."""
    assert actual.keys() == expected.keys()
    for key in actual:
        if key.startswith(owners):
            close = {"rtol": tolerance, "atol": tolerance, "msg": lambda m, k=key: f"{k}: {m}"}
            torch.testing.assert_close(actual[key], expected[key], **close)
