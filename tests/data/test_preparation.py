import ast
import hashlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moetrain.config import load_settings
from moetrain.data import digests, portions, token_shards
from moetrain.data.corpus import prepare_corpus, prepare_tokenizer
from moetrain.data.dedup import SeenIds
from moetrain.data.documents import DataError, DomainReport, document_id, read_documents
from moetrain.data.sample import Sample
from moetrain.data.stream import training_stream
from moetrain.data.tokenizer import train_tokenizer
from moetrain.data.workers import run_tasks
from tests.conftest import sentences, sums
from tests.data import tasks


def write(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def chosen(folder: Path, cache: Path, *overrides: str):
    base = [f"data.root={folder}", f"data.cache_dir={cache}", "tokenizer.vocab_size=320", "data.heldout_share=0.2"]
    return load_settings(None, [*base, *overrides])


def files_of(corpus, cache: Path) -> dict[str, bytes]:
    """The files in the folder of a corpus."""
    folder = cache / f"corpus-{corpus.fingerprint}"
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


PORTION = 2**20  # bytes, in place of portions.PORTION_BYTES


@pytest.fixture(scope="session")
def large(tmp_path_factory) -> Path:
    """Two domains of several files, each large enough to be a portion, with duplicates within and between them."""
    folder = tmp_path_factory.mktemp("large")
    rng = random.Random(1)
    common = [sentences(rng, 200) for _ in range(8)]
    for name, make in (("stories", sentences), ("sums", sums)):
        for number in range(3):
            texts = [f"{name} {number} {n}. " + make(rng, 200) for n in range(56 if make is sentences else 180)]
            texts += rng.sample(common, 5)
            write(folder / name / f"{number}.jsonl", texts)
            assert (folder / name / f"{number}.jsonl").stat().st_size > PORTION // 2
    return folder


LARGE = ["data.domains.a.path=stories", "data.domains.b.path=sums/*.jsonl", "tokenizer.sample_bytes=100000"]


@pytest.fixture(scope="session")
def straight(large, tmp_path_factory) -> dict[str, bytes]:
    """The files that a single process writes."""
    cache = tmp_path_factory.mktemp("straight")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(portions, "PORTION_BYTES", PORTION)
        return files_of(prepare_corpus(chosen(large, cache, *LARGE, "data.workers=1")), cache)


@pytest.fixture
def small_portions(monkeypatch):
    monkeypatch.setattr(portions, "PORTION_BYTES", PORTION)


def test_several_workers_write_the_same_files_as_one_and_report_progress(
    large, straight, tmp_path, small_portions, monkeypatch
):
    monkeypatch.setattr("moetrain.data.corpus._SECONDS_BETWEEN_PROGRESS", 0)
    reports = []
    corpus = prepare_corpus(
        chosen(large, tmp_path, *LARGE, "data.workers=3"), lambda what, done, total: reports.append((what, done, total))
    )
    assert files_of(corpus, tmp_path) == straight
    size = sum(path.stat().st_size for path in large.rglob("*.jsonl"))
    for what in ("reading the tokenizer's sample", "tokenizing"):
        done_bytes = [done for phase, done, total in reports if phase == what and total == size]
        assert done_bytes == sorted(done_bytes)
        assert (done_bytes[0], done_bytes[-1]) == (0, size)
        assert len(done_bytes) > 2
    assert sorted(path.name.partition("-")[0] for path in tmp_path.iterdir()) == ["corpus", "preparing", "tokenizer"]


def test_token_files_are_memory_mapped_and_hold_the_documents(large, tmp_path, small_portions):
    settings = chosen(large, tmp_path, *LARGE)
    corpus = prepare_corpus(settings)
    seen: set[int] = set()
    for name, domain in zip(settings.data.domains, corpus.domains, strict=True):
        report = DomainReport(name)
        wanted = list(read_documents(name, settings.data.domains[name], settings.data, 0, seen, report))
        assert isinstance(domain.tokens, np.memmap)
        assert domain.report == report
        assert report.duplicates > 0
        assert domain.index["id"].tolist() == [document.id for document in wanted]
        for row, document in list(zip(domain.index, wanted, strict=True))[::97]:
            tokens = domain.tokens[row["start"] : row["start"] + row["length"]]
            assert corpus.tokenizer.decode(tokens.tolist()) == document.text
            assert (row["heldout"], row["text_bytes"]) == (document.heldout, len(document.text.encode()))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.lists(st.lists(st.integers(0, 30), max_size=12), min_size=1, max_size=4), min_size=1, max_size=3),
    st.integers(1, 200),
    st.integers(0, 12),
)
def test_duplicates_are_dropped_as_if_all_were_read_in_order(
    tmp_path_factory, monkeypatch, domains, shard_bytes, at_once
):
    """With any files and any size of shards, the first in the order of the source is kept."""
    folder = tmp_path_factory.mktemp("drawn")
    for number, files in enumerate(domains):
        for file, values in enumerate(files):
            write(folder / f"{number}" / f"{file}.jsonl", [f"{value} " + "word " * value for value in values])
    names = [f"data.domains.d{number}.path={number}/*.jsonl" for number in range(len(domains))]
    (folder / "t.model").write_bytes(TOKENIZER.model)
    settings = chosen(folder, folder / "cache", *names, f"tokenizer.model={folder / 't.model'}")
    with monkeypatch.context() as patch:
        patch.setattr(token_shards, "SHARD_BYTES", shard_bytes)
        patch.setattr(token_shards, "_BATCH_DOCUMENTS", at_once + 1)
        patch.setattr(portions, "PORTION_BYTES", shard_bytes)
        wanted, message = _read_in_order(settings)
        if message is not None:
            with pytest.raises(DataError) as caught:
                prepare_corpus(settings)
            assert str(caught.value) == message
            return
        for domain in prepare_corpus(settings).domains:
            assert (domain.index["id"].tolist(), domain.report) == wanted[domain.name]
            assert np.array_equal(domain.index["start"], np.cumsum(domain.index["length"]) - domain.index["length"])


def _read_in_order(settings) -> tuple[dict, str | None]:
    """Per domain, ids and report of documents read in one process; or the error message."""
    seen: set[int] = set()
    wanted = {}
    for name, domain in settings.data.domains.items():
        report = DomainReport(name)
        try:
            found = list(read_documents(name, domain, settings.data, 0, seen, report))
        except DataError as error:
            return {}, str(error)
        wanted[name] = ([document.id for document in found], report)
    return wanted, None


TOKENIZER = train_tokenizer([sums(random.Random(0), 50)], 300)


class _StoppedError(Exception):
    pass


@pytest.mark.parametrize("source", ["path", "builtin", "limit", "text"])
def test_a_preparation_stopped_at_any_point_is_resumed(tmp_path, monkeypatch, source):
    monkeypatch.setattr(token_shards, "SHARD_BYTES", 3000)
    monkeypatch.setattr(token_shards, "_BATCH_DOCUMENTS", 7)
    monkeypatch.setattr("moetrain.data.corpus._SECONDS_BETWEEN_PROGRESS", 0)
    rng = random.Random(2)
    texts = [f"{n % 80}. " + sums(random.Random(n % 80), 9) for n in range(150)]
    write(tmp_path / "a.jsonl", texts[:70])
    write(tmp_path / "b.jsonl", texts[70:])
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "texts" / f"{number:03d}.txt").write_text(text)
    (tmp_path / "t.model").write_bytes(TOKENIZER.model)
    overrides = {
        "path": ["data.domains.d.path=*.jsonl"],
        "builtin": ["data.domains.d.builtin=math", "data.domains.d.size=12000"],
        "limit": ["data.domains.d.path=*.jsonl", "data.domains.d.limit=75", "data.domains.d.size=11500"],
        "text": ["data.domains.d.path=texts"],
    }[source]
    overrides += [f"tokenizer.model={tmp_path / 't.model'}"]
    whole = prepare_corpus(chosen(tmp_path, tmp_path / "whole", *overrides))
    words = itertools.count()
    for stop in sorted(rng.sample(range(1, 60), 12)):

        def progress(what, done, total, stop=stop):
            if what == "tokenizing" and next(words) >= stop:
                raise _StoppedError

        try:
            again = prepare_corpus(chosen(tmp_path, tmp_path / "again", *overrides), progress)
            break
        except _StoppedError:
            again = None
    again = again or prepare_corpus(chosen(tmp_path, tmp_path / "again", *overrides))
    assert files_of(again, tmp_path / "again") == files_of(whole, tmp_path / "whole")
    assert again.domains[0].report == whole.domains[0].report


def test_a_corrupt_shard_is_written_again(tmp_path, monkeypatch):
    monkeypatch.setattr(token_shards, "SHARD_BYTES", 2000)
    monkeypatch.setattr(token_shards, "_BATCH_DOCUMENTS", 3)
    write(tmp_path / "a.jsonl", [f"{n}. " + sums(random.Random(n), 9) for n in range(60)])
    settings = chosen(tmp_path, tmp_path / "cache", "data.domains.d.path=a.jsonl")
    whole = files_of(prepare_corpus(settings), tmp_path / "cache")
    real, made = token_shards.join_shards, []

    def stop(folders, *rest):
        made.extend(folders)
        raise _StoppedError

    again = chosen(tmp_path, tmp_path / "again", "data.domains.d.path=a.jsonl")
    monkeypatch.setattr("moetrain.data.corpus.join_shards", stop)
    with pytest.raises(_StoppedError):
        prepare_corpus(again)
    monkeypatch.setattr("moetrain.data.corpus.join_shards", real)
    files = sorted(made[0].glob("*.npz"))
    assert len(files) > 4
    files[1].write_bytes(files[1].read_bytes()[:-200])
    files[3].write_bytes(b"")
    assert files_of(prepare_corpus(again), tmp_path / "again") == whole


# Prepares a corpus with the settings of its arguments and prints its progress.
_PREPARE = f"""
import sys
from moetrain.config import load_settings
from moetrain.data import corpus, portions
corpus._SECONDS_BETWEEN_PROGRESS, portions.PORTION_BYTES = 0, {PORTION}
corpus.prepare_corpus(load_settings(None, sys.argv[1:]), lambda *progress: print(progress, flush=True))
"""


def _killed_and_resumed(large: Path, folder: Path, phases: list[str]) -> Iterator[dict]:
    """The files of preparations that were each killed in a phase, at a random moment of it, and then resumed."""
    rng = random.Random(3)
    for number, phase in enumerate(phases):
        cache, share = folder / f"killed{number}", rng.random()
        base = [f"data.root={large}", f"data.cache_dir={cache}", "tokenizer.vocab_size=320", "data.heldout_share=0.2"]
        command = [sys.executable, "-c", _PREPARE, *base, *LARGE, "data.workers=2"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                what, done, total = ast.literal_eval(line)
                if what == phase and done >= share * (total or 0):
                    break
            time.sleep(rng.uniform(0, 0.05))
            assert process.poll() is None or phase == "joining the shards"
            process.send_signal(signal.SIGKILL)
        yield files_of(prepare_corpus(chosen(large, cache, *LARGE, "data.workers=2")), cache)


SAMPLING, TRAINING, TOKENIZING = "reading the tokenizer's sample", "training the tokenizer", "tokenizing"


def test_a_killed_preparation_is_resumed_to_the_same_files(large, straight, tmp_path, small_portions):
    assert list(_killed_and_resumed(large, tmp_path, [SAMPLING, TOKENIZING])) == [straight] * 2


@pytest.mark.slow
def test_twelve_kills_at_random_moments_change_nothing(large, straight, tmp_path, small_portions):
    phases = [SAMPLING, TRAINING, *[TOKENIZING] * 8, *["joining the shards"] * 2]
    assert list(_killed_and_resumed(large, tmp_path, phases)) == [straight] * 12


def test_two_simultaneous_preparations_do_the_work_once(corpus_folder, tmp_path, monkeypatch):
    from moetrain.data import corpus as module

    real, calls = module._tokenize, []
    monkeypatch.setattr(module, "_tokenize", lambda *given: (calls.append(1), real(*given)))
    settings, phases = chosen(corpus_folder, tmp_path, "data.domains.d.path=stories.jsonl"), []
    with ThreadPoolExecutor() as pool:
        made = list(pool.map(lambda _: prepare_corpus(settings, lambda what, *_: phases.append(what)), range(2)))
    assert made[0].fingerprint == made[1].fingerprint
    assert len(calls) == 1
    assert phases.count("training the tokenizer") == 1


# Files on disk


def test_corrupt_token_files_are_errors(corpus_folder, tmp_path):
    settings = chosen(corpus_folder, tmp_path, "data.domains.d.path=stories.jsonl", "data.seq_len=64", "panel.tokens=8")
    corpus = prepare_corpus(settings)
    path = tmp_path / f"corpus-{corpus.fingerprint}" / "d" / "tokens.bin"
    whole = path.read_bytes()
    del corpus
    tokens = np.frombuffer(whole, "<u2").copy()
    tokens[:] = 40_000
    path.write_bytes(tokens.tobytes())
    with pytest.raises(DataError, match="domain d: token id 40000 is outside the vocabulary of 320"):
        training_stream(prepare_corpus(settings), settings).batch(0, 0, 1)
    for damaged in (whole[:-2], whole[:-1], b"", whole + b"xx"):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"the prepared data of d is corrupt: remove this folder"):
            prepare_corpus(settings)
    path.write_bytes(whole)
    (path.parent / "index.npy").write_bytes(b"no")
    with pytest.raises(DataError, match=r"the prepared data of d is corrupt"):
        prepare_corpus(settings)


def test_a_source_that_changed_or_vanished_is_noticed(tmp_path):
    write(tmp_path / "a.jsonl", [f"{n} words" for n in range(50)])
    settings = chosen(tmp_path, tmp_path / "cache", "data.domains.d.path=a.jsonl")
    before = prepare_corpus(settings)
    stat = (tmp_path / "a.jsonl").stat()
    (tmp_path / "a.jsonl").write_text((tmp_path / "a.jsonl").read_text().replace("49 words", "49 w0rds"))
    os.utime(tmp_path / "a.jsonl", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert prepare_corpus(settings).fingerprint != before.fingerprint
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(DataError, match="no file at"):
        prepare_corpus(settings)


def test_a_large_file_is_hashed_once_and_again_when_it_changes(tmp_path, monkeypatch):
    path, hashed = tmp_path / "a.bin", []
    path.write_bytes(b"x" * 1000)
    real = hashlib.file_digest
    monkeypatch.setattr(digests, "LARGE", 1000)
    monkeypatch.setattr(digests.hashlib, "file_digest", lambda *given: (hashed.append(1), real(*given))[1])
    first = digests.content_digest(path, tmp_path / "cache")
    assert digests.content_digest(path, tmp_path / "cache") == first
    assert len(hashed) == 2  # so recent that a change might have the same time
    monkeypatch.setattr(digests, "_SETTLED", -(10**12))
    for _ in range(3):
        assert digests.content_digest(path, tmp_path / "cache") == first
    assert len(hashed) == 3
    stat = path.stat()
    time.sleep(0.02)
    with open(path, "r+b") as file:
        file.write(b"y")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert digests.content_digest(path, tmp_path / "cache") != first
    path.write_bytes(b"x" * 999)
    for _ in range(2):
        digests.content_digest(path, tmp_path / "cache")
    assert len(hashed) == 6
    with pytest.raises(DataError, match=r"none: cannot be read \(No such file"):
        digests.content_digest(tmp_path / "none", tmp_path / "cache")


def test_bad_data_is_an_error_before_anything_is_tokenized(tmp_path, monkeypatch):
    write(tmp_path / "a.jsonl", ["fine"])
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write("not json\n")
    monkeypatch.setattr("moetrain.data.corpus._tokenize", None)
    with pytest.raises(DataError, match=r"1 of 2 lines cannot be used, first .*a\.jsonl:2: not JSON"):
        prepare_corpus(chosen(tmp_path, tmp_path / "cache", "data.domains.d.path=a.jsonl"))


def test_prepare_tokenizer_gives_the_tokenizer_of_the_corpus(corpus_folder, tmp_path):
    settings = chosen(corpus_folder, tmp_path, "data.domains.d.path=stories.jsonl")
    tokenizer, path = prepare_tokenizer(settings)
    assert path.read_bytes() == tokenizer.model == prepare_corpus(settings).tokenizer.model


# Parts of the preparation


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9)), max_size=40), st.integers(1, 60), st.integers(1, 5))
def test_a_sample_holds_the_lowest_hashes_in_any_order_and_split(items, budget, split):
    texts = {identity: "x" * size for identity, size in items}
    hashes = {identity: document_id(f"{identity}") for identity in texts}
    wanted, total = [], 0
    for identity in sorted(texts, key=lambda i: hashes[i]):
        if total >= budget:
            break
        wanted.append((hashes[identity], identity, texts[identity]))
        total += len(texts[identity])
    joined = Sample(budget)
    for part in range(split):
        sample = Sample(budget)
        for identity, _ in items[part::split]:
            sample.add(hashes[identity], identity, texts[identity])
        for item in sample.items():
            joined.add(*item)
    assert joined.items() == wanted


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 20), max_size=30))))
def test_seen_ids_behave_like_a_set(steps):
    seen, known = SeenIds(), set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moetrain.data.dedup._RECENT_IDS", 4)
        for at_once, ids in steps:
            if at_once:
                wanted = [i not in known and i not in ids[:n] for n, i in enumerate(ids)]
                assert seen.add_all(np.array(ids, np.uint64)).tolist() == wanted
                known.update(ids)
            else:
                for i in ids:
                    assert (i in seen) == (i in known)
                    seen.add(i)
                    known.add(i)


@pytest.mark.parametrize("workers", [1, 3])
def test_tasks_give_their_results_and_progress(workers):
    results, progress = {}, {}
    run_tasks(tasks.square, [(n,) for n in range(7)], workers, progress.__setitem__, results.__setitem__)
    assert results == {n: n * n for n in range(7)}
    assert progress == {n: n for n in range(7)}


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("data", DataError, "no such thing"),
        ("die", DataError, "ended with status 9: if memory was short, lower data.workers"),
        ("bug", RuntimeError, "ZeroDivisionError: a bug"),
    ],
)
def test_a_failed_task_ends_the_others(kind, error, message):
    began = time.monotonic()
    with pytest.raises(error, match=message):
        run_tasks(tasks.fail, [("wait",), (kind,)], 2, lambda *_: None, lambda *_: None)
    assert time.monotonic() - began < 20


def test_reports_add_up():
    one = DomainReport("d", rows=3, documents=1, bad=2, bad_places=["a", "b"])
    one.add(replace(one, bad_places=[*"cdef"]))
    assert (one.rows, one.documents, one.bad, one.bad_places) == (6, 2, 4, [*"abcde"])
