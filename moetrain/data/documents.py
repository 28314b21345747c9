"""Documents of a domain: read from its source, each with an id that depends on its content only."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from itertools import chain, islice
from typing import Any

import numpy as np

from moetrain.config import DataSettings, DomainSettings
from moetrain.data import builtin
from moetrain.data.builtin import MarkedText
from moetrain.data.dedup import SeenIds
from moetrain.data.errors import DataError as DataError
from moetrain.data.portions import Place, Portion, left_out, portions
from moetrain.data.sources import Row, Wanted, hub, read_file
from moetrain.data.sources.tokens import read_tokens
from moetrain.data.tokenizer_base import Tokenizer

BUILTIN_SIZE = 4_000_000
_MAX_BAD_PLACES = 5


@dataclass(frozen=True)
class Document:
    """A text of a domain, or its ids if the source holds those.

    Attributes:
        text_bytes: size of the text, also where only its ids are known.
        answer: the range of characters that the text marks as its answer, if any.
        tokens: ids without marks, as the file holds them.
    """

    text: str | None
    id: int
    heldout: bool
    text_bytes: int
    answer: tuple[int, int] | None = None
    tokens: np.ndarray | None = None


@dataclass
class DomainReport:
    """Counts of what reading a domain found, and of what it left out."""

    domain: str
    rows: int = 0
    documents: int = 0
    heldout_documents: int = 0
    text_bytes: int = 0
    duplicates: int = 0
    empty: int = 0
    filtered: int = 0
    bad: int = 0
    bad_places: list[str] = field(default_factory=list)
    left_out: int = 0  # files and folders that a path, pattern or local data set holds but that are not read
    left_out_files: list[str] = field(default_factory=list)  # of each reason a line, with the first of them

    def note_bad(self, place: str) -> None:
        self.bad += 1
        if len(self.bad_places) < _MAX_BAD_PLACES:
            self.bad_places.append(place)

    def add(self, other: DomainReport) -> None:
        """Add the counts of a later part of the source."""
        for each in fields(self):
            if each.name not in ("domain", "bad_places", "left_out", "left_out_files"):
                setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))
        self.bad_places = (self.bad_places + other.bad_places)[:_MAX_BAD_PLACES]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def document_id(content: str | np.ndarray, copy: int = 0) -> int:
    """The 64-bit id of a text or of token ids, the same in all runs, versions and machines; each copy has its own."""
    digest = hashlib.blake2b(_as_bytes(content), digest_size=8, salt=copy.to_bytes(8, "little"))
    return int.from_bytes(digest.digest(), "little")


def is_heldout(content: str | np.ndarray, share: float) -> bool:
    """Whether a document is held out: by a hash of its content only, so that copies elsewhere are held out too."""
    digest = hashlib.blake2b(_as_bytes(content), digest_size=8, person=b"held-out").digest()
    return int.from_bytes(digest, "little") < share * 2**64


def _as_bytes(content: str | np.ndarray) -> bytes:
    """Text as UTF-8; token ids as 32-bit numbers, whatever their type in the file, after a byte that no text holds."""
    return content.encode("utf-8") if isinstance(content, str) else b"\xff" + content.astype("<u4").tobytes()


def note_left_out(report: DomainReport, domain: DomainSettings, data: DataSettings) -> None:
    """Count and name in a report what the domain's path, pattern or local data set holds but is not read.

    Raises:
        DataError: as `moetrain.data.portions.left_out`.
    """
    found = left_out(report.domain, domain, data)
    report.left_out = sum(map(len, found.left_out.values()))
    report.left_out_files = found.left_out_lines()


def read_documents(
    name: str,
    domain: DomainSettings,
    data: DataSettings,
    seed: int,
    seen: SeenIds | set[int],
    report: DomainReport,
    tokenizer: Tokenizer | None = None,
) -> Iterator[Document]:
    """Yield each distinct, readable document of a domain once, in the order of its source.

    Args:
        seen: ids of the documents yielded so far, of all domains; is extended. Duplicates are dropped and counted.
        report: is updated as documents are read.
        tokenizer: the run's; needed where the source holds token ids.

    Raises:
        DataError: no documents, or a larger share of unusable rows than ``data.max_bad_share``.
    """
    note_left_out(report, domain, data)
    for portion in portions(name, domain, data):
        yield from PortionReader(portion, domain, data, seed, seen, report, tokenizer=tokenizer)
    check_report(report, domain, data)


def check_report(report: DomainReport, domain: DomainSettings, data: DataSettings) -> None:
    """Raise DataError if a domain has no documents or too large a share of unusable rows."""
    key = f"data.domains.{report.domain}"
    if report.bad > data.max_bad_share * max(report.rows, 1):
        remedy = f"correct them, or allow more by data.max_bad_share (now {data.max_bad_share})"
        if report.bad == report.rows:
            remedy = f"correct them, or leave out files that hold something else ({key})"
        raise DataError(
            f"{key}: {report.bad} of {report.rows} lines cannot be used, first {report.bad_places[0]}: {remedy}"
        )
    if report.documents == 0:
        why, remedy = "", "give one that holds text"
        if report.filtered:
            why, remedy = f", whose {report.filtered} rows the filter drops", "correct the filter"
        elif report.duplicates:
            why, remedy = ", as earlier domains hold all of them", "leave this domain out, or give another"
        raise DataError(f"{key}: no documents in {_source_name(domain)}{why}: {remedy}")


def _source_name(domain: DomainSettings) -> str:
    if domain.builtin is not None:
        return f"builtin {domain.builtin}"
    return f"hub {domain.hub}" if domain.hub is not None else f"{domain.path or domain.tokens}"


class PortionReader:
    """Iterates over the distinct documents of a portion; ``place`` is where to resume after the last one.

    Args:
        seen: ids of the documents yielded so far; is extended.
        report: is updated as documents are read; may be replaced between two documents.
        start: the ``place`` of an earlier reader.
        before: what earlier readers have read; counts towards the domain's ``size`` and ``limit``.
        tokenizer: the run's; needed where the source holds token ids.
    """

    def __init__(
        self,
        portion: Portion,
        domain: DomainSettings,
        data: DataSettings,
        seed: int,
        seen: SeenIds | set[int],
        report: DomainReport,
        start: Place = Place(),  # noqa: B008
        before: DomainReport | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        self.place = start
        self.bytes_read = 0  # of the portion's size on disk
        self._portion, self._domain, self._data, self._seed = portion, domain, data, seed
        self._seen, self.report, self._before = seen, report, before or DomainReport(portion.domain)
        self._tokenizer = tokenizer

    def __iter__(self) -> Iterator[Document]:
        limit = self._domain.limit
        for row in self.rows():
            report = self.report  # the writer of shards replaces it for each shard
            report.rows += 1
            if row.elsewhere:
                continue
            content = row.content
            if content is None:
                if row.problem is None:
                    report.filtered += 1
                else:
                    report.note_bad(f"{row.place}: {row.problem}")
                continue
            if row.is_empty:
                report.empty += 1
                continue
            try:
                size = self._text_bytes(content)
            except UnicodeEncodeError as error:
                report.note_bad(f"{row.place}: a lone surrogate at character {error.start}")
                continue
            # A run may hold a text both in order and shuffled: these are two documents.
            identity = document_id(content, copy=int(self._domain.shuffled))
            if identity in self._seen:
                report.duplicates += 1
                continue
            if self._exceeds_settings(size):
                return
            self._seen.add(identity)
            heldout = is_heldout(content, self._data.heldout_share) if row.heldout is None else row.heldout
            report.documents += 1
            report.heldout_documents += heldout
            report.text_bytes += size
            yield Document(row.text, identity, heldout, size, row.answer, row.tokens)
            if limit is not None and self.report.documents + self._before.documents >= limit:
                return

    def _text_bytes(self, content: str | np.ndarray) -> int:
        if isinstance(content, str):
            return len(content.encode("utf-8"))
        assert self._tokenizer is not None
        return self._tokenizer.text_bytes(content)

    def _exceeds_settings(self, size: int) -> bool:
        """Whether one more document of that size would exceed the domain's ``size`` or ``limit``."""
        domain, taken = self._domain, self.report.text_bytes + self._before.text_bytes
        if domain.limit is not None and self.report.documents + self._before.documents >= domain.limit:
            return True
        return domain.size is not None and domain.builtin is None and taken + size > domain.size

    def rows(self) -> Iterator[Row]:
        """All rows of the portion, with those that are no documents."""
        start = self.place.rows
        if self._domain.builtin is not None:
            yield from self._tracked(0, 0, islice(self._generated(), start, None))
        elif self._domain.hub is not None:
            yield from self._tracked(0, 0, hub.read(self._portion.domain, self._domain, self._data.root, start))
        else:
            domain = self._domain
            wanted = Wanted.of(domain.text_field, domain.filter, domain.by, domain.value)
            for number in range(self.place.file, len(self._portion.files)):
                source = self._portion.files[number]
                bytes_before = sum(other.size for other in self._portion.files[:number])
                source.check()
                if domain.tokens is None:
                    rows = read_file(source.path, wanted, start)
                else:
                    assert self._tokenizer is not None
                    rows = read_tokens(source.path, domain, self._tokenizer, start)
                yield from self._tracked(number, bytes_before, rows)
                source.check()
                start = 0

    def _tracked(self, file: int, bytes_before: int, rows: Iterable[Row]) -> Iterator[Row]:
        for row in rows:
            self.place = Place(file, row.number)
            self.bytes_read = bytes_before + row.position
            yield row

    def _generated(self) -> Iterator[Row]:
        name, size = self._domain.builtin, self._domain.size or BUILTIN_SIZE
        assert name is not None
        options = self._domain.facts.given() if self._domain.facts is not None else {}
        try:
            texts = builtin.documents(name, size=size, seed=self._seed, **options)
            held_out = builtin.held_out_documents(name, seed=self._seed, **options)
        except ValueError as error:
            raise DataError(f"data.domains.{self._portion.domain}: {error}") from None
        for number, found in enumerate(chain(texts, held_out)):
            place = f"builtin {name}, document {number}"
            if isinstance(found, MarkedText):
                yield Row(found.text, place, number + 1, 0, answer=found.answer, heldout=found.heldout)
            else:
                yield Row(found, place, number + 1, 0)
