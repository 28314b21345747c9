"""The corpus: token files prepared once, cached under a hash of their sources, and memory-mapped."""

from __future__ import annotations

import fcntl
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from moetrain.config import Settings, expand
from moetrain.data.dedup import SeenIds
from moetrain.data.documents import (
    BUILTIN_SIZE,
    DomainReport,
    check_report,
    document_id,
    note_left_out,
)
from moetrain.data.errors import DataError
from moetrain.data.portions import PORTION_BYTES, Portion, fingerprint, portions
from moetrain.data.sample import Sample, sample_portion
from moetrain.data.sources.remote import is_url
from moetrain.data.token_shards import INDEX, TokenizerFile, join_shards, token_dtype, write_shards
from moetrain.data.tokenizer import Tokenizer, given_tokenizer, load_tokenizer, train_tokenizer
from moetrain.data.workers import available_cpus, run_tasks

FORMAT = 3
_SECONDS_BETWEEN_PROGRESS = 0.1

Progress = Callable[[str, int, int | None], None]
"""Called with (what is done, how far, of how much or None); see `moetrain.loggers.terminal`."""


@dataclass(frozen=True)
class DomainTokens:
    """A prepared domain: ``tokens`` [all text tokens], memory-mapped, and ``index``, one `INDEX` row per document."""

    name: str
    tokens: np.ndarray
    index: np.ndarray
    report: DomainReport

    @cached_property
    def digest(self) -> str:
        """A hash of the domain's documents: their ids, which are hashes of their texts, and where they are."""
        return blake2b(np.ascontiguousarray(self.index).view(np.uint8).data, digest_size=16).hexdigest()


@dataclass(frozen=True)
class Corpus:
    """All domains of a run, tokenized."""

    domains: list[DomainTokens]
    tokenizer: Tokenizer
    fingerprint: str

    def record(self) -> dict[str, Any]:
        """What was trained on, for a checkpoint, as JSON: hashes of everything, of the tokenizer, of each domain."""
        documents = {domain.name: domain.digest for domain in self.domains}
        return {"corpus": self.fingerprint, "tokenizer": self.tokenizer.fingerprint, "documents": documents}


def prepare_corpus(settings: Settings, progress: Progress = lambda what, done, total: None) -> Corpus:
    """The run's corpus: from the cache, or read, tokenized and cached.

    Its cache key is a hash of the content of its sources. If a source changed, the corpus is prepared again, and
    checkpoints made with the former corpus are refused. A preparation that was killed is resumed.

    Raises:
        DataError: the data cannot be used.
        SettingsError: a path holds an environment variable that is not set.
    """
    _refuse_unsplit(settings)
    return Preparation(settings, progress).corpus()


def prepare_tokenizer(
    settings: Settings, progress: Progress = lambda what, done, total: None
) -> tuple[Tokenizer, Path]:
    """The run's tokenizer and its file: the given one, or one trained on the corpus, or the cached result of that.

    Raises:
        DataError, SettingsError: as `prepare_corpus`.
    """
    _refuse_unsplit(settings)
    preparation = Preparation(settings, progress)
    with preparation.lock():
        return preparation.tokenizer()


def _refuse_unsplit(settings: Settings) -> None:
    for name, domain in settings.data.domains.items():
        if domain.by is not None and domain.value is None:
            raise DataError(
                f"data.domains.{name}.by: not split yet: give the settings to moetrain.data.split.split_domains first"
            )


class Preparation:
    """The steps from sources to token files, and the state they share.

    Attributes:
        cache: the folder where results are kept.
        portions: of all domains, in order.
    """

    def __init__(self, settings: Settings, progress: Progress) -> None:
        self.settings, self.progress = settings, progress
        data = settings.data
        self.cache = Path(expand(data.cache_dir, "data.cache_dir"))
        if any(is_url(place) for domain in data.domains.values() for place in (data.root, *domain.paths)):
            self.progress("fetching files that are not in the cache", 0, None)
        # The state of files is noted before they are hashed, so that later changes are noticed when they are read.
        self.portions = [portion for name, domain in data.domains.items() for portion in portions(name, domain, data)]
        self._fingerprints = {
            name: fingerprint(name, domain, data, settings.run.seed) for name, domain in data.domains.items()
        }

    def corpus(self) -> Corpus:
        with self.lock():
            tokenizer, path = self.tokenizer()
            key = _hash([str(FORMAT), tokenizer.fingerprint, *self._fingerprints.values()])
            folder = self.cache / f"corpus-{key}"
            if not (folder / "corpus.json").exists():
                _tokenize(self, tokenizer, path, folder)
        domains = []
        for name, domain in self.settings.data.domains.items():
            domains.append(_open_domain(folder, name))
            # Files that are not read may come and go without a new corpus, so they are not stored in it.
            note_left_out(domains[-1].report, domain, self.settings.data)
        return Corpus(domains, tokenizer, key)

    def tokenizer(self) -> tuple[Tokenizer, Path]:
        chosen = self.settings.tokenizer
        if chosen.model is not None:
            return given_tokenizer(chosen)
        parts = [str(FORMAT), str(chosen.vocab_size), str(chosen.sample_bytes), *self._fingerprints.values()]
        path = self.cache / f"tokenizer-{_hash(parts)}" / "tokenizer.model"
        if not path.exists():
            texts = self._sample()
            self.progress("training the tokenizer", 0, None)
            trained = train_tokenizer(texts, chosen.vocab_size)
            _write_folder(path.parent, lambda partial: trained.save(partial / path.name))
        return load_tokenizer(path), path

    def _sample(self) -> list[str]:
        """Documents of each domain up to an even share of the sample, chosen by a hash of their id and the seed."""
        data = self.settings.data
        budget = self.settings.tokenizer.sample_bytes / len(data.domains)
        samples = {name: Sample(budget) for name in data.domains}
        reports: dict[int, DomainReport] = {}

        def on_done(number: int, result: Any) -> None:
            reports[number], items = result
            for order, identity, text in items:
                samples[self.portions[number].domain].add(order, identity, text)

        tasks = [(portion, self.settings, budget) for portion in self.portions]
        self.run("reading the tokenizer's sample", sample_portion, tasks, on_done)
        for name, domain in data.domains.items():
            report = DomainReport(name)
            for number in sorted(reports):
                if self.portions[number].domain == name:
                    report.add(reports[number])
            check_report(report, domain, data)
        return [text for sample in samples.values() for _, _, text in sample.items()]

    def run(
        self, what: str, function: Callable[..., Any], tasks: list[Any], on_done: Callable[[int, Any], None]
    ) -> None:
        """Call a function for each portion in worker processes; progress is in bytes."""
        sizes = [self._size(portion) for portion in self.portions]
        total = sum(size for size in sizes if size is not None) if None not in sizes else None
        done_bytes, last = [0] * len(tasks), 0.0

        def on_progress(number: int, done: int) -> None:
            nonlocal last
            done_bytes[number] = min(done, sizes[number] or done)
            if time.monotonic() - last >= _SECONDS_BETWEEN_PROGRESS:
                last = time.monotonic()
                self.progress(what, sum(done_bytes), total)

        self.progress(what, 0, total)
        run_tasks(function, tasks, self.workers(), on_progress, on_done)
        self.progress(what, total or sum(done_bytes), total)

    def _size(self, portion: Portion) -> int | None:
        """Bytes that the progress of a portion counts up to; None if unknown."""
        domain = self.settings.data.domains[portion.domain]
        if domain.builtin is not None:
            return domain.size or BUILTIN_SIZE
        return None if domain.hub is not None else portion.size

    def workers(self) -> int:
        """Worker processes to use. The tokenizer gets as many threads as there are cores per worker."""
        wanted = self.settings.data.workers
        if wanted is None:
            sizes = [self._size(portion) for portion in self.portions]
            is_small = None not in sizes and sum(size or 0 for size in sizes) < PORTION_BYTES
            wanted = 1 if is_small else available_cpus()
        return min(wanted, len(self.portions))

    def key(self) -> str:
        """A hash of the content of the sources, and of how they are read."""
        return _hash(list(self._fingerprints.values()))

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the lock on preparing these sources, so that two simultaneous runs do not do the same work."""
        name = self.key()
        try:
            self.cache.mkdir(parents=True, exist_ok=True)
            opened = open(self.cache / f"preparing-{name}.lock", "wb")  # noqa: SIM115
        except OSError:  # a read-only cache may hold all that is needed; writing to it fails later
            yield
            return
        with opened as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.progress("waiting for another process that prepares the same data", 0, None)
                fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _tokenize(preparation: Preparation, tokenizer: Tokenizer, path: Path, folder: Path) -> None:
    """Fill the folder of a corpus: shards from worker processes, then one token file and one index per domain."""
    settings = preparation.settings
    shards = folder.with_name(folder.name + ".parts")
    folders = [shards / f"{portion.domain}-{portion.number:06d}" for portion in preparation.portions]
    marks = settings.tokenizer.begin_token, settings.tokenizer.end_token
    file = TokenizerFile(path, *marks, tokenizer.fingerprint)
    threads = max(1, available_cpus() // preparation.workers())
    tasks = [
        (portion, settings, file, own, threads) for portion, own in zip(preparation.portions, folders, strict=True)
    ]
    preparation.run("tokenizing", write_shards, tasks, lambda number, result: None)

    def write(folder: Path) -> None:
        seen = SeenIds()
        record: dict[str, Any] = {"format": FORMAT, "token_bytes": token_dtype(tokenizer.vocab_size).itemsize}
        record["domains"] = {}
        for number, (name, domain) in enumerate(settings.data.domains.items()):
            preparation.progress("joining the shards", number, len(settings.data.domains))
            (folder / name).mkdir()
            own = [f for portion, f in zip(preparation.portions, folders, strict=True) if portion.domain == name]
            with open(folder / name / "tokens.bin", "wb") as tokens:
                index, report = join_shards(own, seen, name, tokens)
            check_report(report, domain, settings.data)
            np.save(folder / name / "index.npy", _with_repeats(index, domain.copies))
            record["domains"][name] = report.as_dict()
        (folder / "corpus.json").write_text(json.dumps(record, indent=1))

    _write_folder(folder, write)
    shutil.rmtree(shards, ignore_errors=True)


def _with_repeats(index: np.ndarray, repeats: int) -> np.ndarray:
    """The index with each training document ``repeats`` times, each copy with its own id; held-out documents once."""
    train = index[~index["heldout"]]
    copies = []
    for copy in range(1, repeats):
        again = train.copy()
        # The id of a copy is a hash of the document's id, as the text is no longer available.
        again["id"] = [document_id(f"{identity:016x}", copy) for identity in train["id"]]
        again["repeated"] = True
        copies.append(again)
    return np.concatenate([index, *copies])


def _open_domain(folder: Path, name: str) -> DomainTokens:
    """Open a prepared domain; its tokens are memory-mapped.

    Raises:
        DataError: its files are corrupt.
    """
    try:
        record = json.loads((folder / "corpus.json").read_text())
        index = np.load(folder / name / "index.npy", mmap_mode="r")
        tokens = np.memmap(folder / name / "tokens.bin", np.dtype(f"<u{record['token_bytes']}"), mode="r")
        report = DomainReport(**record["domains"][name])
        valid = index.dtype == INDEX and len(tokens) == int((index["start"] + index["length"]).max(initial=0))
    except (OSError, ValueError, KeyError, TypeError):
        valid = False
    if not valid:
        raise DataError(f"{folder}: the prepared data of {name} is corrupt: remove this folder, it is prepared again")
    return DomainTokens(name, tokens, index, report)


def _write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Write a folder atomically: fill a temporary folder and rename it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for abandoned in folder.parent.glob(f"{folder.name}.*.partial"):  # by a process that was killed
        shutil.rmtree(abandoned, ignore_errors=True)
    partial = Path(tempfile.mkdtemp(prefix=folder.name + ".", suffix=".partial", dir=folder.parent))
    try:
        write(partial)
        try:
            partial.rename(folder)
        except OSError:
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _hash(parts: list[str]) -> str:
    return blake2b("\n".join(parts).encode(), digest_size=10).hexdigest()
