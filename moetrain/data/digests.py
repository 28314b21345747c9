"""The hash of a file's content; that of a large one is kept, as long as the file system says that it is the same."""

from __future__ import annotations

import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path

from moetrain.data.errors import DataError

LARGE = 2**26
"""Bytes from which a file's hash is kept: below, reading it again takes a moment."""

_SETTLED = 2 * 10**9  # nanoseconds; a change so soon before hashing may share its time with one after it


def content_digest(path: Path, cache: Path) -> str:
    """A hash of a file's content.

    Of a large file it is taken from ``cache`` where size, inode and the times of its last changes are still those that
    it was hashed with. The time of the last change of an inode cannot be set back by a program that edits the file.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        before = _state(path)
        kept = cache / "digests" / f"{hashlib.blake2b(os.fsencode(path.absolute()), digest_size=10).hexdigest()}.json"
        if before["size"] >= LARGE:
            with suppress(OSError, ValueError, KeyError, TypeError):
                record = json.loads(kept.read_text())
                if record["state"] == before:
                    return str(record["digest"])
        now = time.time_ns()
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        settled = now - max(before["modified"], before["changed"]) > _SETTLED
        if before["size"] >= LARGE and settled and _state(path) == before:
            with suppress(OSError):  # a cache that can only be read
                kept.parent.mkdir(parents=True, exist_ok=True)
                beside = kept.with_name(f"{kept.name}.{os.getpid()}")
                beside.write_text(json.dumps({"path": str(path), "state": before, "digest": digest}))
                os.replace(beside, kept)
        return digest
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}): restore it") from None


def _state(path: Path) -> dict[str, int]:
    stat = path.stat()
    return {"size": stat.st_size, "inode": stat.st_ino, "modified": stat.st_mtime_ns, "changed": stat.st_ctime_ns}
