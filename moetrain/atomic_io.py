"""Files that survive a crash: written atomically, or appended to by complete records."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from moetrain.fault_injection import fault_point

PARTIAL = ".partial"
"""Suffix of a file or folder while it is being written. One that a killed process left may be removed."""


def write_atomically(path: Path, write: Callable[[Path], object]) -> Path:
    """Have ``write`` write a partial file, sync it and rename it to ``path``; returns ``path``.

    Raises:
        OSError: nothing was written, for instance on a full disk; an earlier file at ``path`` is untouched.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        write(partial)
        fault_point(f"write {path.name}")
        sync(partial)
        partial.replace(path)
        fault_point(f"rename {path.name}")
        sync(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return path


def write_file(path: Path, content: str | bytes) -> Path:
    """Write text or bytes with `write_atomically`; returns ``path``."""
    data = content.encode() if isinstance(content, str) else content
    return write_atomically(path, lambda partial: partial.write_bytes(data))


def refuse_existing(folder: Path) -> None:
    """Raise FileExistsError if there is something to overwrite."""
    if folder.exists():
        raise FileExistsError(f"{folder} exists, and nothing is overwritten: give a new folder")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A partial folder to write files to. It is renamed to ``folder`` at the end, or removed after an exception.

    Raises:
        OSError: ``folder`` exists already, or cannot be written.
    """
    refuse_existing(folder)
    partial = folder.with_name(folder.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def sync(path: Path) -> None:
    """fsync a file, or a folder's entries."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    fault_point(f"sync {path.name}")


def file_hash(path: Path) -> str:
    """The hash of a file's content: 16 bytes of BLAKE2b, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


class AppendOnlyFile:
    """A file that grows by complete records, in order. Records that a full disk rejects stay buffered in memory.

    No record is ever torn while the process lives.
    """

    def __init__(self, path: Path) -> None:
        path.touch()
        self.path = path
        self.size = path.stat().st_size  # bytes on disk, all of complete records
        self._buffered: list[bytes] = []

    def add(self, record: bytes) -> None:
        """Buffer a record; the next `write` that succeeds appends it."""
        self._buffered.append(record)

    def write(self, durable: bool = False) -> None:
        """Append the buffered records; with ``durable``, sync the file too.

        Raises:
            OSError: they could not be written and stay buffered, or the file could not be synced.
        """
        if self._buffered:
            content = memoryview(b"".join(self._buffered))
            size = self.size + len(content)
            try:
                with open(self.path, "ab", buffering=0) as file:
                    while content:
                        content = content[file.write(content) or 0 :]
                fault_point(f"write {self.path.name}")
            except OSError:
                os.truncate(self.path, self.size)
                raise
            self.size = size
            self._buffered.clear()
        if durable:
            sync(self.path)

    def cut(self, size: int) -> None:
        """Truncate the file to ``size`` bytes and discard buffered records."""
        self._buffered.clear()
        os.truncate(self.path, size)
        self.size = size
