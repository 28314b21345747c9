"""Files at URLs (s3://, hf://, https://, ...), through `fsspec`: fetched once into the cache, then read there."""

from __future__ import annotations

import fcntl
import glob
import json
import posixpath
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

from moetrain.atomic_io import write_atomically
from moetrain.data.errors import DataError
from moetrain.data.sources.files import HIDDEN, Listing, chosen_files, kind_of, unread_name

_VERSION = (
    "size",
    "ETag",
    "etag",
    "blob_id",
    "oid",
    "md5Hash",
    "generation",
    "LastModified",
    "mtime",
    "modified",
    "created",
)
"""What file systems say about a file that changes with its content."""


class _Remote(NamedTuple):
    """A file as its system lists it; ``name`` is its path there."""

    name: str
    info: dict[str, Any]

    @property
    def path(self) -> Path:
        """The name as a relative path, without protocol and query."""
        _, protocol, rest = self.name.partition("://")
        return Path((rest.partition("?")[0] if protocol else self.name).lstrip("/"))


def is_url(pattern: str) -> bool:
    return "://" in pattern


def fetch_files(url: str, key: str, cache: Path) -> Listing:
    """The files of a URL, folder or pattern, as `moetrain.data.sources.files.list_files` gives those on disk.

    They are kept below ``cache``, under their version: a file that has changed is fetched again.

    Raises:
        DataError: no file, a package is missing, or the files cannot be listed or fetched; begins with ``key``.
    """
    with _one_line(url, key):
        import fsspec

        system, path = fsspec.core.url_to_fs(url)
        found = _listed(system, path)
    left_out: defaultdict[str, list[Path]] = defaultdict(list)
    start = _folder(path)
    left_out[HIDDEN] = [each.path for each in found if _is_hidden(each.name, start)]
    sizes = {each.path: each.info.get("size") or 0 for each in found if not _is_hidden(each.name, start)}
    if len(found) == 1 and found[0].name == path:
        if kind_of(found[0].path) is None:
            raise DataError(f"{key}: {unread_name(found[0].path)}")
        chosen = set(sizes)
    else:
        chosen = set(chosen_files(sizes, left_out, f"{key}: {url}"))
    listing = Listing([], {reason: names for reason, names in left_out.items() if names})
    if not chosen:
        why = f" can be read: {', '.join(listing.left_out_lines())}" if listing.left_out else ""
        raise DataError(f"{key}: no file at {url}{why}: correct the URL, or give another")
    with _locked(cache):
        for each in found:
            if each.path in chosen:
                listing.files.append(_fetched(system, url.partition("://")[0], each, key, cache))
    return listing


def _listed(system: Any, path: str) -> list[_Remote]:
    if glob.has_magic(path) and not system.exists(path):
        found: dict[str, dict[str, Any]] = {}
        for name, info in sorted(system.glob(path, detail=True).items()):
            if info.get("type") == "directory":
                found |= system.find(name, detail=True)
            else:
                found[name] = info
    elif system.isdir(path):
        found = system.find(path, detail=True)
    else:
        found = {path: system.info(path)}
    return [_Remote(name, info) for name, info in sorted(found.items()) if info.get("type") != "directory"]


def _folder(pattern: str) -> str:
    """Where the files of a pattern lie; a name without signs of patterns itself."""
    while glob.has_magic(pattern):
        pattern = posixpath.dirname(pattern)
    return pattern


def _is_hidden(name: str, folder: str) -> bool:
    """Whether a part of a name below the folder begins with a dot."""
    return any(part.startswith(".") for part in name.removeprefix(folder).split("/"))


def _fetched(system: Any, protocol: str, remote: _Remote, key: str, cache: Path) -> Path:
    """The local copy of a file, whose path ends like its URL."""
    version = {name: str(remote.info[name]) for name in _VERSION if remote.info.get(name) is not None}
    place = json.dumps([protocol, remote.name, version], sort_keys=True)
    local = cache / "remote" / blake2b(place.encode(), digest_size=8).hexdigest() / protocol / remote.path
    if local.is_file():
        return local
    local.parent.mkdir(parents=True, exist_ok=True)
    with _one_line(remote.name, key):
        write_atomically(local, lambda partial: system.get_file(remote.name, str(partial)))
    size, fetched = remote.info.get("size"), local.stat().st_size
    if size not in (None, fetched):
        local.unlink()
        raise DataError(f"{key}: {remote.name}: {fetched} of {size} bytes were fetched: run the command again")
    return local


@contextmanager
def _locked(cache: Path) -> Iterator[None]:
    """One process at a time, so that ranks do not fetch the same file beside each other."""
    (cache / "remote").mkdir(parents=True, exist_ok=True)
    with open(cache / "remote" / "fetching.lock", "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _one_line(place: str, key: str) -> Iterator[None]:
    """Raise a DataError of one line in place of whatever a file system of fsspec raises."""
    try:
        yield
    except DataError:
        raise
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{key}: {place}: {reason}: pip install 'moetrain[remote]', or the package it names") from None
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        remedy = "correct the URL"
        if isinstance(error, PermissionError) or any(
            word in reason for word in ("403", "401", "denied", "credentials")
        ):
            remedy = "give the rights to read it, through the environment of its file system, or correct the URL"
        raise DataError(f"{key}: {place} cannot be read: {type(error).__name__}: {reason}: {remedy}") from None
