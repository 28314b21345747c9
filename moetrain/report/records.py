"""The records of a run as data frames, as they were written: settings, scalars, events, panel, probes, samples."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moetrain.config import DomainSettings, Settings, flatten
from moetrain.loggers.monitor_page import FIRST_GROUP
from moetrain.routing.sample_store import read_samples
from moetrain.routing.store import FOLDER, StoredReading, read_reading, read_table

if TYPE_CHECKING:
    import pandas as pd

Progress = Callable[[str, int, int | None], None]
"""Called with what is being done, how much of it is done, and the total."""

_PANEL = ["step", "domain", "cell", "document", "piece", "first_step", "tokens", "loss"]
_PROBES = ["step", "task", "domain", "item", "correct", "log_probs"]


class RunError(ValueError):
    """A folder that is no run, or a file of a run that cannot be read; the message names it and the remedy."""


class MissingPackageError(ImportError):
    """An optional package that is not installed; the message says how to install it."""


def need(package: str, what: str) -> ModuleType:
    """Import an optional package.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package.partition(".")[0]:
            raise
        remedy = f"{what} needs {error.name}: pip install 'moetrain[report]'"
        raise MissingPackageError(remedy, name=error.name) from None


def _tokens_at(scalars: pd.DataFrame, steps: Iterable[int]) -> np.ndarray:
    """Text tokens trained on after given steps, float64, from the logged counts per domain; NaN without counts.

    Linear between two logged steps; after the newest one the last rate continues.
    """
    total = scalars[scalars["tag"].str.startswith("data/tokens/")].groupby("step")["value"].sum()
    at = np.asarray(list(steps), float)
    if not len(total):
        return np.full(len(at), np.nan)
    logged, tokens = np.array([0, *total.index]), np.array([0.0, *total])
    rate = (tokens[-1] - tokens[-2]) / (logged[-1] - logged[-2])
    return np.interp(at, logged, tokens) + np.maximum(at - logged[-1], 0.0) * rate


class Records:
    """The records of a run; each frame is read when it is first accessed.

    Attributes:
        path: the run's folder.
        progress: called while something slow is computed.
    """

    def __init__(self, path: Path, progress: Progress) -> None:
        self.path = path
        self.progress = progress

    @property
    def name(self) -> str:
        """The name of its folder: ``run.name``, with a number if that name was taken."""
        return self.path.resolve().name

    @cached_property
    def finished(self) -> bool:
        """Whether the run has ended and written its summary."""
        return bool(self.outcome)

    @cached_property
    def outcome(self) -> dict[str, Any]:
        """``summary.json``; empty while there is none."""
        path = self.path / "summary.json"
        return _parsed(path, json.loads, json.JSONDecodeError) if path.is_file() else {}

    @property
    def domains(self) -> list[str]:
        """Names of the domains."""
        return list(self._tree.get("data", {}).get("domains") or {})

    @cached_property
    def settings(self) -> pd.DataFrame:
        """setting (dotted), value, default; the default of a domain's setting is that of any domain's."""
        rows = [(key, value, self._defaults.get(key)) for key, value in flatten(self._tree).items()]
        return frame(rows, ["setting", "value", "default"], dtype=object)

    def setting(self, name: str) -> Any:
        """A setting's value; its default where the config.yaml of an older run does not have it."""
        found = self.settings.loc[self.settings["setting"] == name, "value"]
        return found.iloc[0] if len(found) else self._defaults[name]

    @cached_property
    def scalars(self) -> pd.DataFrame:
        """tag, step, tokens, value, time: every point of TensorBoard's curves, with the precision of float32.

        ``tokens`` are text tokens trained on by then, interpolated between logged counts; NaN in a replay, which trains
        nothing. ``time`` is when the point was written, in UTC.
        """
        events = EventAccumulator(str(self.path), size_guidance={"scalars": 0, "images": 1, "histograms": 1})
        events.Reload()
        rows = [
            (tag, event.step, event.value, event.wall_time)
            for tag in events.Tags()["scalars"]
            if not tag.startswith(f"{FIRST_GROUP}/")  # copies for the eye
            for event in events.Scalars(tag)
        ]
        found = frame(rows, ["tag", "step", "value", "time"])
        found = found.astype({"tag": str, "step": "int64", "value": "float64", "time": "float64"})
        found["time"] = need("pandas", "open_run").to_datetime(found["time"], unit="s", utc=True)
        found.insert(2, "tokens", _tokens_at(found, found["step"]))
        return found

    def curve(self, tag: str) -> pd.DataFrame:
        """step, tokens, value of one tag, by step; empty where the run has none."""
        found = self.scalars.loc[self.scalars["tag"] == tag, ["step", "tokens", "value"]]
        return found.sort_values("step", ignore_index=True)

    def tokens(self, steps: Iterable[int]) -> np.ndarray:
        """Text tokens trained on after given steps, float64; NaN where the run logs none."""
        return _tokens_at(self.scalars, steps)

    @cached_property
    def events(self) -> pd.DataFrame:
        """type, step, and all fields of events, empty in events without them; in the order of writing."""
        found = frame(self._events, dtype=object)
        return found if len(found) else frame([], ["type", "step"])

    def events_of(self, kind: str) -> list[dict[str, Any]]:
        """The events of one type as they were written, in order."""
        return [event for event in self._events if event["type"] == kind]

    @cached_property
    def _events(self) -> list[dict[str, Any]]:
        path = self.path / "events.jsonl"
        # While the run is being written, the last line may be incomplete.
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
        return [_parsed(path, json.loads, json.JSONDecodeError, line) for line in lines]

    @cached_property
    def tasks(self) -> pd.DataFrame:
        """task, domain, trained, chance, cut, too_few: the probes; trained and chance may be null."""
        newest = {event["task"]: event for event in self.events_of("probe")}
        found = self.outcome.get("probes") or newest
        rows = [
            (name, *(task.get(key) for key in ("domain", "trained", "chance", "cut", "too_few")))
            for name, task in found.items()
        ]
        return frame(rows, ["task", "domain", "trained", "chance", "cut", "too_few"])

    @cached_property
    def panel(self) -> pd.DataFrame:
        """step, domain, cell, document, piece, first_step, tokens, loss: each panel sample at each reading.

        Its routing is in `reading`.
        """
        paths = [self.path / FOLDER / f"panel_{step:08d}.parquet" for step in self.reading_steps]
        return joined((read_table(path, _PANEL).to_pandas() for path in paths), _PANEL)

    @cached_property
    def reading_steps(self) -> list[int]:
        """Steps at which the panel was read."""
        names = sorted((self.path / FOLDER).glob("panel_????????.parquet"))
        return [int(path.stem.removeprefix("panel_")) for path in names]

    def reading(self, step: int) -> StoredReading:
        """A reading of the panel with the routing of its samples, as arrays.

        Raises:
            StoreError: there is none at this step, or it is corrupt.
        """
        return read_reading(self.path, step)

    @cached_property
    def probes(self) -> pd.DataFrame:
        """step, task, domain, item, correct, log_probs (of each choice, nats): each item at each reading."""
        paths = sorted((self.path / FOLDER).glob("probe_????????.parquet"))
        found = joined((read_table(path, _PROBES).to_pandas() for path in paths), _PROBES)
        return found.astype({"correct": "boolean"})

    @cached_property
    def samples(self) -> pd.DataFrame:
        """step, order, domain, document, piece, experts, shares: each training sample, with monitor.store_top.

        ``experts`` and ``shares`` hold the heaviest experts of each layer, layer by layer; `attrs` gives ``layers`` and
        ``top``, the number of each. For a long run this is large: `moetrain.routing.sample_store.read_samples` reads
        it file by file.
        """
        pieces = list(read_samples(self.path))
        columns = ["step", "order", "domain", "document", "piece", "experts", "shares"]
        found = joined((piece.to_pandas() for piece in pieces), columns)
        if pieces:
            metadata = pieces[0].schema.metadata
            found.attrs = {name: int(metadata[name.encode()]) for name in ("layers", "top")}
        return found

    @cached_property
    def _defaults(self) -> dict[str, Any]:
        """The default of each setting, those of the run's domains among them."""
        found = flatten(Settings().model_dump())
        for domain in self.domains:
            for name, field in DomainSettings.model_fields.items():
                found[f"data.domains.{domain}.{name}"] = field.get_default(call_default_factory=True)
        return found

    @cached_property
    def _tree(self) -> dict[str, Any]:
        tree = _parsed(self.path / "config.yaml", yaml.safe_load, yaml.YAMLError)
        if not isinstance(tree, dict):
            raise RunError(f"{self.path / 'config.yaml'}: holds no settings: give the folder of a run")
        return tree


def _parsed(path: Path, parse: Callable[[str], Any], error: type[Exception], text: str | None = None) -> Any:
    try:
        return parse(path.read_text(encoding="utf-8") if text is None else text)
    except error as found:
        raise RunError(f"{path}: cannot be read ({found}): restore it") from None


def frame(rows: Any, columns: list[str] | None = None, dtype: Any = None) -> pd.DataFrame:
    return need("pandas", "open_run").DataFrame(list(rows), columns=columns, dtype=dtype)


def joined(parts: Iterable[pd.DataFrame], columns: list[str]) -> pd.DataFrame:
    listed = list(parts)
    pandas = need("pandas", "open_run")
    return pandas.concat(listed, ignore_index=True) if listed else pandas.DataFrame(columns=columns)
