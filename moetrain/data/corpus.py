"""Token files: a domain's documents as ids on disk, prepared once, memory-mapped, found again by content hash."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from itertools import islice
from pathlib import Path

import numpy as np

from moetrain.config import Settings, expand
from moetrain.data.documents import DataError, Document, DomainReport, document_id, fingerprint, read_documents
from moetrain.data.tokenizer import Tokenizer, train_tokenizer

FORMAT = 2
_DOCUMENTS_AT_ONCE = 256

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

Progress = Callable[[str, int, int | None], None]
"""Told (what is done, how far, of how much or None) now and then; see `moetrain.dashboard.terminal`."""


@dataclass(frozen=True)
class DomainTokens:
    """One domain, prepared: ``tokens`` [all text tokens] memory-mapped, ``index`` an `INDEX` row a document."""

    name: str
    tokens: np.ndarray
    index: np.ndarray
    report: DomainReport


@dataclass(frozen=True)
class Corpus:
    """All domains of a run, prepared with one tokenizer."""

    domains: list[DomainTokens]
    tokenizer: Tokenizer
    fingerprint: str


def prepare_corpus(settings: Settings, progress: Progress = lambda what, done, total: None) -> Corpus:
    """The run's corpus: from the cache where the same one was prepared before, else read, tokenized and kept.

    Raises:
        DataError: data that cannot be used.
        SettingsError: a path with an unset environment variable.
    """
    data = settings.data
    cache = Path(expand(data.cache_dir, "data.cache_dir"))
    prints = {name: fingerprint(name, domain, data, settings.run.seed) for name, domain in data.domains.items()}
    tokenizer = _tokenizer(settings, cache, prints, progress)
    key = _hash([str(FORMAT), tokenizer.fingerprint, *prints.values()])
    folder = cache / f"corpus-{key}"
    if not (folder / "corpus.json").exists():
        _write_whole(folder, lambda beside: _tokenize(settings, tokenizer, beside, progress))
    return Corpus([_open_domain(folder, name) for name in data.domains], tokenizer, key)


def _tokenizer(settings: Settings, cache: Path, prints: dict[str, str], progress: Progress) -> Tokenizer:
    if settings.tokenizer.model is not None:
        path = Path(expand(settings.tokenizer.model, "tokenizer.model"))
        try:
            return Tokenizer.load(path)
        except (OSError, RuntimeError, ValueError) as error:
            raise DataError(f"tokenizer.model: {path} cannot be used ({error}): give a SentencePiece .model") from None
    wanted = [str(FORMAT), str(settings.tokenizer.vocab_size), str(settings.tokenizer.sample_bytes), *prints.values()]
    path = cache / f"tokenizer-{_hash(wanted)}" / "tokenizer.model"
    if not path.exists():
        progress("training the tokenizer", 0, None)
        tokenizer = train_tokenizer(_training_sample(settings), settings.tokenizer.vocab_size)
        _write_whole(path.parent, lambda beside: tokenizer.save(beside / path.name))
    return Tokenizer.load(path)


def _training_sample(settings: Settings) -> Iterator[str]:
    """Documents of each domain up to an even share of the sample, chosen by a hash of their id and the seed."""
    data = settings.data
    budget = settings.tokenizer.sample_bytes / len(data.domains)
    for name in data.domains:
        sizes = {}
        for document in _documents(settings, name, set()):
            if not document.heldout:
                sizes[document.id] = len(document.text.encode())
        seed = settings.run.seed.to_bytes(8, "little")
        order = sorted(sizes, key=lambda i: blake2b(i.to_bytes(8, "little"), digest_size=8, salt=seed).digest())
        taken, total = set(), 0
        for identity in order:
            if total >= budget:
                break
            taken.add(identity)
            total += sizes[identity]
        yield from (document.text for document in _documents(settings, name, set()) if document.id in taken)


def _documents(settings: Settings, name: str, seen: set[int], report: DomainReport | None = None) -> Iterator[Document]:
    domain = settings.data.domains[name]
    return read_documents(name, domain, settings.data, settings.run.seed, seen, report or DomainReport(name))


def _tokenize(settings: Settings, tokenizer: Tokenizer, folder: Path, progress: Progress) -> None:
    seen: set[int] = set()
    reports = {}
    for name, domain in settings.data.domains.items():
        report = reports[name] = DomainReport(name)
        (folder / name).mkdir()
        index = _write_tokens(
            _documents(settings, name, seen, report),
            tokenizer,
            settings.run.seed if domain.shuffled else None,
            folder / name / "tokens.bin",
            partial(_tell, progress, f"tokenizing {name}"),
        )
        np.save(folder / name / "index.npy", _with_repeats(index, domain.repeats))
    token_bytes = token_dtype(tokenizer.vocab_size).itemsize
    record = {
        "format": FORMAT,
        "token_bytes": token_bytes,
        "domains": {name: report.as_dict() for name, report in reports.items()},
    }
    (folder / "corpus.json").write_text(json.dumps(record, indent=1))


def _write_tokens(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    shuffle_seed: int | None,
    path: Path,
    progress: Callable[[int], None],
) -> np.ndarray:
    dtype = token_dtype(tokenizer.vocab_size)
    rows: list[np.ndarray] = []
    written = 0
    documents = iter(documents)
    with open(path, "wb") as file:
        while batch := list(islice(documents, _DOCUMENTS_AT_ONCE)):
            encoded = tokenizer.encode_all([document.text for document in batch], threads=os.cpu_count() or 1)
            part = np.zeros(len(batch), INDEX)
            part["id"] = [document.id for document in batch]
            part["length"] = [len(ids) for ids in encoded]
            part["start"] = written + np.concatenate([[0], np.cumsum(part["length"])[:-1]])
            part["text_bytes"] = [len(document.text.encode()) for document in batch]
            part["heldout"] = [document.heldout for document in batch]
            spans = [_answer_tokens(document, ids, tokenizer) for document, ids in zip(batch, encoded, strict=True)]
            part["answer_start"], part["answer_end"] = np.array(spans).T
            if shuffle_seed is not None:
                encoded = [
                    shuffle(ids, shuffle_seed, document.id) for document, ids in zip(batch, encoded, strict=True)
                ]
                part["answer_start"], part["answer_end"] = _NO_ANSWER  # its tokens lie scattered
            for ids in encoded:
                file.write(np.asarray(ids, dtype).tobytes())
            written += int(part["length"].sum())
            rows.append(part)
            progress(written)
    return np.concatenate(rows)


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


def _tell(progress: Progress, what: str, tokens: int) -> None:
    progress(what, tokens, None)


def token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def _with_repeats(index: np.ndarray, repeats: int) -> np.ndarray:
    """The index with each training document ``repeats`` times, copies under ids of their own; held-out ones once."""
    train = index[~index["heldout"]]
    copies = []
    for copy in range(1, repeats):
        again = train.copy()
        # The id of a copy hashes the document's id, not its text, which is no longer at hand.
        again["id"] = [document_id(f"{identity:016x}", copy) for identity in train["id"]]
        again["repeated"] = True
        copies.append(again)
    return np.concatenate([index, *copies])


def _open_domain(folder: Path, name: str) -> DomainTokens:
    record = json.loads((folder / "corpus.json").read_text())
    return DomainTokens(
        name,
        np.memmap(folder / name / "tokens.bin", np.dtype(f"<u{record['token_bytes']}"), mode="r"),
        np.load(folder / name / "index.npy", mmap_mode="r"),
        DomainReport(**record["domains"][name]),
    )


def _write_whole(folder: Path, write: Callable[[Path], None]) -> None:
    """Fill a folder beside its place and rename it: it is whole or absent, also when two runs prepare it at once."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=folder.name + ".", suffix=".partial", dir=folder.parent))
    try:
        write(beside)
        try:
            beside.rename(folder)
        except OSError:
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _hash(parts: list[str]) -> str:
    return blake2b("\n".join(parts).encode(), digest_size=10).hexdigest()
