"""Files at URLs are fetched once into the cache and read like those on disk."""

import functools
import gzip
import http.server
import json
import threading

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moetrain.config import load_settings
from moetrain.data.corpus import prepare_corpus
from moetrain.data.documents import DataError, DomainReport, read_documents
from moetrain.data.portions import fingerprint


def lines(*texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


@pytest.fixture
def memory():
    """An empty file system in memory, whose files are at memory://."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pseudo_dirs[:] = [""]
    yield system
    system.store.clear()


def settings(tmp_path, path, *overrides):
    base = [f"data.cache_dir={tmp_path / 'cache'}", f"data.domains.d.path={path}", "tokenizer.vocab_size=300"]
    return load_settings(None, [*base, "data.heldout_share=0.2", *overrides])


def read(tmp_path, path, *overrides):
    chosen = settings(tmp_path, path, *overrides)
    report = DomainReport("d")
    return [d.text for d in read_documents("d", chosen.data.domains["d"], chosen.data, 0, set(), report)], report


def fill(memory):
    table = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": ["a row"]}), table)
    contents = {
        "bucket/a/0.jsonl.gz": gzip.compress(lines("zero")),
        "bucket/a/1.jsonl.zst": pa.compress(lines("one"), codec="zstd", asbytes=True),
        "bucket/a/deep/2.parquet": table.getvalue().to_pybytes(),
        "bucket/a/README.md": b"# About",
        "bucket/a/b.csv": b"text\n",
        "bucket/a/.hidden/x.jsonl": lines("hidden"),
        "bucket/other/3.jsonl": lines("three"),
    }
    for name, content in contents.items():
        memory.pipe_file(f"/{name}", content)


def test_files_folders_and_patterns_at_urls_are_read_like_those_on_disk(memory, tmp_path):
    fill(memory)
    assert read(tmp_path, "memory://bucket/a/0.jsonl.gz")[0] == ["zero"]
    for path in ("memory://bucket/a", "memory://bucket/a/**", "memory://bucket/a*"):
        texts, report = read(tmp_path, path)
        assert texts == ["zero", "one", "a row"]
        assert report.left_out >= 2
        assert "1 text beside files of rows (bucket/a/README.md)" in report.left_out_files
        assert "1 of a kind that is not read (bucket/a/b.csv)" in report.left_out_files
    assert read(tmp_path, "memory://bucket/*/*.jsonl*")[0] == ["zero", "one", "three"]
    assert read(tmp_path, "other", "data.root=memory://bucket")[0] == ["three"]
    assert read(tmp_path, "[memory://bucket/other, memory://bucket/a/0.jsonl.gz]")[0] == ["three", "zero"]


def test_a_file_is_fetched_once_and_again_when_it_changes(memory, tmp_path, monkeypatch):
    fill(memory)
    fetched = []
    real = type(memory).get_file

    def get_file(system, remote, local, **more):
        fetched.append(remote)
        return real(system, remote, local, **more)

    monkeypatch.setattr(type(memory), "get_file", get_file)
    chosen = settings(tmp_path, "memory://bucket/other/*.jsonl")

    def of():
        return fingerprint("d", chosen.data.domains["d"], chosen.data, 0)

    first = of()
    assert of() == first
    assert fetched == ["/bucket/other/3.jsonl"]
    memory.pipe_file("/bucket/other/3.jsonl", lines("3hree"))
    assert of() != first
    assert read(tmp_path, "memory://bucket/other/*.jsonl")[0] == ["3hree"]
    assert len(fetched) == 2


def test_a_corpus_is_prepared_from_urls(memory, tmp_path):
    for part in range(3):
        memory.pipe_file(f"/c/{part}.jsonl", lines(*(f"text {part} {n} of a corpus" for n in range(40))))
    corpus = prepare_corpus(settings(tmp_path, "memory://c/*.jsonl", "data.workers=2"))
    assert corpus.domains[0].report.documents == 120
    assert prepare_corpus(settings(tmp_path, "memory://c/*.jsonl")).fingerprint == corpus.fingerprint


def test_an_error_names_the_file_and_row_at_the_url(memory, tmp_path):
    memory.pipe_file("/bucket/bad.jsonl", b'{"text": "fine"}\nnot json\n')
    with pytest.raises(DataError, match=r"memory/bucket/bad\.jsonl:2: not JSON"):
        read(tmp_path, "memory://bucket/bad.jsonl")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "memory://bucket/none.jsonl",
            r"data\.domains\.d\.path: memory://bucket/none\.jsonl cannot be read: FileNotFound",
        ),
        (
            "memory://bucket/no*.jsonl",
            r"data\.domains\.d\.path: no file at memory://bucket/no\*\.jsonl: correct the URL",
        ),
        ("memory://bucket/a/b.csv", r"bucket/a/b\.csv is a table that is not read: write it as Parquet"),
        ("memory://bucket/a/*.csv", r"no file at .* can be read: 1 of a kind that is not read \(bucket/a/b\.csv\)"),
        ("nosuch://bucket/a", r"nosuch://bucket/a cannot be read: ValueError: Protocol not known: nosuch"),
    ],
)
def test_what_cannot_be_had_is_an_error_of_one_line(memory, tmp_path, path, message):
    fill(memory)
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path, path)
    assert "\n" not in str(caught.value)


def test_a_bucket_that_denies_and_a_missing_package_are_told(memory, tmp_path, monkeypatch):
    def deny(system, path, **more):
        raise PermissionError("Access Denied")

    monkeypatch.setattr(type(memory), "isdir", deny)
    with pytest.raises(
        DataError, match=r"memory://b/a\.jsonl cannot be read: .*Access Denied: give the rights to read"
    ):
        read(tmp_path, "memory://b/a.jsonl")

    def missing(url, **more):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(
        DataError, match=r"s3://b/a\.jsonl: Install s3fs to access S3: pip install 'moetrain\[remote\]'"
    ):
        read(tmp_path, "s3://b/a.jsonl")


def test_a_file_that_arrives_cut_short_is_not_kept(memory, tmp_path, monkeypatch):
    fill(memory)
    real = type(memory).get_file

    def cut(system, remote, local, **more):
        with open(local, "wb") as file:
            file.write(memory.cat_file(remote)[:-3])

    monkeypatch.setattr(type(memory), "get_file", cut)
    with pytest.raises(DataError, match=r"other/3\.jsonl: 15 of 18 bytes were fetched: run the command again"):
        read(tmp_path, "memory://bucket/other/3.jsonl")
    monkeypatch.setattr(type(memory), "get_file", real)
    assert read(tmp_path, "memory://bucket/other/3.jsonl")[0] == ["three"]


@pytest.fixture
def server(tmp_path):
    """The URL of a web server of a folder with one file."""
    (tmp_path / "www").mkdir()
    (tmp_path / "www" / "a.jsonl").write_bytes(lines("over http"))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / "www")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as made:
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{made.server_port}"
        made.shutdown()
        thread.join()


def test_files_of_a_web_server_are_read(server, tmp_path):
    pytest.importorskip("aiohttp")
    assert read(tmp_path, f"{server}/a.jsonl")[0] == ["over http"]
    assert read(tmp_path, f"'{server}/a.jsonl?download=true'")[0] == ["over http"]
    with pytest.raises(DataError, match=r"none\.jsonl cannot be read: FileNotFoundError"):
        read(tmp_path, f"{server}/none.jsonl")


@pytest.fixture
def bucket(monkeypatch):
    """An S3 server with a bucket, on this machine."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    s3fs = pytest.importorskip("s3fs")
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "name")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()
    system = s3fs.S3FileSystem()
    system.mkdir("bucket")
    yield system
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def test_files_of_an_s3_bucket_are_read(bucket, tmp_path, monkeypatch):
    for part in range(3):
        bucket.pipe_file(f"bucket/d/{part}.jsonl", lines(f"text {part}"))
    bucket.pipe_file("bucket/d/README.md", b"# About")
    texts, report = read(tmp_path, "s3://bucket/d")
    assert texts == ["text 0", "text 1", "text 2"]
    assert report.left_out_files == ["1 text beside files of rows (bucket/d/README.md)"]
    bucket.pipe_file("bucket/d/1.jsonl", lines("other"))
    assert read(tmp_path, "s3://bucket/d/*.jsonl")[0] == ["text 0", "other", "text 2"]
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    type(bucket).clear_instance_cache()
    with pytest.raises(
        DataError, match=r"d/1\.jsonl cannot be read: NoCredentialsError: .*: give the rights to read it"
    ):
        read(tmp_path, "s3://bucket/d/1.jsonl")
