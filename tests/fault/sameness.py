"""Whether two runs wrote the same, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event, SessionLog

from moetrain.checkpoint.manager import list_checkpoints, load_checkpoint
from moetrain.routing.store import list_files
from tests.trainer.reading import events, states

_TIME_DEPENDENT = ("measured_tokens", "tokens_per_second", "monitor_share", "seconds", "peak_memory_bytes")


def left_behind(run: Path) -> dict[str, object]:
    """All that a run wrote, by name, except what depends on time and machine."""
    found: dict[str, object] = {}
    for folder in list_checkpoints(run):
        for name, value in states(folder).items():
            found[f"{folder.name}/{name}"] = (value.dtype, tuple(value.shape), value.numpy().tobytes())
        found[f"{folder.name}/record"] = load_checkpoint(folder).record
    found |= {name: (run / name).read_bytes() for name in list_files(run)}
    found["events"] = [event for event in events(run) if event["type"] != "resume"]
    found |= _points(run)
    summary = json.loads((run / "summary.json").read_text())
    found |= {f"summary/{key}": value for key, value in summary.items() if key not in _TIME_DEPENDENT}
    return found


def different(actual: Path, expected: Path) -> list[str]:
    """Names of what differs between two runs."""
    a, b = left_behind(actual), left_behind(expected)
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))


def _points(run: Path) -> dict[str, object]:
    """TensorBoard's points, (step, value), by tag, in reading order; the value of an image is the image.

    A resumed run's file starts with a marker that drops points from its step on. There must be none left to drop.
    """
    points: dict[str, list[tuple[int, bytes]]] = {}
    for path in sorted(run.glob("events.out.tfevents.*")):
        for record in RawEventFileLoader(str(path)).Load():
            event = Event.FromString(record)
            if event.session_log.status == SessionLog.START:
                dropped = [tag for tag, seen in points.items() for step, _ in seen if step >= event.step]
                assert not dropped, f"{path}: points of {dropped} were not cut off"
            for value in event.summary.value:
                if not value.tag.startswith("system/") and value.tag != "custom_scalars__config__":
                    shown = getattr(value, value.WhichOneof("value"))
                    content = shown.SerializeToString() if hasattr(shown, "SerializeToString") else shown
                    points.setdefault(f"point {value.tag}", []).append((event.step, content))
    return dict(points)
