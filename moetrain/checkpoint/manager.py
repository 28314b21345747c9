"""Checkpoints that are whole or absent.

One is written into a folder beside its place, made durable, and renamed. Its manifest holds a format version, the hash
of each of its files and of itself, and the sizes that the run's growing files (events, TensorBoard) had: on resume
those are cut back to them, so that a resumed run continues each file where the straight run would.

Nothing in a checkpoint is code: tensors are safetensors, all else is JSON. A state of which processes hold parts is a
folder with a file from each of them.

Training waits while one is written: that takes less than 1% of a run (tools/results/faults.md), and to write beside
the training would take a second copy of weights and moments in memory.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from moetrain.atomic_io import BESIDE, file_hash, sync
from moetrain.checkpoint.sharded_tensors import (
    fill,
    fill_from_shards,
    is_sharded,
    read_shards,
    save_shards,
    shard_names,
)
from moetrain.distributed.mesh import ParallelLayout
from moetrain.fault_injection import fault_point

FORMAT = 2
_MANIFEST = "manifest.json"
_RECORD = "record.json"
_TENSORS = ".safetensors"
_HERE = re.compile(r"\w[\w.-]*", re.ASCII)  # a file of a folder
_INSIDE = re.compile(rf"({_HERE.pattern}/)?{_HERE.pattern}", re.ASCII)  # or of a folder in it
_NAMED = "step_" + "[0-9]" * 8

State = Mapping[str, torch.Tensor]
_ONE_RANK = ParallelLayout()


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and what is wrong with it."""


class States(Mapping[str, dict[str, torch.Tensor]]):
    """The tensors of a checkpoint by the name of what they are the state of, each read when it is asked for."""

    def __init__(self, folder: Path, owners: Sequence[str]) -> None:
        self._folder = folder
        self._owners = owners

    def __getitem__(self, owner: str) -> dict[str, torch.Tensor]:
        """All of an owner's tensors, whole, on the CPU."""
        if owner not in self._owners:
            raise KeyError(owner)
        try:
            return read_shards(self._folder / owner) if self._in_shards(owner) else load_file(self._file(owner))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self._folder}: {owner} cannot be read ({error})") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._owners)

    def __len__(self) -> int:
        return len(self._owners)

    def names(self, owner: str) -> set[str]:
        """Names of an owner's tensors."""
        if self._in_shards(owner):
            return shard_names(self._folder / owner)
        with safe_open(self._file(owner), framework="pt") as file:
            return set(file.keys())

    @torch.no_grad()
    def fill(self, owner: str, tensors: State) -> None:
        """Copy an owner's tensors into given ones, whole or sharded, in place; all processes have to ask for it.

        Raises:
            CheckpointError: the checkpoint holds others than these, by name.
        """
        for name in sorted(tensors.keys() ^ self.names(owner)):
            has = "has no" if name in tensors else "has a"
            raise CheckpointError(f"{self._folder}: its {owner} {has} {name}, unlike this run's")
        if self._in_shards(owner):
            fill_from_shards(self._folder / owner, tensors)
            return
        with safe_open(self._file(owner), framework="pt") as file:
            for name, tensor in tensors.items():
                fill(tensor, file.get_tensor(name))

    def _file(self, owner: str) -> Path:
        return self._folder / (owner + _TENSORS)

    def _in_shards(self, owner: str) -> bool:
        return (self._folder / owner).is_dir()


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found unharmed: its tensors, and a JSON record."""

    step: int
    states: States
    record: dict[str, Any]
    run_files: dict[str, int]


def checkpoint_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08d}"


def list_checkpoints(run: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    found = (run / "checkpoints").glob(_NAMED)
    return sorted(path for path in found if (path / _MANIFEST).is_file())


def save_checkpoint(
    run: Path,
    step: int,
    states: Mapping[str, State],
    record: Mapping[str, Any],
    run_files: Mapping[str, int],
    layout: ParallelLayout = _ONE_RANK,
) -> Path:
    """Write the checkpoint of a step; returns its folder. `write_checkpoint` says how, and what it raises."""
    return write_checkpoint(checkpoint_folder(run, step), step, states, record, run_files, layout)


def write_checkpoint(
    final: Path,
    step: int,
    states: Mapping[str, State],
    record: Mapping[str, Any],
    run_files: Mapping[str, int],
    layout: ParallelLayout = _ONE_RANK,
) -> Path:
    """Write a checkpoint into a new folder ``final``; returns it.

    The main process does. Where states are sharded, the others write their parts in `help_write`.

    Args:
        states: tensors by name of their owner.
        record: what JSON can hold.
        run_files: sizes in bytes of the run's growing files, by their names in the run's folder.

    Raises:
        OSError: nothing was kept, for instance on a full disk; what stood before still stands.
    """
    place = final.with_name(final.name + BESIDE)
    for left in final.parent.glob("*" + BESIDE):  # by a process that was killed
        shutil.rmtree(left)
    place.mkdir(parents=True)
    try:
        files: dict[str, str] = {}
        for owner, state in states.items():
            if is_sharded(state):
                (place / owner).mkdir()
                layout.all_gather_objects(place / owner)  # what `help_write` waits for
                shards = save_shards(place / owner, state, layout)
                files |= {f"{owner}/{name}": digest for name, digest in shards.items()}
                sync(place / owner)
            else:
                _save_tensors(state, place / (owner + _TENSORS))
        _write(place / _RECORD, json.dumps(record, indent=1))
        for path in sorted(path for path in place.iterdir() if path.is_file()):
            sync(path)
            files[path.name] = file_hash(path)
        manifest = {"format": FORMAT, "step": step, "files": files, "run_files": dict(run_files)}
        _write(place / _MANIFEST, json.dumps(manifest | {"hash": _hash_manifest(manifest)}, indent=1))
        sync(place / _MANIFEST)
        sync(place)
        place = place.rename(final)
        fault_point("rename checkpoint")
        sync(final.parent)
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise
    return final


def help_write(states: Mapping[str, State], layout: ParallelLayout) -> None:
    """Write this process's parts of the checkpoint that the main process writes, until it calls `end_write`."""
    while (folder := layout.all_gather_objects(None)[0]) is not None:
        with suppress(OSError):  # the main process hears of it as well, and drops the checkpoint
            save_shards(folder, states[folder.name], layout)


def end_write(layout: ParallelLayout) -> None:
    """The main process has written a checkpoint, or failed to: the others need not help any more."""
    layout.all_gather_objects(None)


def drop_checkpoints(run: Path, keep: int, keep_every: int | None) -> None:
    """Remove a run's checkpoints but for the newest ``keep`` and those of steps that are multiples of ``keep_every``.

    Raises:
        OSError: one could not be removed.
    """
    for old in list_checkpoints(run)[:-keep]:
        if keep_every is None or _step(old) % keep_every:
            leaving = old.rename(old.with_name(old.name + BESIDE))
            fault_point("rename dropped checkpoint")
            shutil.rmtree(leaving)
            fault_point("remove dropped checkpoint")


def set_aside_later(run: Path, step: int) -> None:
    """Move checkpoints after a step, which a run that goes on from that step will write anew, to ``superseded/``.

    The newest goes first, and all go before anything that they know of is cut: wherever this ends, the newest one left
    is whole.
    """
    for folder in sorted((run / "checkpoints").glob(_NAMED), reverse=True):
        if _step(folder) > step:
            aside = run / "checkpoints" / "superseded" / folder.name
            aside.parent.mkdir(exist_ok=True)
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
            fault_point("rename superseded checkpoint")


def load_checkpoint(folder: Path, owners: Collection[str] | None = None, verify: bool = True) -> Checkpoint:
    """A checkpoint, each file checked against its hash.

    Args:
        owners: whose states are wanted; null: everyone's. The others' files are neither read nor checked.
        verify: False for one that was just checked.

    Raises:
        CheckpointError: no checkpoint, one of another format, or a file that is missing or altered, by name.
    """
    manifest = _verified(folder, owners) if verify else _read_manifest(folder, owners)
    found = sorted({_owner(name) for name in manifest["files"] if name.endswith(_TENSORS)})
    return Checkpoint(manifest["step"], States(folder, found), _read_record(folder), manifest["run_files"])


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


def _verified(folder: Path, owners: Collection[str] | None) -> dict[str, Any]:
    """A checkpoint's manifest, once each file that it lists was found unharmed."""
    manifest = _read_manifest(folder, owners)
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path}: missing: resume from an earlier checkpoint with train.resume=FOLDER")
        if file_hash(path) != expected:
            raise CheckpointError(
                f"{path}: its content is altered: resume from an earlier one with train.resume=FOLDER"
            )
    return manifest


def _read_manifest(folder: Path, owners: Collection[str] | None) -> dict[str, Any]:
    """A checkpoint's manifest; with ``owners``, it lists no files but theirs."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{folder}: no checkpoint here ({error}): give a folder checkpoints/step_XXXXXXXX"
        ) from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else None
        raise CheckpointError(f"{folder}: format {found}, this version reads {FORMAT}")
    if manifest.pop("hash", None) != _hash_manifest(manifest):
        raise CheckpointError(f"{folder / _MANIFEST}: its content is altered: resume from an earlier checkpoint")
    if not _is_manifest(manifest):
        raise CheckpointError(f"{folder / _MANIFEST}: lists what no run writes: do not use this checkpoint")
    if owners is not None:
        files = manifest["files"].items()
        manifest["files"] = {name: digest for name, digest in files if name == _RECORD or _owner(name) in owners}
    return manifest


def _read_record(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder / _RECORD}: cannot be read ({error})") from None
    if not isinstance(record, dict):
        raise CheckpointError(f"{folder / _RECORD}: holds a {type(record).__name__}, not an object")
    return record


def _is_manifest(manifest: Mapping[str, Any]) -> bool:
    """Whether it has a manifest's form, and names no files but those of its own folder and run."""
    files, run_files = manifest.get("files"), manifest.get("run_files")
    return (
        isinstance(manifest.get("step"), int)
        and isinstance(files, dict)
        and isinstance(run_files, dict)
        and all(_INSIDE.fullmatch(name) and isinstance(digest, str) for name, digest in files.items())
        and all(_HERE.fullmatch(name) and isinstance(size, int) and size >= 0 for name, size in run_files.items())
    )


def _owner(name: str) -> str:
    """Whose state a file holds: it stands in the file's name, or in that of the folder with its shards."""
    return PurePosixPath(name).parts[0].removesuffix(_TENSORS)


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
    fault_point(f"write {path.name}")


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    fault_point(f"write {path.name}")


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def _hash_manifest(manifest: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(manifest, sort_keys=True).encode(), digest_size=16).hexdigest()
