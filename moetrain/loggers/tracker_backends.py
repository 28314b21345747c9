"""Each experiment tracker through accelerate: how a run starts and is found again, and how images and files get there.

Weights & Biases, MLflow and trackio resume a run and take images and files; the others of accelerate take scalars, and
a resumed run is a new one there.
"""

from __future__ import annotations

import re
import secrets
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

PROJECT = "moetrain"
_LONGEST_NAME = 250  # what MLflow takes

# The argument of each that names the run; the project is the first argument of all.
_RUN_NAME = {
    "wandb": "name",
    "trackio": "name",
    "mlflow": "run_name",
    "swanlab": "experiment_name",
    "clearml": "task_name",
}


class Tracker(Protocol):
    """A run at a tracker. Every method may raise whatever the tracker's package raises."""

    @property
    def identity(self) -> str | None:
        """What finds the run again; None if it cannot be resumed."""

    def log(self, values: Mapping[str, float], step: int) -> None: ...

    def log_image(self, name: str, pixels: np.ndarray, step: int) -> None:
        """``pixels``: uint8 [height, width, 3]."""

    def log_file(self, path: Path) -> None: ...

    def finish(self) -> None: ...


def tracker_name(tag: str) -> str:
    """The name of a tag at every tracker: the tag itself, or a name that all of them take, different for each tag.

    MLflow refuses a batch with one name that holds other than letters, digits, ``_-. /``, or is no plain relative
    path; W&B and trackio keep names that begin with an underscore for themselves.
    """
    parts = [re.sub(r"[^A-Za-z0-9_. -]", "_", part).strip(" ") for part in tag.split("/")]
    name = "/".join(part for part in parts if part.strip(".")).lstrip("_/. ")
    if name and name == tag and len(name) <= _LONGEST_NAME:
        return name
    digest = f"-{zlib.crc32(tag.encode()):08x}"
    return (name[: _LONGEST_NAME - len(digest)] or "unnamed") + digest


def start(name: str, folder: Path, group: str, settings: Mapping[str, Any], known: str | None) -> Tracker:
    """Start a run, or resume it.

    Args:
        name: accelerate's name of the tracker.
        folder: of the run, whose name the run gets.
        group: of runs, where a tracker has groups.
        settings: by dotted name, plain values.
        known: the `Tracker.identity` of the run to resume.
    """
    return _KINDS.get(name, _Scalars)(name, folder, group, settings, known)


class _Scalars:
    """A run at any of accelerate's trackers."""

    def __init__(self, name: str, folder: Path, group: str, settings: Mapping[str, Any], known: str | None) -> None:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        make = LOGGER_TYPE_TO_CLASS[name]
        options: dict[str, Any] = {_RUN_NAME[name]: folder.name} if name in _RUN_NAME else {}
        if make.requires_logging_directory:
            options["logging_dir"] = str(folder)
        self._tracker: Any = make(PROJECT, **options | self._options(folder, group, known))
        self._tracker.start()
        self._tracker.store_init_configuration(self._new_settings(settings))

    @property
    def identity(self) -> str | None:
        return None

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._tracker.log(dict(values), step=step)

    def log_image(self, name: str, pixels: np.ndarray, step: int) -> None:
        pass

    def log_file(self, path: Path) -> None:
        pass

    def finish(self) -> None:
        self._tracker.finish()

    def _options(self, folder: Path, group: str, known: str | None) -> dict[str, Any]:
        return {}

    def _new_settings(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        return dict(settings)


class _WandB(_Scalars):
    """Values have the step beside them: metrics computed in the background arrive after points of later steps."""

    def __init__(self, name: str, folder: Path, group: str, settings: Mapping[str, Any], known: str | None) -> None:
        super().__init__(name, folder, group, settings, known)
        self._tracker.run.define_metric("*", step_metric="step")

    @property
    def identity(self) -> str | None:
        return str(self._tracker.run.id)

    def log(self, values: Mapping[str, Any], step: int) -> None:
        self._tracker.log({**values, "step": step})

    def log_image(self, name: str, pixels: np.ndarray, step: int) -> None:
        import wandb

        self.log({name: wandb.Image(pixels)}, step)

    def log_file(self, path: Path) -> None:
        import wandb

        self._tracker.log({path.stem: wandb.Html(path.read_text(encoding="utf-8"), inject=False)})

    def _options(self, folder: Path, group: str, known: str | None) -> dict[str, Any]:
        return {"dir": str(folder), "group": group, "id": known, "resume": "allow"}


class _MLflow(_Scalars):
    @property
    def identity(self) -> str | None:
        return str(self._tracker.active_run.info.run_id)

    def log_image(self, name: str, pixels: np.ndarray, step: int) -> None:
        import mlflow

        mlflow.log_image(pixels, artifact_file=f"figures/{name}.png")

    def log_file(self, path: Path) -> None:
        self._tracker.log_artifact(str(path))

    def _options(self, folder: Path, group: str, known: str | None) -> dict[str, Any]:
        return {"run_id": known}

    def _new_settings(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Without those that the run has already: MLflow refuses another value, such as that of `train.resume`."""
        import mlflow

        earlier = mlflow.get_run(self.identity).data.params
        return {key: value for key, value in settings.items() if key not in earlier}


class _Trackio(_Scalars):
    """Trackio finds a run by its name alone, so the name gets a random end."""

    @property
    def identity(self) -> str | None:
        return str(self._tracker.run.name)

    def log_image(self, name: str, pixels: np.ndarray, step: int) -> None:
        import trackio

        self._tracker.log({name: trackio.Image(pixels)}, step=step)

    def log_file(self, path: Path) -> None:
        self._tracker.run.log_artifact(path, name=f"{self.identity}-{path.name}", type=path.stem)

    def _options(self, folder: Path, group: str, known: str | None) -> dict[str, Any]:
        name = known or f"{folder.name}-{secrets.token_hex(3)}"
        return {"name": name, "group": group, "resume": "must" if known else "never"}


_KINDS: dict[str, type[_Scalars]] = {"wandb": _WandB, "mlflow": _MLflow, "trackio": _Trackio}
