"""Hashes of file contents. Those of large files are cached until the file system reports a change."""

from __future__ import annotations

import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path

from moetrain.atomic_io import file_hash
from moetrain.data.errors import cannot_read

LARGE = 2**26
"""Bytes from which the hash of a file is cached. Smaller files are fast to read again."""

_SETTLED = 2 * 10**9  # nanoseconds; a change within this time before hashing may have the same time as a later one


def content_digest(path: Path, cache: Path) -> str:
    """A hash of the content of a file.

    The hash of a large file is cached in ``cache``. It is valid as long as size, inode, mtime and ctime of the file
    are unchanged; a program that edits the file cannot set ctime back.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        before = _state(path)
        cached = cache / "digests" / f"{hashlib.blake2b(os.fsencode(path.absolute()), digest_size=10).hexdigest()}.json"
        if before["size"] >= LARGE:
            with suppress(OSError, ValueError, KeyError, TypeError):
                record = json.loads(cached.read_text())
                if record["state"] == before:
                    return str(record["digest"])
        now = time.time_ns()
        digest = file_hash(path)
        settled = now - max(before["modified"], before["changed"]) > _SETTLED
        if before["size"] >= LARGE and settled and _state(path) == before:
            with suppress(OSError):  # a read-only cache
                cached.parent.mkdir(parents=True, exist_ok=True)
                partial = cached.with_name(f"{cached.name}.{os.getpid()}")
                partial.write_text(json.dumps({"path": str(path), "state": before, "digest": digest}))
                os.replace(partial, cached)
        return digest
    except OSError as error:
        raise cannot_read(path, error) from None


def _state(path: Path) -> dict[str, int]:
    stat = path.stat()
    return {"size": stat.st_size, "inode": stat.st_ino, "modified": stat.st_mtime_ns, "changed": stat.st_ctime_ns}
