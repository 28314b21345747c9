"""A portion's tokens in part files, each whole or absent, so that a preparation that was killed goes on after the last.

Parts of all portions are then joined into one token file a domain; only there are copies dropped that stand in two
portions or domains, in the order of the source, whatever was ready first.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count, islice
from pathlib import Path

import numpy as np

from moetrain.config import Settings
from moetrain.data.dedup import SeenIds
from moetrain.data.documents import Document, DomainReport, Portion, PortionReader
from moetrain.data.errors import DataError
from moetrain.data.tokenizer import Tokenizer, load_tokenizer
from moetrain.data.workers import Tell

PART_BYTES = 32 * 2**20
"""Bytes of text after which a part is complete."""

_DOCUMENTS_AT_ONCE = 256
_BYTES_AT_ONCE = 2**22

# One line of a domain's index: a document, its tokens' place in tokens.bin, and its size as text. The answer it marks
# is a span of its tokens, -1 to -1 where it marks none.
INDEX = np.dtype(
    [
        ("id", "<u8"),
        ("start", "<i8"),
        ("length", "<i8"),
        ("text_bytes", "<i8"),
        ("heldout", "?"),
        ("repeated", "?"),
        ("answer_start", "<i8"),
        ("answer_end", "<i8"),
    ]
)
_NO_ANSWER = (-1, -1)


@dataclass(frozen=True)
class TokenizerFile:
    """Where another process finds the tokenizer, and how it knows that it is the same one."""

    path: Path
    begin_token: str | None
    end_token: str | None
    fingerprint: str


@lru_cache(maxsize=1)
def _open_tokenizer(file: TokenizerFile) -> Tokenizer:
    tokenizer = load_tokenizer(file.path, file.begin_token, file.end_token)
    if tokenizer.fingerprint != file.fingerprint:
        raise DataError(f"{file.path}: the tokenizer changed while it was used: run again")
    return tokenizer


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest type that holds every id."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def encode_documents(
    documents: list[Document], tokenizer: Tokenizer, threads: int, shuffle_seed: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """`INDEX` rows of documents, and their tokens one after another; ``start`` counts from the first of them.

    With ``shuffle_seed``, each document's tokens stand in a random order.
    """
    encoded = tokenizer.encode_all([document.text for document in documents], threads=threads)
    index = np.zeros(len(documents), INDEX)
    index["id"] = [document.id for document in documents]
    index["length"] = [len(ids) for ids in encoded]
    index["start"] = np.cumsum(index["length"]) - index["length"]
    index["text_bytes"] = [len(document.text.encode()) for document in documents]
    index["heldout"] = [document.heldout for document in documents]
    spans = [_answer_tokens(document, ids, tokenizer) for document, ids in zip(documents, encoded, strict=True)]
    index["answer_start"], index["answer_end"] = np.array(spans).T
    if shuffle_seed is not None:
        encoded = [shuffle(ids, shuffle_seed, document.id) for document, ids in zip(documents, encoded, strict=True)]
        index["answer_start"], index["answer_end"] = _NO_ANSWER  # its tokens lie scattered
    dtype = token_dtype(tokenizer.vocab_size)
    return index, np.concatenate([np.asarray(ids, dtype) for ids in encoded])


def _answer_tokens(document: Document, ids: Sequence[int], tokenizer: Tokenizer) -> tuple[int, int]:
    if document.answer is None:
        return _NO_ANSWER
    try:
        return tokenizer.span(document.text, ids, *document.answer)
    except ValueError as error:
        raise DataError(
            f"document {document.text[:40]!r}: its answer cannot be found among its tokens: {error}"
        ) from None


def shuffle(ids: Sequence[int], seed: int, document: int) -> list[int]:
    """The tokens of a document in a random order that follows from the run's seed and the document's id alone."""
    return [ids[place] for place in np.random.default_rng([seed, 4, document]).permutation(len(ids))]


@dataclass(frozen=True)
class PartRecord:
    """What a part was found to hold, and where its portion goes on."""

    report: DomainReport
    place: tuple[int, int]
    last: bool


class Part:
    """A part file; its arrays are read when they are asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        record = json.loads(bytes(self._array("record")))
        self.record = PartRecord(DomainReport(**record["report"]), tuple(record["place"]), record["last"])

    def _array(self, name: str) -> np.ndarray:
        with np.load(self.path) as file:
            return file[name]

    @property
    def index(self) -> np.ndarray:
        return self._array("index")

    @property
    def tokens(self) -> np.ndarray:
        return self._array("tokens")


def parts_of(folder: Path) -> Iterator[Part]:
    """The parts of a portion that are there, from its first; one that is damaged, and all after it, are not."""
    for number in count():
        try:
            part = Part(folder / _name(number))
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
            return
        yield part
        if part.record.last:
            return


def _name(number: int) -> str:
    return f"part-{number:06d}.npz"


def write_parts(
    portion: Portion, settings: Settings, file: TokenizerFile, folder: Path, threads: int, tell: Tell
) -> None:
    """Read and tokenize a portion into part files, from after the last one that is there."""
    folder.mkdir(parents=True, exist_ok=True)
    seen, before, number, place = SeenIds(), DomainReport(portion.domain), 0, (0, 0)
    for part in parts_of(folder):
        number += 1
        if part.record.last:
            tell(portion.size)
            return
        seen.first(part.index["id"])
        before.add(part.record.report)
        place = part.record.place
    domain = settings.data.domains[portion.domain]
    shuffle_seed = settings.run.seed if domain.shuffled else None
    reader = PortionReader(
        portion, domain, settings.data, settings.run.seed, seen, DomainReport(portion.domain), place, before
    )
    documents = iter(reader)
    last = False
    while not last:
        report = reader.report = DomainReport(portion.domain)
        batches: list[tuple[np.ndarray, np.ndarray]] = []
        while not last and report.text_bytes < PART_BYTES:
            batch = list(_some(documents))
            last = not batch
            if batch:
                batches.append(encode_documents(batch, _open_tokenizer(file), threads, shuffle_seed))
                # Text that was generated or came over a network has no size on disk.
                tell(reader.bytes_read or before.text_bytes + report.text_bytes)
        before.add(report)
        _write_part(folder / _name(number), batches, PartRecord(report, reader.place, last))
        number += 1
    tell(portion.size)


def _some(documents: Iterator[Document]) -> Iterator[Document]:
    size = 0
    for document in islice(documents, _DOCUMENTS_AT_ONCE):
        yield document
        size += len(document.text)
        if size >= _BYTES_AT_ONCE:
            return


def _write_part(path: Path, batches: list[tuple[np.ndarray, np.ndarray]], record: PartRecord) -> None:
    index = np.concatenate([np.zeros(0, INDEX), *(rows for rows, _ in batches)])
    index["start"] = np.cumsum(index["length"]) - index["length"]
    tokens = np.concatenate([ids for _, ids in batches]) if batches else np.zeros(0, "<u2")
    text = json.dumps({"report": record.report.as_dict(), "place": record.place, "last": record.last})
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    with open(beside, "wb") as file:
        np.savez(file, index=index, tokens=tokens, record=np.frombuffer(text.encode(), np.uint8))
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def join_parts(
    folders: list[Path], seen: SeenIds, name: str, file: io.BufferedWriter
) -> tuple[np.ndarray, DomainReport]:
    """Write a domain's tokens to ``file``, without documents that ``seen`` holds.

    Returns:
        the domain's index, and its report; ``seen`` grows.
    """
    report, rows, written = DomainReport(name), [np.zeros(0, INDEX)], 0
    for folder in folders:
        for part in parts_of(folder):
            index, tokens = part.index, part.tokens
            report.add(part.record.report)
            new = seen.first(index["id"])
            for place in np.flatnonzero(~new):
                report.duplicates += 1
                report.documents -= 1
                report.heldout_documents -= int(index["heldout"][place])
                report.text_bytes -= int(index["text_bytes"][place])
            if not new.all():
                tokens = tokens[np.repeat(new, index["length"])]
                index = index[new]
            index["start"] = written + np.cumsum(index["length"]) - index["length"]
            file.write(tokens.tobytes())
            written += len(tokens)
            rows.append(index)
    return np.concatenate(rows), report
