"""Checkpoints: each is either complete or absent.

One is written to a partial folder, synced and renamed. Its manifest holds the hash of each file and the sizes that the
run's growing files (events, TensorBoard) had: resuming cuts those back, so that a resumed run continues each file where
an uninterrupted one would.

A checkpoint contains no code: tensors are safetensors, all else is JSON. A sharded state is a folder with a file from
each rank.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from moetrain.atomic_io import PARTIAL, file_hash, sync
from moetrain.checkpoint.manifest import MANIFEST, RECORD, TENSORS, CheckpointError, Manifest, write_text
from moetrain.checkpoint.sharded_tensors import (
    fill_from_shards,
    is_sharded,
    read_shards,
    save_shards,
    shard_names,
)
from moetrain.distributed.mesh import ParallelLayout
from moetrain.distributed.sharding import copy_unsharded
from moetrain.fault_injection import fault_point

_FOLDERS = "step_" + "[0-9]" * 8
_ONE_RANK = ParallelLayout()

State = Mapping[str, torch.Tensor]


class States(Mapping[str, dict[str, torch.Tensor]]):
    """The tensors of a checkpoint by owner, each owner's read on access."""

    def __init__(self, folder: Path, owners: Sequence[str]) -> None:
        self._folder = folder
        self._owners = owners

    def __getitem__(self, owner: str) -> dict[str, torch.Tensor]:
        """All of an owner's tensors, unsharded, on the CPU."""
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
        """Copy an owner's tensors into given ones, sharded or not, in place. A collective: all ranks must call it.

        Raises:
            CheckpointError: the checkpoint holds tensors of other names.
        """
        for name in sorted(tensors.keys() ^ self.names(owner)):
            has = "has no" if name in tensors else "has a"
            raise CheckpointError(f"{self._folder}: its {owner} {has} {name}, unlike this run's")
        if self._in_shards(owner):
            fill_from_shards(self._folder / owner, tensors)
            return
        with safe_open(self._file(owner), framework="pt") as file:
            for name, tensor in tensors.items():
                copy_unsharded(tensor, file.get_tensor(name))

    def _file(self, owner: str) -> Path:
        return self._folder / (owner + TENSORS)

    def _in_shards(self, owner: str) -> bool:
        return (self._folder / owner).is_dir()


@dataclass(frozen=True)
class Checkpoint:
    """A valid checkpoint: its tensors, and a JSON record."""

    step: int
    states: States
    record: dict[str, Any]
    run_files: dict[str, int]


def checkpoint_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08d}"


def list_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first; their content is not checked."""
    found = (run / "checkpoints").glob(_FOLDERS)
    return sorted(path for path in found if (path / MANIFEST).is_file())


def save_checkpoint(
    run: Path,
    step: int,
    states: Mapping[str, State],
    record: Mapping[str, Any],
    run_files: Mapping[str, int],
    layout: ParallelLayout = _ONE_RANK,
) -> Path:
    """Write the checkpoint of a step to its folder in the run, as `write_checkpoint` does; returns the folder."""
    return write_checkpoint(checkpoint_folder(run, step), step, states, record, run_files, layout)


def write_checkpoint(
    final: Path,
    step: int,
    states: Mapping[str, State],
    record: Mapping[str, Any],
    run_files: Mapping[str, int],
    layout: ParallelLayout = _ONE_RANK,
) -> Path:
    """Write a checkpoint to a new folder ``final``; returns the folder.

    The main rank calls this. Where states are sharded, the other ranks write their shards in `help_write`.

    Args:
        states: tensors by owner.
        record: JSON.
        run_files: sizes in bytes of the run's growing files, by name relative to the run's folder.

    Raises:
        OSError: nothing was written, for instance on a full disk; earlier checkpoints are untouched.
    """
    place = final.with_name(final.name + PARTIAL)
    for abandoned in final.parent.glob("*" + PARTIAL):  # by a process that was killed
        shutil.rmtree(abandoned)
    place.mkdir(parents=True)
    try:
        files: dict[str, str] = {}
        for owner, state in states.items():
            if is_sharded(state):
                (place / owner).mkdir()
                layout.broadcast_object(place / owner)  # what `help_write` waits for
                shards = save_shards(place / owner, state, layout)
                files |= {f"{owner}/{name}": digest for name, digest in shards.items()}
                sync(place / owner)
            else:
                _save_tensors(state, place / (owner + TENSORS))
        write_text(place / RECORD, json.dumps(record, indent=1))
        for path in sorted(path for path in place.iterdir() if path.is_file()):
            sync(path)
            files[path.name] = file_hash(path)
        Manifest(step, files, dict(run_files)).write(place)
        sync(place)
        place = place.rename(final)
        fault_point("rename checkpoint")
        sync(final.parent)
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise
    return final


def help_write(states: Mapping[str, State], layout: ParallelLayout) -> None:
    """Write this rank's shards of the checkpoint that the main rank writes, until that calls `end_write`."""
    while (folder := layout.broadcast_object(None)) is not None:
        with suppress(OSError), layout.progress.busy():  # the main rank raises it too, and discards the checkpoint
            save_shards(folder, states[folder.name], layout)


def end_write(layout: ParallelLayout) -> None:
    """The main rank has written a checkpoint, or failed to: release the others from `help_write`."""
    layout.broadcast_object(None)


def prune_checkpoints(run: Path, keep: int, keep_every: int | None) -> None:
    """Remove a run's checkpoints but for the newest ``keep`` and those of steps that are multiples of ``keep_every``.

    Raises:
        OSError: one could not be removed.
    """
    for old in list_checkpoints(run)[:-keep]:
        if keep_every is None or _step(old) % keep_every:
            removed = old.rename(old.with_name(old.name + PARTIAL))
            fault_point("rename pruned checkpoint")
            shutil.rmtree(removed)
            fault_point("remove pruned checkpoint")


def move_superseded(run: Path, step: int) -> None:
    """Move checkpoints after a step, which a run resumed from that step will write anew, to ``superseded/``.

    The newest goes first, and all go before any of the run's files is cut: wherever this is interrupted, the newest
    remaining checkpoint is valid.
    """
    for folder in sorted((run / "checkpoints").glob(_FOLDERS), reverse=True):
        if _step(folder) > step:
            superseded = run / "checkpoints" / "superseded" / folder.name
            superseded.parent.mkdir(exist_ok=True)
            shutil.rmtree(superseded, ignore_errors=True)
            folder.rename(superseded)
            fault_point("rename superseded checkpoint")


def load_checkpoint(folder: Path, owners: Collection[str] | None = None, verify: bool = True) -> Checkpoint:
    """A checkpoint, each file compared with its hash.

    Args:
        owners: whose states to load; None: all. The files of others are neither read nor checked.
        verify: False for one that was just checked.

    Raises:
        CheckpointError: no checkpoint, one of another format, or a file that is missing or corrupt.
    """
    manifest = Manifest.read(folder, owners)
    if verify:
        manifest.check_files(folder)
    return Checkpoint(manifest.step, States(folder, manifest.owners), _read_record(folder), manifest.run_files)


def newest_valid(run: Path, owners: Collection[str] | None = None) -> tuple[Path, list[str]]:
    """The folder of a run's newest valid checkpoint, and a line about each newer one that is corrupt.

    With ``owners``, only their states are checked.

    Raises:
        CheckpointError: none is valid.
    """
    problems: list[str] = []
    for folder in reversed(list_checkpoints(run)):
        try:
            Manifest.read(folder, owners).check_files(folder)
            return folder, problems
        except CheckpointError as error:
            problems.append(str(error))
    raise CheckpointError("; ".join(problems) or f"{run}: holds no checkpoint")


def _read_record(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder / RECORD}: cannot be read ({error})") from None
    if not isinstance(record, dict):
        raise CheckpointError(f"{folder / RECORD}: holds a {type(record).__name__}, not an object")
    return record


def _save_tensors(state: State, path: Path) -> None:
    """Write tensors; a tensor with two names (tied embeddings) is written twice."""
    unshared: dict[str, torch.Tensor] = {}
    pointers: set[int] = set()
    for key, value in state.items():
        tensor = value.detach().cpu().contiguous()
        unshared[key] = tensor.clone() if tensor.data_ptr() in pointers else tensor
        pointers.add(tensor.data_ptr())
    try:
        save_file(unshared, path)
    except SafetensorError as error:  # it wraps the system's errors, such as a full disk
        raise OSError(f"{path.name} could not be written: {error}") from None
    fault_point(f"write {path.name}")


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))
