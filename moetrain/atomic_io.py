"""Files that survive whatever ends the process: whole or absent, or growing by whole records."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from moetrain.fault_injection import fault_point

BESIDE = ".partial"
"""What the name of a file or folder ends in while it is being made; one that a killed process left may be removed."""


def write_atomically(path: Path, write: Callable[[Path], object]) -> Path:
    """Have ``write`` make a file beside ``path``, make it durable and put it in its place.

    Raises:
        OSError: nothing was kept, for instance on a full disk; what stood in its place before still stands.
    """
    beside = path.with_name(path.name + BESIDE)
    try:
        write(beside)
        fault_point(f"write {path.name}")
        sync(beside)
        beside.replace(path)
        fault_point(f"rename {path.name}")
        sync(path.parent)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    return path


def write_file(path: Path, content: str | bytes) -> Path:
    """`write_atomically` of a text or of bytes."""
    data = content.encode() if isinstance(content, str) else content
    return write_atomically(path, lambda beside: beside.write_bytes(data))


def sync(path: Path) -> None:
    """Make a file's content, or a folder's entries, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    fault_point(f"sync {path.name}")


def file_hash(path: Path) -> str:
    """A file's content in 16 bytes of BLAKE2b, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


class AppendOnlyFile:
    """A file that grows by whole records; what the disk has no room for waits in memory until it has.

    Records are given in order and stand in order; none is ever torn while the process lives.
    """

    def __init__(self, path: Path) -> None:
        path.touch()
        self.path = path
        self.size = path.stat().st_size  # bytes on disk, all of whole records
        self._waiting: list[bytes] = []

    def add(self, record: bytes) -> None:
        """Take a record in; it is in the file after the next `write` that succeeds."""
        self._waiting.append(record)

    def write(self, durable: bool = False) -> None:
        """Write what waits; with ``durable``, all of the file is safe from a failure of the machine as well.

        Raises:
            OSError: there is no room, and it still waits; or the file is not durable.
        """
        if self._waiting:
            content = memoryview(b"".join(self._waiting))
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
            self._waiting.clear()
        if durable:
            sync(self.path)

    def cut(self, size: int) -> None:
        """Take back what was written beyond ``size`` bytes, and what waits."""
        self._waiting.clear()
        os.truncate(self.path, size)
        self.size = size
