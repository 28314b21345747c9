"""The tokens of a portion in shard files, each written atomically, so that a killed preparation resumes after the last.

The shards of all portions are then joined into one token file per domain. Only there are duplicates across portions and
domains dropped, in the order of the source, so that the result does not depend on which worker finished first.
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
from moetrain.data.documents import Document, DomainReport, PortionReader
from moetrain.data.errors import DataError
from moetrain.data.portions import Place, Portion
from moetrain.data.tokenizer import Tokenizer, load_tokenizer
from moetrain.data.workers import OnProgress

SHARD_BYTES = 32 * 2**20
"""Bytes of text after which a shard is complete."""

_BATCH_DOCUMENTS = 256  # of one call of the tokenizer
_BATCH_CHARACTERS = 2**22

# One row of a domain's index: a document, the place of its tokens in tokens.bin, and its size as text. The marked
# answer is a range of its tokens, -1 to -1 if the document marks none.
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
    """Where a worker finds the tokenizer, and the fingerprint that it must have."""

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
    """The smallest dtype that holds every id."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def encode_documents(
    documents: list[Document], tokenizer: Tokenizer, threads: int, shuffle_seed: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Tokenize documents.

    Args:
        shuffle_seed: if given, the tokens of each document are put into a random order.

    Returns:
        `INDEX` rows, and the tokens of all documents concatenated; ``start`` counts from the first of them.

    Raises:
        DataError: a marked answer does not match the tokens.
    """
    encoded = _ids_of(documents, tokenizer, threads)
    index = np.zeros(len(documents), INDEX)
    index["id"] = [document.id for document in documents]
    index["length"] = [len(ids) for ids in encoded]
    index["start"] = np.cumsum(index["length"]) - index["length"]
    index["text_bytes"] = [document.text_bytes for document in documents]
    index["heldout"] = [document.heldout for document in documents]
    spans = [_answer_tokens(document, ids, tokenizer) for document, ids in zip(documents, encoded, strict=True)]
    index["answer_start"], index["answer_end"] = np.array(spans).T
    if shuffle_seed is not None:
        encoded = [shuffle(ids, shuffle_seed, document.id) for document, ids in zip(documents, encoded, strict=True)]
        index["answer_start"], index["answer_end"] = _NO_ANSWER  # its tokens are no longer adjacent
    dtype = token_dtype(tokenizer.vocab_size)
    return index, np.concatenate([np.asarray(ids, dtype) for ids in encoded])


def _ids_of(documents: list[Document], tokenizer: Tokenizer, threads: int) -> list[np.ndarray | list[int]]:
    """The ids of each document: an array if it was read as ids, else those of its text."""
    texts = [each.text for each in documents if each.text is not None]
    encoded = iter(tokenizer.encode_all(texts, threads=threads) if texts else ())
    return [next(encoded) if each.tokens is None else each.tokens for each in documents]


def _answer_tokens(document: Document, ids: Sequence[int] | np.ndarray, tokenizer: Tokenizer) -> tuple[int, int]:
    if document.answer is None or document.text is None or isinstance(ids, np.ndarray):
        return _NO_ANSWER
    try:
        return tokenizer.span(document.text, ids, *document.answer)
    except ValueError as error:
        raise DataError(
            f"document {document.text[:40]!r}: its answer cannot be found among its tokens: {error}"
        ) from None


def shuffle(ids: Sequence[int] | np.ndarray, seed: int, document: int) -> list[int]:
    """The tokens of a document in a random order that depends on the run's seed and the document's id only."""
    return [ids[place] for place in np.random.default_rng([seed, 4, document]).permutation(len(ids))]


@dataclass(frozen=True)
class ShardRecord:
    """What reading the documents of a shard found, and where its portion continues."""

    report: DomainReport
    place: Place
    last: bool


class Shard:
    """A shard file; its arrays are read on access."""

    def __init__(self, path: Path) -> None:
        self.path = path
        record = json.loads(bytes(self._array("record")))
        self.record = ShardRecord(DomainReport(**record["report"]), Place(*record["place"]), record["last"])

    def _array(self, name: str) -> np.ndarray:
        with np.load(self.path) as file:
            return file[name]

    @property
    def index(self) -> np.ndarray:
        return self._array("index")

    @property
    def tokens(self) -> np.ndarray:
        return self._array("tokens")


def read_shards(folder: Path) -> Iterator[Shard]:
    """The existing shards of a portion in order, up to the first that is missing or corrupt."""
    for number in count():
        try:
            shard = Shard(folder / _file_name(number))
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
            return
        yield shard
        if shard.record.last:
            return


def _file_name(number: int) -> str:
    return f"part-{number:06d}.npz"


def write_shards(
    portion: Portion, settings: Settings, file: TokenizerFile, folder: Path, threads: int, on_progress: OnProgress
) -> None:
    """Read and tokenize a portion into shard files, starting after the last one that exists."""
    folder.mkdir(parents=True, exist_ok=True)
    seen, before, number, place = SeenIds(), DomainReport(portion.domain), 0, Place()
    for shard in read_shards(folder):
        number += 1
        if shard.record.last:
            on_progress(portion.size)
            return
        seen.add_all(shard.index["id"])
        before.add(shard.record.report)
        place = shard.record.place
    domain = settings.data.domains[portion.domain]
    shuffle_seed = settings.run.seed if domain.shuffled else None
    tokenizer = _open_tokenizer(file)
    reader = PortionReader(
        portion, domain, settings.data, settings.run.seed, seen, DomainReport(portion.domain), place, before, tokenizer
    )
    documents = iter(reader)
    last = False
    while not last:
        report = reader.report = DomainReport(portion.domain)
        batches: list[tuple[np.ndarray, np.ndarray]] = []
        while not last and report.text_bytes < SHARD_BYTES:
            batch = list(_next_batch(documents))
            last = not batch
            if batch:
                batches.append(encode_documents(batch, tokenizer, threads, shuffle_seed))
                # Generated or downloaded text has no size on disk.
                on_progress(reader.bytes_read or before.text_bytes + report.text_bytes)
        before.add(report)
        _write_shard(folder / _file_name(number), batches, ShardRecord(report, reader.place, last))
        number += 1
    on_progress(portion.size)


def _next_batch(documents: Iterator[Document]) -> Iterator[Document]:
    size = 0
    for document in islice(documents, _BATCH_DOCUMENTS):
        yield document
        size += len(document.text or "") if document.tokens is None else len(document.tokens)
        if size >= _BATCH_CHARACTERS:
            return


def _write_shard(path: Path, batches: list[tuple[np.ndarray, np.ndarray]], record: ShardRecord) -> None:
    index = np.concatenate([np.zeros(0, INDEX), *(rows for rows, _ in batches)])
    index["start"] = np.cumsum(index["length"]) - index["length"]
    tokens = np.concatenate([ids for _, ids in batches]) if batches else np.zeros(0, "<u2")
    text = json.dumps({"report": record.report.as_dict(), "place": record.place, "last": record.last})
    partial = path.with_name(f"{path.name}.{os.getpid()}")  # a worker of a killed run may still write its own
    with open(partial, "wb") as file:
        np.savez(file, index=index, tokens=tokens, record=np.frombuffer(text.encode(), np.uint8))
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def join_shards(
    folders: list[Path], seen: SeenIds, name: str, file: io.BufferedWriter
) -> tuple[np.ndarray, DomainReport]:
    """Write the tokens of a domain to ``file``, without documents whose id is in ``seen``.

    Args:
        folders: of the domain's portions, in order.
        seen: ids of earlier domains; those of this one are added.

    Returns:
        the index of the domain, and its report.
    """
    report, rows, written = DomainReport(name), [np.zeros(0, INDEX)], 0
    for folder in folders:
        for shard in read_shards(folder):
            index, tokens = shard.index, shard.tokens
            report.add(shard.record.report)
            new = seen.add_all(index["id"])
            duplicates = index[~new]
            report.duplicates += len(duplicates)
            report.documents -= len(duplicates)
            report.heldout_documents -= int(duplicates["heldout"].sum())
            report.text_bytes -= int(duplicates["text_bytes"].sum())
            if len(duplicates):
                tokens = tokens[np.repeat(new, index["length"])]
                index = index[new]
            index["start"] = written + np.cumsum(index["length"]) - index["length"]
            file.write(tokens.tobytes())
            written += len(tokens)
            rows.append(index)
    return np.concatenate(rows), report
