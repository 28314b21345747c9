"""The source of a domain: its files, their parts for workers, and a fingerprint of their content."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from moetrain.config import DataSettings, DomainSettings, expand
from moetrain.data import builtin
from moetrain.data.digests import content_digest
from moetrain.data.errors import DataError, cannot_read
from moetrain.data.sources import hub, remote
from moetrain.data.sources.files import Listing, kind_of, list_files
from moetrain.data.sources.opening import COMPRESSIONS
from moetrain.data.sources.tokens.files import described_by, list_token_files

PORTION_BYTES = 4 * 2**20


@dataclass(frozen=True)
class SourceFile:
    """The state of a file when the run began; a change before it has been read is an error."""

    path: Path
    size: int
    changed: int  # time of the last modification, in nanoseconds

    @classmethod
    def at(cls, path: Path) -> SourceFile:
        try:
            stat = path.stat()
        except OSError as error:
            raise cannot_read(path, error) from None
        return cls(path, stat.st_size, stat.st_mtime_ns)

    def check(self) -> None:
        """Raise DataError if the file has changed."""
        if SourceFile.at(self.path) != self:
            raise DataError(f"{self.path}: changed while it was read: run again once nothing writes it")


class Place(NamedTuple):
    """Where to resume reading a portion."""

    file: int = 0  # of the portion
    rows: int = 0  # of that file to skip


@dataclass(frozen=True)
class Portion:
    """A part of a domain's source that one worker reads: some of its files, or all of the source."""

    domain: str
    number: int
    files: tuple[SourceFile, ...] = ()

    @property
    def size(self) -> int:
        """Bytes on disk; 0 if the source has no files."""
        return sum(file.size for file in self.files)


def source_files(name: str, domain: DomainSettings, data: DataSettings) -> list[Path]:
    """The files of a domain that is read from disk, in the order they are read.

    Raises:
        DataError: a path or pattern matches no file that can be read.
    """
    listings = _listings(name, domain, data)
    return list(dict.fromkeys(path for listing in listings for path in listing.files))


def _listings(name: str, domain: DomainSettings, data: DataSettings) -> list[Listing]:
    key = f"data.domains.{name}.{'path' if domain.tokens is None else 'tokens'}"
    start = expand(data.root, "data.root")
    listings = []
    for pattern in domain.paths:
        expanded = expand(pattern, key)
        place = expanded if remote.is_url(expanded) else os.path.join(start, expanded)
        if domain.tokens is not None:
            listings.append(list_token_files(place, key, domain.format))
        elif remote.is_url(place):
            listings.append(remote.fetch_files(place, key, Path(expand(data.cache_dir, "data.cache_dir"))))
        else:
            listings.append(list_files(place, key))
    return listings


def left_out(name: str, domain: DomainSettings, data: DataSettings) -> Listing:
    """What the domain's path, pattern or local data set holds but is not read.

    Raises:
        DataError: as `source_files`, or a local data set cannot be loaded.
    """
    found = Listing([], {})
    if domain.paths:
        listings = _listings(name, domain, data)
        read = {path for listing in listings for path in listing.files}
        for listing in listings:
            for reason, paths in listing.left_out.items():
                known = found.left_out.setdefault(reason, [])
                known.extend(path for path in paths if path not in read and path not in known)
    elif domain.hub is not None and (paths := hub.left_out(name, domain, data.root)):
        found.left_out["in no split of it"] = paths
    return found


def portions(name: str, domain: DomainSettings, data: DataSettings) -> list[Portion]:
    """The source of a domain in reading order, split between files so that several workers can read it.

    Small files are grouped. A domain with a ``size`` or ``limit`` is one portion, because where it ends depends on
    all documents before.
    """
    if not domain.paths:
        return [Portion(name, 0)]
    files = [SourceFile.at(path) for path in source_files(name, domain, data)]
    if domain.size is not None or domain.limit is not None:
        return [Portion(name, 0, tuple(files))]
    groups: list[list[SourceFile]] = [[]]
    for file in files:
        if groups[-1] and sum(other.size for other in groups[-1]) + file.size > PORTION_BYTES:
            groups.append([])
        groups[-1].append(file)
    return [Portion(name, number, tuple(group)) for number, group in enumerate(groups)]


def fingerprint(name: str, domain: DomainSettings, data: DataSettings, seed: int) -> str:
    """A hash that changes whenever the documents of a domain may change: of its files' content, or of its generator."""
    digest = hashlib.blake2b(digest_size=16)
    kept = {"text_field", "filter", "limit", "builtin", "hub_config", "split", "size", "repeats", "facts", "shuffled"}
    described = domain.model_dump(include=kept) | {"repeats": domain.copies}
    if domain.by is not None:
        described |= {"by": domain.by, "value": domain.value}
    digest.update(json.dumps([name, described, data.heldout_share], sort_keys=True).encode())
    if domain.shuffled:
        digest.update(f"order {seed}".encode())
    if domain.builtin is not None:
        digest.update(f"{seed} {builtin.generator_fingerprint(domain.builtin)}".encode())
        return digest.hexdigest()
    if domain.tokens is not None:
        read = ("format", "dtype", "column", "concatenated")
        digest.update(json.dumps([getattr(domain, key) for key in read]).encode())
        files = [
            each for path in source_files(name, domain, data) for each in (path, *described_by(path, domain.format))
        ]
        names = [f"tokens {path.suffix}" for path in files]
    elif domain.path is not None:
        files = source_files(name, domain, data)
        names = [_how_read(path) for path in files]
    else:
        digest.update(_WITH_ANSWERS.encode())
        folder = hub.local_folder(name, domain, data.root)
        if folder is None:
            digest.update(f"{domain.hub} {hub.revision(name, domain, data.root)}".encode())
            return digest.hexdigest()
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        names = [str(path.relative_to(folder)) for path in files]  # names also decide about splits
    cache = Path(expand(data.cache_dir, "data.cache_dir"))
    with ThreadPoolExecutor() as pool:  # hashing releases the GIL
        for file_name, content in zip(names, pool.map(lambda path: content_digest(path, cache), files), strict=True):
            digest.update(f"{file_name}\0{content}\n".encode())
    return digest.hexdigest()


_WITH_ANSWERS = " with answers"
"""Marks what was prepared since marked answers are read from tables too."""


def _how_read(path: Path) -> str:
    kind = kind_of(path)
    if kind in ("parquet", "arrow"):
        return f"{kind}{_WITH_ANSWERS}"
    return f"{kind}{path.suffix if path.suffix in COMPRESSIONS[1:] else path.suffix == '.gz'}"
