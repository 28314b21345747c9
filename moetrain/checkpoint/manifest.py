"""A checkpoint's manifest: its format, the hash of each file and of itself, and whether they are valid.

Files are of two kinds: tensors (safetensors), by the owner whose state they hold, and one JSON record.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from moetrain.atomic_io import file_hash, sync
from moetrain.fault_injection import fault_point

FORMAT = 2
MANIFEST = "manifest.json"
RECORD = "record.json"
TENSORS = ".safetensors"
_FILE = re.compile(r"\w[\w.-]*", re.ASCII)
_FILE_OR_SHARD = re.compile(rf"({_FILE.pattern}/)?{_FILE.pattern}", re.ASCII)


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and the problem."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint consists of."""

    step: int
    files: dict[str, str]  # hash by name relative to the checkpoint's folder
    run_files: dict[str, int]  # sizes in bytes of the run's growing files, by name relative to the run's folder

    @property
    def owners(self) -> list[str]:
        """Names of those whose states the checkpoint holds, sorted."""
        return sorted({owner_of(name) for name in self.files if name.endswith(TENSORS)})

    def write(self, folder: Path) -> None:
        """Write the manifest to a checkpoint's folder and sync it.

        Raises:
            OSError: it could not be written.
        """
        content = {"format": FORMAT, "step": self.step, "files": self.files, "run_files": self.run_files}
        write_text(folder / MANIFEST, json.dumps(content | {"hash": content_hash(content)}, indent=1))
        sync(folder / MANIFEST)

    @classmethod
    def read(cls, folder: Path, owners: Collection[str] | None = None) -> Manifest:
        """The manifest of a checkpoint; with ``owners``, without the files of others.

        Raises:
            CheckpointError: there is none, it has another format, or it is corrupt.
        """
        try:
            content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(
                f"{folder}: no checkpoint here ({error}): give a folder checkpoints/step_XXXXXXXX"
            ) from None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            found = content.get("format") if isinstance(content, dict) else None
            raise CheckpointError(f"{folder}: format {found}, this version reads {FORMAT}")
        if content.pop("hash", None) != content_hash(content):
            raise CheckpointError(f"{folder / MANIFEST}: corrupt: resume from an earlier checkpoint")
        if not _is_well_formed(content):
            raise CheckpointError(f"{folder / MANIFEST}: lists files that no run writes: do not use this checkpoint")
        manifest = cls(content["step"], content["files"], content["run_files"])
        if owners is None:
            return manifest
        chosen = {n: digest for n, digest in manifest.files.items() if n == RECORD or owner_of(n) in owners}
        return replace(manifest, files=chosen)

    def check_files(self, folder: Path) -> None:
        """Compare every file with its hash.

        Raises:
            CheckpointError: a file is missing or corrupt.
        """
        for name, expected in self.files.items():
            path = folder / name
            if not path.is_file():
                raise CheckpointError(f"{path}: missing: resume from an earlier checkpoint with train.resume=FOLDER")
            if file_hash(path) != expected:
                raise CheckpointError(f"{path}: corrupt: resume from an earlier checkpoint with train.resume=FOLDER")


def owner_of(name: str) -> str:
    """The owner of a tensor file's state: the file's name, or that of the folder with its shards."""
    return PurePosixPath(name).parts[0].removesuffix(TENSORS)


def content_hash(content: Mapping[str, Any]) -> str:
    """The hash of a manifest's content."""
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a text file, with a fault point after it."""
    path.write_text(text, encoding="utf-8")
    fault_point(f"write {path.name}")


def _is_well_formed(content: Mapping[str, Any]) -> bool:
    """Whether it has a manifest's fields, and names only files of its own folder and run."""
    files, run_files = content.get("files"), content.get("run_files")
    return (
        isinstance(content.get("step"), int)
        and isinstance(files, dict)
        and isinstance(run_files, dict)
        and all(_FILE_OR_SHARD.fullmatch(name) and isinstance(digest, str) for name, digest in files.items())
        and all(_FILE.fullmatch(name) and isinstance(size, int) and size >= 0 for name, size in run_files.items())
    )
