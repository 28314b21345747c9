"""Which folder a run writes to, and which checkpoint it resumes from. Nothing is ever overwritten."""

from __future__ import annotations

import fcntl
import os
import re
from dataclasses import dataclass
from pathlib import Path

from moetrain.atomic_io import write_file
from moetrain.checkpoint.extension import finished, goes_on_from, named_checkpoint, run_of, start_folder
from moetrain.checkpoint.manager import CheckpointError, list_checkpoints, load_checkpoint, newest_valid
from moetrain.config import Settings, SettingsError, expand, load_settings
from moetrain.distributed.mesh import ParallelLayout

# Settings that `monitor.budget: auto` calibrates for each run.
_CALIBRATED = ("panel.readings", "probes.readings")

_MAY_DIFFER = (
    "train.resume",
    "train.keep_checkpoints",
    "train.keep_every",
    "train.background_checkpoints",
    "train.sharding",
    "train.expert_parallel",
    "run.output_dir",
    "run.name",
    "run.report",
    "run.trackers",
    "profile.start",
    "profile.steps",
    "data.cache_dir",
    "data.workers",
)


@dataclass(frozen=True)
class RunFolder:
    """A run's folder, and the checkpoint to resume from, if any."""

    path: Path
    checkpoint: Path | None
    notes: list[str]  # lines for the user about the choice
    lock: int  # an open file: the run is locked until it is closed or the process ends

    def release(self) -> None:
        """Unlock the run."""
        os.close(self.lock)


def may_differ(settings: Settings) -> tuple[str, ...]:
    """Settings in which a run may differ from the one it resumes."""
    return (*_MAY_DIFFER, *_CALIBRATED) if settings.monitor.budget == "auto" else _MAY_DIFFER


def claim_run_folder(settings: Settings, layout: ParallelLayout) -> RunFolder:
    """`open_run_folder` on the main rank; every rank gets the same folder, or the same error. All ranks must call."""
    folder: RunFolder | None = None
    error: Exception | None = None
    if layout.is_main:
        try:
            folder = open_run_folder(settings)
        except (SettingsError, CheckpointError, OSError) as caught:
            error = caught
    folder, error = layout.broadcast_object((folder, error))
    if error is not None:
        raise error
    assert folder is not None
    return folder


def open_run_folder(settings: Settings) -> RunFolder:
    """Choose, create and lock the run's folder by ``train.resume``.

    Raises:
        SettingsError: a given checkpoint that belongs to no run, or to one that has other settings or is locked.
        CheckpointError: a checkpoint that is corrupt or cannot be read; each file is compared with its hash.
    """
    base = Path(expand(settings.run.output_dir, "run.output_dir"))
    base.mkdir(parents=True, exist_ok=True)
    named, origin = named_checkpoint(settings), goes_on_from(settings)
    if named is not None and origin is None:
        return _from_checkpoint(named, settings)
    earlier = _runs_named(base, settings.run.name)
    notes = []
    for run in reversed(earlier) if settings.train.resume != "never" else ():
        reason = _cannot_continue(run, settings)
        lock = None if reason else _lock(run)
        if lock is not None:
            checkpoint, problems = newest_valid(run)
            return RunFolder(run, checkpoint, [*problems, f"continuing {run} from {checkpoint.name}"], lock)
        notes.append(f"{run} {reason or 'is being written by another process'}")
    name = settings.run.name
    path = base / (name if not earlier else f"{name}-{_number(earlier[-1], name) + 1}")
    if origin is not None:
        start_folder(path, origin, settings)
        lock = _lock(path)
        assert lock is not None
        copied = path / "checkpoints" / origin.resolve().name
        return RunFolder(path, copied, [f"{path} goes on from {run_of(origin)}, {origin.name}"], lock)
    path.mkdir()
    lock = _lock(path)
    assert lock is not None
    write_file(path / "config.yaml", settings.to_yaml())
    return RunFolder(path, None, [f"{notes[0]}: starting a new run, {path}"] if notes else [], lock)


def _from_checkpoint(folder: Path, settings: Settings) -> RunFolder:
    run = run_of(folder)
    if (run / "summary.json").exists():
        raise SettingsError(finished(run, folder))
    different = _differences(run, settings)
    if different:
        raise SettingsError(f"train.resume: {run} was run with another {different[0]}: resume it with its config.yaml")
    lock = _lock(run)
    if lock is None:
        raise SettingsError(f"train.resume: {run} is being written by another process: stop it first")
    load_checkpoint(folder)
    return RunFolder(run, folder, [f"continuing {run} from {folder.name}"], lock)


def _cannot_continue(run: Path, settings: Settings) -> str | None:
    if (run / "summary.json").exists():
        return "is finished"
    if not (run / "config.yaml").is_file():
        return "holds no run"
    try:
        different = _differences(run, settings)
    except SettingsError as error:
        return f"holds settings that cannot be read ({error})"
    if different:
        return "went on from another run" if different == ["data.earlier"] else f"was run with another {different[0]}"
    if not list_checkpoints(run):
        return "has no checkpoint to continue from"
    return None


def _differences(run: Path, settings: Settings) -> list[str]:
    """Dotted keys in which a run's settings differ from these.

    Raises:
        SettingsError: the run's settings cannot be read.
    """
    saved = load_settings(run / "config.yaml")  # settings newer than the run get their defaults
    a, b = saved.by_key(), settings.by_key()
    free = may_differ(settings)
    return sorted(key for key in a.keys() | b.keys() if key not in free and a.get(key) != b.get(key))


def _runs_named(base: Path, name: str) -> list[Path]:
    """Runs called NAME, NAME-2, NAME-3, ..., in that order."""
    found = [path for path in base.iterdir() if re.fullmatch(re.escape(name) + r"(-[1-9]\d*)?", path.name)]
    return sorted(found, key=lambda path: _number(path, name))


def _number(path: Path, name: str) -> int:
    return int(path.name.removeprefix(name).lstrip("-") or 1)


def _lock(run: Path) -> int | None:
    """An open file that locks the run; None where another process has locked it."""
    handle = os.open(run / ".lock", os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    return handle
