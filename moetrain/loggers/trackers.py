"""Scalars for experiment trackers in addition to TensorBoard: Weights & Biases, MLflow and others of accelerate.

Without `run.trackers` none of them is imported and no point is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import yaml

from moetrain.config import Settings, SettingsError, flatten

PROJECT = "moetrain"
# Package names that differ from accelerate's names.
_PACKAGES = {"comet_ml": "comet-ml", "mlflow": "mlflow"}
# The argument of each that names the run; the project is the first argument of all.
_RUN_NAME = {
    "wandb": "name",
    "trackio": "name",
    "mlflow": "run_name",
    "swanlab": "experiment_name",
    "clearml": "task_name",
}


class Tracker(Protocol):
    """The used part of accelerate's trackers."""

    def log(self, values: dict[str, Any], step: int | None = None) -> None: ...

    def finish(self) -> None: ...


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
    """Start the trackers of `run.trackers`, each with a new run that has all settings; returns them by name.

    Raises:
        SettingsError: one cannot be reached, or needs a login.
    """
    found: dict[str, Tracker] = {}
    for name in settings.run.trackers:
        try:
            found[name] = _start(name, settings, folder)
        except Exception as error:  # of any kind: a missing login, a server that does not answer
            raise SettingsError(f"run.trackers: {name} cannot be started ({type(error).__name__}: {error})") from error
    return found


def _start(name: str, settings: Settings, folder: Path) -> Tracker:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    make = LOGGER_TYPE_TO_CLASS[name]
    options: dict[str, Any] = {_RUN_NAME[name]: folder.name} if name in _RUN_NAME else {}
    if name == "wandb":
        options |= {"dir": str(folder), "group": settings.run.name}
    if make.requires_logging_directory:
        options["logging_dir"] = str(folder)
    tracker = make(PROJECT, **options)
    tracker.start()
    tracker.store_init_configuration(plain_settings(settings))
    # Metrics computed in the background arrive after points of later steps, which W&B's own steps do not allow.
    if name == "wandb":
        tracker.tracker.define_metric("*", step_metric="step")
        return _StepAsValue(tracker)
    return tracker


class _StepAsValue:
    """A tracker that logs the step as one more value."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        self._tracker.log({**values, "step": step})

    def finish(self) -> None:
        self._tracker.finish()


def plain_settings(settings: Settings) -> dict[str, Any]:
    """Settings by dotted name; values that are not plain are written as YAML."""
    found = flatten(settings.model_dump())
    return {
        name: yaml.safe_dump(value, default_flow_style=True).strip() if isinstance(value, list | dict) else value
        for name, value in found.items()
    }


class Points:
    """Scalars for trackers: collected per step, sent together."""

    def __init__(self, trackers: Mapping[str, Tracker], note: Callable[[str], None]) -> None:
        self._trackers = dict(trackers)
        self._waiting: dict[int, dict[str, float]] = {}
        self._note = note

    def add(self, tag: str, value: float, step: int) -> None:
        """Add a scalar; the next `send` sends it."""
        if self._trackers:
            self._waiting.setdefault(step, {})[tag] = float(value)

    def send(self) -> None:
        """Send the added scalars. A tracker that fails is dropped with a message: training does not depend on it."""
        waiting, self._waiting = self._waiting, {}
        for step in sorted(waiting):
            for name, tracker in list(self._trackers.items()):
                try:
                    tracker.log(waiting[step], step=step)
                except Exception as error:  # of any kind: network, disk
                    self._drop(name, step, error)

    def finish(self) -> None:
        """Send the added scalars, and end the trackers' runs."""
        self.send()
        for name, tracker in list(self._trackers.items()):
            try:
                tracker.finish()
            except Exception as error:
                self._drop(name, None, error)
        self._trackers = {}

    def _drop(self, name: str, step: int | None, error: Exception) -> None:
        del self._trackers[name]
        when = "at its end" if step is None else f"from step {step} on"
        self._note(f"{name} is dropped {when} ({type(error).__name__}: {error}); TensorBoard has all points")
