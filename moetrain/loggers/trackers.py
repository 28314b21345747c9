"""What experiment trackers get in addition to TensorBoard: Weights & Biases, MLflow, trackio, others of accelerate.

Without `run.trackers` none of them is imported and no point is kept.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from moetrain.atomic_io import write_file
from moetrain.config import Settings, SettingsError, flatten
from moetrain.loggers.tracker_backends import Tracker, start, tracker_name

# Package names that differ from accelerate's names.
_PACKAGES = {"comet_ml": "comet-ml"}
_RUNS = "trackers.json"  # in the run's folder: by tracker, what finds the run there again


def check_trackers(names: Sequence[str]) -> None:
    """Check that the trackers are installed.

    Raises:
        SettingsError: one is not.
    """
    if not names:
        return
    from accelerate.tracking import get_available_trackers

    installed = {str(getattr(name, "value", name)) for name in get_available_trackers()}
    for name in names:
        if name not in installed:
            raise SettingsError(
                f"run.trackers: {name} is not installed: pip install {_PACKAGES.get(name, name)}, or leave it out"
            )


def start_trackers(settings: Settings, folder: Path) -> dict[str, Tracker]:
    """Start a run at each tracker of `run.trackers`, or resume the one that the run in ``folder`` had there.

    Points after the checkpoint that a run resumes from are sent again.

    Raises:
        SettingsError: one cannot be reached, needs a login, or no longer has the run.
    """
    found: dict[str, Tracker] = {}
    file = folder / _RUNS
    known = _read_runs(file)
    for name in settings.run.trackers:
        earlier = known.get(name)
        try:
            found[name] = start(name, folder, settings.run.name, plain_settings(settings), earlier)
        except Exception as error:  # of any kind: a missing login, a server that does not answer
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            remedy = f": remove {file} to start a new run there, or leave {name} out" if earlier else ""
            done = "resumed" if earlier else "started"
            raise SettingsError(f"run.trackers: {name} cannot be {done} ({reason}){remedy}") from error
        if found[name].identity is not None:
            known[name] = found[name].identity
            write_file(file, json.dumps(known, indent=1) + "\n")
    return found


def _read_runs(file: Path) -> dict[str, str | None]:
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(known, dict):
            raise ValueError(f"holds a {type(known).__name__}")
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise SettingsError(f"run.trackers: {file} cannot be read ({error}): remove it to start new runs") from None
    return known


def plain_settings(settings: Settings) -> dict[str, Any]:
    """Settings by dotted name; values that are not plain are written as YAML."""
    found = flatten(settings.model_dump())
    return {
        name: yaml.safe_dump(value, default_flow_style=True).strip() if isinstance(value, list | dict) else value
        for name, value in found.items()
    }


class Points:
    """What trackers get: scalars, collected per step and sent together; at the end the newest images, and files.

    A tracker that fails is dropped with a message: training does not depend on it.
    """

    def __init__(self, trackers: Mapping[str, Tracker], note: Callable[[str], None]) -> None:
        self._trackers = dict(trackers)
        self._waiting: dict[int, dict[str, float]] = {}
        self._images: dict[str, tuple[np.ndarray, int]] = {}
        self._note = note

    def add(self, tag: str, value: float, step: int) -> None:
        """Add a scalar; the next `send` sends it."""
        if self._trackers:
            self._waiting.setdefault(step, {})[tracker_name(tag)] = float(value)

    def add_image(self, tag: str, pixels: np.ndarray, step: int) -> None:
        """Add an image, uint8 [height, width, 3]; `finish` sends the newest of each tag."""
        if self._trackers:
            self._images[tracker_name(tag)] = pixels, step

    def send(self) -> None:
        """Send the added scalars."""
        waiting, self._waiting = self._waiting, {}
        for step in sorted(waiting):
            self._each(f"from step {step} on", "log", waiting[step], step)

    def finish(self, files: Sequence[Path] = ()) -> None:
        """Send what was added and ``files``, and end the trackers' runs."""
        self.send()
        for name, (pixels, step) in self._images.items():
            self._each("at its end", "log_image", name, pixels, step)
        for path in files:
            self._each("at its end", "log_file", path)
        self._each("at its end", "finish")
        self._trackers, self._images = {}, {}

    def _each(self, when: str, method: str, *arguments: Any) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                getattr(tracker, method)(*arguments)
            except Exception as error:  # of any kind: network, disk
                del self._trackers[name]
                self._note(f"{name} is dropped {when} ({type(error).__name__}: {error}); TensorBoard has all points")
