"""Documents by domain: where a run's text comes from, under ids that depend on nothing but its content."""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import os
import sys
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from moetrain.config import DataSettings, DomainSettings, expand
from moetrain.data import builtin
from moetrain.data.builtin import MarkedText

BUILTIN_SIZE = 4_000_000
_PLACES_KEPT = 5


class DataError(ValueError):
    """Data that cannot be trained on; the message is one line naming the place and the remedy."""


@dataclass(frozen=True)
class Document:
    """One text of one domain, kept out of training where ``heldout``; ``answer`` are characters, where it marks one."""

    text: str
    id: int
    heldout: bool
    answer: tuple[int, int] | None = None


@dataclass
class DomainReport:
    """What reading a domain found, counted."""

    domain: str
    documents: int = 0
    heldout_documents: int = 0
    text_bytes: int = 0
    duplicates: int = 0
    empty: int = 0
    bad: int = 0
    bad_places: list[str] = field(default_factory=list)

    def note_bad(self, place: str) -> None:
        self.bad += 1
        if len(self.bad_places) < _PLACES_KEPT:
            self.bad_places.append(place)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def document_id(text: str, copy: int = 0) -> int:
    """The 64-bit id of a text, stable over runs, machines and versions; copies of it have ids of their own."""
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8, salt=copy.to_bytes(8, "little"))
    return int.from_bytes(digest.digest(), "little")


def is_heldout(text: str, share: float) -> bool:
    """Whether a text is held out: by a hash of its content alone, so that a copy elsewhere is held out too."""
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8, person=b"held-out").digest()
    return int.from_bytes(digest, "little") < share * 2**64


def source_files(name: str, domain: DomainSettings, root: str) -> list[Path]:
    """The files of a domain that is read from disk, in the order they are read.

    Raises:
        DataError: a path or pattern that matches no file.
    """
    key = f"data.domains.{name}.path"
    patterns = [domain.path] if isinstance(domain.path, str) else list(domain.path or [])
    files: list[Path] = []
    for pattern in patterns:
        full = os.path.join(expand(root, "data.root"), expand(pattern, key))
        found = sorted(glob.glob(full, recursive=True)) if glob.has_magic(full) else [full]
        files.extend(path for path in map(Path, found) if path.is_file())
        if not any(Path(path).is_file() for path in found):
            raise DataError(f"{key}: no file at {full}: correct the path, or data.root it starts from")
    return list(dict.fromkeys(files))


def fingerprint(name: str, domain: DomainSettings, data: DataSettings, seed: int) -> str:
    """A hash that changes whenever the documents of a domain could: of its files' content, or of its generator."""
    digest = hashlib.blake2b(digest_size=16)
    described = domain.model_dump(include={"text_field", "builtin", "size", "repeats", "facts", "shuffled"})
    digest.update(json.dumps([name, described, data.heldout_share], sort_keys=True).encode())
    if domain.shuffled:
        digest.update(f"order {seed}".encode())
    if domain.builtin is not None:
        digest.update(_generator_fingerprint(seed).encode())
    else:
        for path in source_files(name, domain, data.root):
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest())
    return digest.hexdigest()


def _generator_fingerprint(seed: int) -> str:
    """Changes with the built-in domains' own code, the seed, and the Python whose library one of them reads."""
    digest = hashlib.blake2b(f"{seed} {sys.version}".encode(), digest_size=16)
    for path in sorted(Path(builtin.__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def read_documents(
    name: str, domain: DomainSettings, data: DataSettings, seed: int, seen: set[int], report: DomainReport
) -> Iterator[Document]:
    """Yield each distinct, readable document of a domain once.

    Args:
        seen: ids of documents already given, of any domain; grows. A text met twice is dropped and counted.
        report: counts what was found, as it is found.

    Raises:
        DataError: no documents, or a larger share of unreadable lines than ``data.max_bad_share``.
    """
    lines = 0
    for place, found in _texts(name, domain, data, seed):
        lines += 1
        if found is None:
            report.note_bad(place)
            continue
        marked = found if isinstance(found, MarkedText) else None
        text = found.text if isinstance(found, MarkedText) else found
        if not text.strip():
            report.empty += 1
            continue
        try:
            size = len(text.encode("utf-8"))
        except UnicodeEncodeError as error:
            report.note_bad(f"{place}: a lone surrogate at character {error.start}")
            continue
        if domain.size is not None and domain.builtin is None and report.text_bytes + size > domain.size:
            break
        # A text out of order is another document than the same text in order: a run may hold both.
        identity = document_id(text, copy=int(domain.shuffled))
        if identity in seen:
            report.duplicates += 1
            continue
        seen.add(identity)
        heldout = is_heldout(text, data.heldout_share)
        if marked is not None and marked.heldout is not None:
            heldout = marked.heldout  # a planted fact: the domain holds out a share of them up to symmetry
        report.documents += 1
        report.heldout_documents += heldout
        report.text_bytes += size
        yield Document(text, identity, heldout, marked.answer if marked else None)
    if report.bad > data.max_bad_share * max(lines, 1):
        raise DataError(
            f"data.domains.{name}: {report.bad} of {lines} lines cannot be used, first {report.bad_places[0]}: "
            f"mend them, or allow more by data.max_bad_share (now {data.max_bad_share})"
        )
    if report.documents == 0:
        raise DataError(f"data.domains.{name}: no documents in {_source_name(domain)}: give one that holds text")


def _source_name(domain: DomainSettings) -> str:
    return f"builtin {domain.builtin}" if domain.builtin else f"{domain.path}"


def _texts(
    name: str, domain: DomainSettings, data: DataSettings, seed: int
) -> Iterator[tuple[str, str | MarkedText | None]]:
    """(place, text) of each line or document; text None where it cannot be used, the place then saying why."""
    if domain.builtin is not None:
        options = domain.facts.given() if domain.facts is not None else {}
        try:
            texts = builtin.documents(domain.builtin, size=domain.size or BUILTIN_SIZE, seed=seed, **options)
            held_out = builtin.held_out_documents(domain.builtin, seed=seed, **options)
        except ValueError as error:
            raise DataError(f"data.domains.{name}: {error}") from None
        for number, text in enumerate(chain(texts, held_out)):
            yield f"builtin {domain.builtin}, document {number}", text
        return
    for path in source_files(name, domain, data.root):
        yield from _json_lines(path, domain.text_field)


def _json_lines(path: Path, text_field: str) -> Iterator[tuple[str, str | MarkedText | None]]:
    opener = gzip.open if path.suffix == ".gz" else open
    number = 0
    with opener(path, "rb") as file:
        lines = iter(file)
        while True:
            number += 1
            place = f"{path}:{number}"
            try:
                line = next(lines)
            except StopIteration:
                return
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                # What follows cannot be reached: that is not a bad line but a broken file.
                raise DataError(f"{place}: the file ends or breaks here ({error}): fetch it again") from None
            if not line.strip():
                continue
            yield _parse_line(line, place, text_field)


def _parse_line(line: bytes, place: str, text_field: str) -> tuple[str, str | MarkedText | None]:
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        return f"{place}: not JSON ({error})", None
    if not isinstance(record, Mapping):
        return f"{place}: a {type(record).__name__}, not an object", None
    text = record.get(text_field)
    if text is None:
        fields = ", ".join(sorted(map(str, record))) or "none"
        return f"{place}: no field {text_field!r} (fields: {fields}; set text_field)", None
    if not isinstance(text, str):
        return f"{place}: field {text_field!r} is a {type(text).__name__}, not text", None
    # "answer" holds other things too in files found in the wild (the answer itself, a choice's number): a list marks.
    answer = record.get("answer")
    if not isinstance(answer, list):
        return place, text
    if not _is_span(answer, text):
        return f"{place}: answer {answer} marks no characters of the text ({len(text)} long): [start, end)", None
    return place, MarkedText(text, (answer[0], answer[1]))


def _is_span(answer: list[Any], text: str) -> bool:
    return len(answer) == 2 and all(type(place) is int for place in answer) and 0 <= answer[0] < answer[1] <= len(text)
