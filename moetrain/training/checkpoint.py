"""Checkpoints that are whole or absent.

One is written into a folder beside its place, made durable, and renamed. Its manifest holds a format version, the hash
of each of its files, and the sizes that the run's growing files (events, TensorBoard) had: on resume those are cut back
to them, so that a resumed run continues each file where the straight run would.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

FORMAT = 1
_MANIFEST = "manifest.json"

State = Mapping[str, torch.Tensor]


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and what is wrong with it."""


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint: tensors by the name of what they are the state of, and a JSON record."""

    step: int
    states: dict[str, dict[str, torch.Tensor]]
    record: dict[str, Any]
    run_files: dict[str, int]


def checkpoint_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08d}"


def list_checkpoints(run: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    found = (run / "checkpoints").glob("step_????????")
    return sorted(path for path in found if (path / _MANIFEST).is_file())


def save_checkpoint(
    run: Path,
    step: int,
    states: Mapping[str, State],
    record: Mapping[str, Any],
    run_files: Mapping[str, int],
    keep: int,
) -> Path:
    """Write the checkpoint of a step and drop the oldest beyond ``keep``.

    Args:
        states: tensors by name of their owner, each kept in a file of its own.
        record: what JSON can hold.
        run_files: sizes in bytes of the run's growing files, by path relative to the run.

    Raises:
        OSError: nothing was kept, for instance on a full disk; what stood before still stands.
    """
    final = checkpoint_folder(run, step)
    beside = final.with_name(final.name + ".partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        for name, state in states.items():
            _save_tensors(state, beside / f"{name}.safetensors")
        _write(beside / "record.json", json.dumps(record, indent=1))
        hashes = {path.name: _hash(path) for path in sorted(beside.iterdir())}
        for path in beside.iterdir():
            _sync(path)
        manifest = {"format": FORMAT, "step": step, "files": hashes, "run_files": dict(run_files)}
        _write(beside / _MANIFEST, json.dumps(manifest, indent=1))
        _sync(beside / _MANIFEST)
        _sync(beside)
        beside.rename(final)
        _sync(final.parent)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    for old in list_checkpoints(run)[:-keep]:
        shutil.rmtree(old)
    return final


def _save_tensors(state: State, path: Path) -> None:
    """Write tensors; two names of one tensor (tied embeddings) are each written."""
    kept: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for key, value in state.items():
        tensor = value.detach().cpu().contiguous()
        kept[key] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    try:
        save_file(kept, path)
    except SafetensorError as error:  # it wraps what the system said, a full disk among it
        raise OSError(f"{path.name} could not be written: {error}") from None


def set_aside_later(run: Path, step: int) -> None:
    """Move checkpoints after a step, which a run that goes on from that step will write anew, to ``superseded/``."""
    for folder in (run / "checkpoints").glob("step_????????"):
        if int(folder.name.removeprefix("step_")) > step:
            aside = run / "checkpoints" / "superseded" / folder.name
            aside.parent.mkdir(exist_ok=True)
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)


def load_checkpoint(folder: Path, owners: Collection[str] | None = None) -> Checkpoint:
    """Read a checkpoint back, each file checked against its hash.

    Args:
        owners: whose states are wanted; null: everyone's. The others' files are neither read nor checked.

    Raises:
        CheckpointError: no checkpoint, one of another format, or a file that is missing or altered, by name.
    """
    manifest = _verified(folder, owners)
    states = {Path(name).stem: load_file(folder / name) for name in manifest["files"] if name.endswith(".safetensors")}
    return Checkpoint(manifest["step"], states, json.loads((folder / "record.json").read_text()), manifest["run_files"])


def _verified(folder: Path, owners: Collection[str] | None = None) -> dict[str, Any]:
    """A checkpoint's manifest, once each of its files (with ``owners``, of theirs: it lists no other) is unharmed."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: no checkpoint here ({error}): give a folder checkpoints/step_XXXXXXXX"
        ) from None
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{folder}: format {manifest.get('format')}, this version reads {FORMAT}")
    if owners is not None:
        wanted = {"record.json", *(f"{owner}.safetensors" for owner in owners)}
        manifest["files"] = {name: digest for name, digest in manifest["files"].items() if name in wanted}
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path}: missing: resume from an earlier checkpoint with train.resume=FOLDER")
        if _hash(path) != expected:
            raise CheckpointError(
                f"{path}: its content is altered: resume from an earlier one with train.resume=FOLDER"
            )
    return manifest


def newest_whole(run: Path, owners: Collection[str] | None = None) -> tuple[Path, list[str]]:
    """The folder of a run's newest unharmed checkpoint, and a line about each newer one that is not.

    With ``owners``, a checkpoint is unharmed where their states are.

    Raises:
        CheckpointError: none is unharmed.
    """
    complaints: list[str] = []
    for folder in reversed(list_checkpoints(run)):
        try:
            _verified(folder, owners)
            return folder, complaints
        except CheckpointError as error:
            complaints.append(str(error))
    raise CheckpointError("; ".join(complaints) or f"{run}: holds no checkpoint")


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _sync(path: Path) -> None:
    """Make a file's content, or a folder's entries, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
