"""Token files: a domain's documents as ids on disk, prepared once, memory-mapped, found again by content hash."""

from __future__ import annotations

import fcntl
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from moetrain.config import Settings, expand
from moetrain.data.dedup import SeenIds
from moetrain.data.documents import (
    BUILTIN_SIZE,
    PORTION_BYTES,
    DomainReport,
    Portion,
    check_report,
    document_id,
    fingerprint,
    portions,
)
from moetrain.data.errors import DataError
from moetrain.data.sample import Sample, sample_portion
from moetrain.data.token_shards import INDEX as INDEX
from moetrain.data.token_shards import TokenizerFile, join_parts, write_parts
from moetrain.data.token_shards import token_dtype as token_dtype
from moetrain.data.tokenizer import Tokenizer, check_lossless, load_tokenizer, train_tokenizer
from moetrain.data.workers import available_cpus, run_tasks

FORMAT = 3
_SECONDS_BETWEEN_WORDS = 0.1

Progress = Callable[[str, int, int | None], None]
"""Told (what is done, how far, of how much or None) now and then; see `moetrain.loggers.terminal`."""


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

    It is found by the content of its sources: one that changed is prepared anew, and a run's checkpoint then says
    that the data is another. A preparation that was killed goes on where it was.

    Raises:
        DataError: data that cannot be used.
        SettingsError: a path with an unset environment variable.
    """
    return _Preparation(settings, progress).corpus()


def prepare_tokenizer(
    settings: Settings, progress: Progress = lambda what, done, total: None
) -> tuple[Tokenizer, Path]:
    """The run's tokenizer and its file: the one given, else the corpus's own, trained where it has not been before.

    Raises: as `prepare_corpus`.
    """
    preparation = _Preparation(settings, progress)
    with preparation.alone():
        return preparation.tokenizer()


class _Preparation:
    """The steps from sources to token files, and what they share."""

    def __init__(self, settings: Settings, progress: Progress) -> None:
        self.settings, self.progress = settings, progress
        data = settings.data
        self.cache = Path(expand(data.cache_dir, "data.cache_dir"))
        # Files are looked at before they are hashed: what changes from here on is seen when it is read.
        self.portions = [
            portion for name, domain in data.domains.items() for portion in portions(name, domain, data.root)
        ]
        self._prints = {
            name: fingerprint(name, domain, data, settings.run.seed) for name, domain in data.domains.items()
        }

    def corpus(self) -> Corpus:
        with self.alone():
            tokenizer, path = self.tokenizer()
            key = _hash([str(FORMAT), tokenizer.fingerprint, *self._prints.values()])
            folder = self.cache / f"corpus-{key}"
            if not (folder / "corpus.json").exists():
                _tokenize(self, tokenizer, path, folder)
        names = list(self.settings.data.domains)
        return Corpus([_open_domain(folder, name) for name in names], tokenizer, key)

    def tokenizer(self) -> tuple[Tokenizer, Path]:
        chosen = self.settings.tokenizer
        if chosen.model is not None:
            path = Path(expand(chosen.model, "tokenizer.model"))
            try:
                tokenizer = load_tokenizer(path, chosen.begin_token, chosen.end_token)
                check_lossless(tokenizer)
            except (OSError, RuntimeError, ValueError) as error:
                raise DataError(
                    f"tokenizer.model: {path} cannot be used ({error}): give a SentencePiece .model or a tokenizer.json"
                ) from None
            return tokenizer, path
        wanted = [str(FORMAT), str(chosen.vocab_size), str(chosen.sample_bytes), *self._prints.values()]
        path = self.cache / f"tokenizer-{_hash(wanted)}" / "tokenizer.model"
        if not path.exists():
            texts = self._sample()
            self.progress("training the tokenizer", 0, None)
            trained = train_tokenizer(texts, chosen.vocab_size)
            _write_whole(path.parent, lambda beside: trained.save(beside / path.name))
        return load_tokenizer(path), path

    def _sample(self) -> list[str]:
        """Documents of each domain up to an even share of the sample, chosen by a hash of their id and the seed."""
        data = self.settings.data
        budget = self.settings.tokenizer.sample_bytes / len(data.domains)
        samples = {name: Sample(budget) for name in data.domains}
        reports: dict[int, DomainReport] = {}

        def finished(number: int, result: Any) -> None:
            reports[number], items = result
            for order, identity, text in items:
                samples[self.portions[number].domain].add(order, identity, text)

        tasks = [(portion, self.settings, budget) for portion in self.portions]
        self.run("reading the tokenizer's sample", sample_portion, tasks, finished)
        for name, domain in data.domains.items():
            report = DomainReport(name)
            for number in sorted(reports):
                if self.portions[number].domain == name:
                    report.add(reports[number])
            check_report(report, domain, data)
        return [text for sample in samples.values() for _, _, text in sample.items()]

    def run(
        self, what: str, function: Callable[..., Any], tasks: list[Any], finished: Callable[[int, Any], None]
    ) -> None:
        """Call a function for each portion in several processes, with progress in bytes."""
        sizes = [self._size(portion) for portion in self.portions]
        total = sum(size for size in sizes if size is not None) if None not in sizes else None
        far, last = [0] * len(tasks), 0.0

        def tell(number: int, done: int) -> None:
            nonlocal last
            far[number] = min(done, sizes[number] or done)
            if time.monotonic() - last >= _SECONDS_BETWEEN_WORDS:
                last = time.monotonic()
                self.progress(what, sum(far), total)

        self.progress(what, 0, total)
        run_tasks(function, tasks, self.workers(), tell, finished)
        self.progress(what, total or sum(far), total)

    def _size(self, portion: Portion) -> int | None:
        """Bytes that a portion's progress counts up to; None where nobody knows."""
        domain = self.settings.data.domains[portion.domain]
        if domain.builtin is not None:
            return domain.size or BUILTIN_SIZE
        return None if domain.hub is not None else portion.size

    def workers(self) -> int:
        """Processes to use; the tokenizer's threads use the cores that they leave."""
        wanted = self.settings.data.workers
        if wanted is None:
            sizes = [self._size(portion) for portion in self.portions]
            little = None not in sizes and sum(size or 0 for size in sizes) < PORTION_BYTES
            wanted = 1 if little else available_cpus()
        return min(wanted, len(self.portions))

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the preparation of these sources, so that two runs at once do not do the same work twice."""
        name = _hash(list(self._prints.values()))
        try:
            self.cache.mkdir(parents=True, exist_ok=True)
            held = open(self.cache / f"preparing-{name}.lock", "wb")  # noqa: SIM115
        except OSError:  # a cache that can only be read may hold all that is wanted; writing to it is an error later
            yield
            return
        with held as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.progress("waiting for another process that prepares the same data", 0, None)
                fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _tokenize(preparation: _Preparation, tokenizer: Tokenizer, path: Path, folder: Path) -> None:
    """Fill a corpus's folder: parts in several processes, then one token file and index a domain."""
    settings = preparation.settings
    beside = folder.with_name(folder.name + ".parts")
    places = [beside / f"{portion.domain}-{portion.number:06d}" for portion in preparation.portions]
    marks = settings.tokenizer.begin_token, settings.tokenizer.end_token
    file = TokenizerFile(path, *marks, tokenizer.fingerprint)
    threads = max(1, available_cpus() // preparation.workers())
    tasks = [
        (portion, settings, file, place, threads) for portion, place in zip(preparation.portions, places, strict=True)
    ]
    preparation.run("tokenizing", write_parts, tasks, lambda number, result: None)

    def write(folder: Path) -> None:
        seen = SeenIds()
        record: dict[str, Any] = {"format": FORMAT, "token_bytes": token_dtype(tokenizer.vocab_size).itemsize}
        record["domains"] = {}
        for number, (name, domain) in enumerate(settings.data.domains.items()):
            preparation.progress("joining the parts", number, len(settings.data.domains))
            (folder / name).mkdir()
            own = [place for portion, place in zip(preparation.portions, places, strict=True) if portion.domain == name]
            with open(folder / name / "tokens.bin", "wb") as tokens:
                index, report = join_parts(own, seen, name, tokens)
            check_report(report, domain, settings.data)
            np.save(folder / name / "index.npy", _with_repeats(index, domain.repeats))
            record["domains"][name] = report.as_dict()
        (folder / "corpus.json").write_text(json.dumps(record, indent=1))

    _write_whole(folder, write)
    shutil.rmtree(beside, ignore_errors=True)


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
    """A prepared domain; its tokens stay on disk.

    Raises:
        DataError: its files are not of the size they were written with.
    """
    try:
        record = json.loads((folder / "corpus.json").read_text())
        index = np.load(folder / name / "index.npy", mmap_mode="r")
        tokens = np.memmap(folder / name / "tokens.bin", np.dtype(f"<u{record['token_bytes']}"), mode="r")
        report = DomainReport(**record["domains"][name])
        whole = index.dtype == INDEX and len(tokens) == int((index["start"] + index["length"]).max(initial=0))
    except (OSError, ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise DataError(f"{folder}: the prepared data of {name} is damaged: remove this folder, it is prepared anew")
    return DomainTokens(name, tokens, index, report)


def _write_whole(folder: Path, write: Callable[[Path], None]) -> None:
    """Fill a folder beside its place and rename it: it is whole or absent."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f"{folder.name}.*.partial"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
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
