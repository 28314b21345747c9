import contextlib
import gzip
import json
import subprocess
import sys
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moetrain.config import SettingsError, load_settings
from moetrain.data.documents import DataError, DomainReport, read_documents
from moetrain.data.portions import fingerprint, portions
from moetrain.data.sources import read_file, text
from moetrain.data.sources.rows import Wanted
from moetrain.expression import parse_filter
from tests.data.reading import read

TEXT = Wanted("text")


pytestmark = pytest.mark.usefixtures("datasets_cache")


def texts(folder, *overrides):
    return [document.text for document in read(folder, *overrides)[0]]


RECORDS = [{"text": f"document {n}", "language": "en" if n % 2 else "de", "score": n} for n in range(20)]


@pytest.fixture
def same_records(tmp_path):
    """The same rows as JSON Lines, Parquet, and a folder for `datasets`."""
    lines = "".join(json.dumps(record) + "\n" for record in RECORDS)
    (tmp_path / "a.jsonl").write_text(lines)
    pq.write_table(pa.Table.from_pylist(RECORDS), tmp_path / "a.parquet", row_group_size=7)
    (tmp_path / "hub" / "data").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(RECORDS[:12]), tmp_path / "hub" / "data" / "train-0.parquet")
    pq.write_table(pa.Table.from_pylist(RECORDS[12:]), tmp_path / "hub" / "data" / "train-1.parquet")
    pq.write_table(pa.Table.from_pylist(RECORDS[:3]), tmp_path / "hub" / "data" / "test-0.parquet")
    return tmp_path


SOURCES = {
    "jsonl": ["path=a.jsonl"],
    "parquet": ["path=a.parquet"],
    "hub": ["hub=hub"],
    "hub, streaming": ["hub=hub", "streaming=true"],
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_every_source_gives_the_same_documents(same_records, source):
    wanted = read(same_records, "path=a.jsonl")[0]
    assert len(wanted) == 20
    assert read(same_records, *source)[0] == wanted
    filtered = ["filter=language == 'en' and not score < 5", "limit=4"]
    documents, report = read(same_records, *source, *filtered)
    assert [document.text for document in documents] == ["document 5", "document 7", "document 9", "document 11"]
    assert (report.documents, report.filtered, report.rows) == (4, 8, 12)
    assert texts(same_records, *source, "size=25") == ["document 0", "document 1"]


def test_hub_splits_and_configurations(same_records):
    assert texts(same_records, "hub=hub", "split=test") == ["document 0", "document 1", "document 2"]
    card = "---\nconfigs:\n- config_name: small\n  data_files: data/test-0.parquet\n"
    card += "- config_name: large\n  data_files: data/train-*.parquet\n---\n"
    (same_records / "hub" / "README.md").write_text(card)
    assert len(texts(same_records, "hub=hub", "hub_config=small")) == 3
    assert len(texts(same_records, "hub=hub", "hub_config=large", "streaming=true")) == 20


@pytest.mark.parametrize("streaming", ["false", "true"])
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["hub=hub", "split=none"], r"data\.domains\.d\.hub: hub cannot be read: .*none"),
        (["hub=hub", "text_field=body"], r"no column 'body' \(columns: text, language, score\): set text_field"),
        (["hub=hub", "text_field=score"], "column 'score' is int64, not text"),
        (["hub=./none"], "no folder at .*none: correct the path"),
        (["hub=nobody/no-such-set"], r"nobody/no-such-set cannot be read: .*HF_HUB_OFFLINE"),
    ],
)
def test_an_unreadable_hub_data_set_is_an_error_of_one_line(same_records, overrides, message, streaming):
    with pytest.raises(DataError, match=message) as caught:
        read(same_records, *overrides, f"streaming={streaming}")
    assert "\n" not in str(caught.value)


def test_the_fingerprint_of_a_hub_data_set_follows_its_commit(tmp_path, monkeypatch):
    import datasets

    asked = []

    def builder(name, config, revision):
        asked.append((name, config, revision))
        return SimpleNamespace(hash=f"commit of {revision}")

    def of(*overrides):
        chosen = load_settings(None, ["data.domains.d.hub=some/set", *(f"data.domains.d.{o}" for o in overrides)])
        return fingerprint("d", chosen.data.domains["d"], chosen.data, 0)

    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    assert len({of(), of("hub_revision=v1"), of("hub_revision=v2"), of("hub_config=en")}) == 4
    assert asked[1] == ("some/set", None, "v1")


def test_code_of_a_data_set_is_never_run(tmp_path):
    folder = tmp_path / "scripted"
    folder.mkdir()
    (folder / "scripted.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').write('x')\n")
    with pytest.raises(DataError, match="scripted cannot be read"):
        read(tmp_path, "hub=scripted")
    assert not (tmp_path / "ran").exists()


def test_datasets_and_tokenizers_are_imported_only_if_used():
    code = (
        "import sys, moetrain.data.corpus; print([m for m in ('datasets', 'tokenizers', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Text and source code


def test_a_folder_stands_for_all_known_files_below_it_in_order(tmp_path):
    for name in (
        "b/x.py",
        "b/y.md",
        "a.txt",
        "c/z/deep.rs",
        ".git/config.txt",
        "b/.hidden.txt",
        "b/picture.png",
        "LICENSE",
    ):
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_text(f"text of {name}")
    assert texts(tmp_path, "path=tree") == [f"text of {n}" for n in ("a.txt", "b/x.py", "b/y.md", "c/z/deep.rs")]
    assert texts(tmp_path, "path=tree/**/*.py") == ["text of b/x.py"]
    assert texts(tmp_path, "path=tree", "filter=len(text) > 13") == [
        "text of b/x.py",
        "text of b/y.md",
        "text of c/z/deep.rs",
    ]
    with pytest.raises(DataError, match=r"a text file has no column 'score' to filter on"):
        read(tmp_path, "path=tree", "filter=score > 1")
    with pytest.raises(DataError, match=r"LICENSE ends in none of"):
        read(tmp_path, "path=tree/LICENSE")
    with pytest.raises(DataError, match="no file at"):
        read(tmp_path, "path=tree/.git/objects")


def test_a_text_file_may_be_compressed_and_begin_with_a_byte_order_mark(tmp_path):
    with gzip.open(tmp_path / "a.txt.gz", "wb") as file:
        file.write("\ufeffone\r\ntwo".encode())
    assert texts(tmp_path, "path=a.txt.gz") == ["one\r\ntwo"]


def test_a_file_in_another_encoding_is_a_bad_row_with_its_place(tmp_path):
    (tmp_path / "good.txt").write_text("fine")
    (tmp_path / "latin.txt").write_bytes("one\ncaf\u00e9 au lait".encode("latin-1"))
    with pytest.raises(
        DataError, match=r"1 of 2 lines cannot be used, first .*latin\.txt: not UTF-8 \(.* at byte 7, line 2"
    ):
        read(tmp_path, "path=*.txt")
    lines = b'{"text": "fine"}\n' + '{"text": "caf\u00e9"}\n'.encode("latin-1")
    (tmp_path / "a.jsonl").write_bytes(lines)
    with pytest.raises(DataError, match=r"a\.jsonl:2: not UTF-8 \(.* at byte 13\)"):
        read(tmp_path, "path=a.jsonl")


def test_a_truncated_gz_text_is_an_error(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"some text " * 1000)[:-10])
    with pytest.raises(DataError, match=r"a\.txt\.gz: the file ends or breaks after byte 0"):
        read(tmp_path, "path=a.txt.gz")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.sampled_from(["a", "é", "漢", "🎉", "\n", "\n\n"]), min_size=1, max_size=200).map("".join),
    st.integers(4, 64),
)
def test_a_long_text_is_cut_without_loss(tmp_path, monkeypatch, content, longest):
    (tmp_path / "a.txt").write_bytes(content.encode())
    with monkeypatch.context() as patch:
        patch.setattr(text, "LONGEST", longest)
        rows = list(read_file(tmp_path / "a.txt", TEXT))
        assert "".join(row.text for row in rows) == content
        assert all(len(row.text.encode()) <= longest for row in rows)
        assert len(rows) == 1 or all(len(row.text.encode()) > longest // 2 - 4 for row in rows[:-1])
        assert list(read_file(tmp_path / "a.txt", TEXT, 1)) == rows[1:]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_reading_resumes_after_any_row(same_records, name):
    rows = list(read_file(same_records / name, TEXT))
    for start in range(21):
        assert list(read_file(same_records / name, TEXT, start)) == rows[start:]


# Parquet


def test_unusable_parquet_is_an_error_of_one_line(same_records, tmp_path):
    whole = (same_records / "a.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "hole.parquet").write_bytes(whole[:4] + bytes(200) + whole[204:])
    pq.write_table(pa.table({"text": [[1]], "n": [1], "data": [{"body": "a", "n": 1}]}), tmp_path / "nested.parquet")
    pq.write_table(pa.table({"text": [1.5]}), tmp_path / "numbers.parquet")
    for name, message in {
        "cut.parquet": r"cut\.parquet: the file ends or breaks here",
        "hole.parquet": r"hole\.parquet: the file ends or breaks here",
        "nested.parquet": r"nested\.parquet: column 'text' is list<.*>, not text: set text_field to data\.body",
        "numbers.parquet": r"column 'text' is double, not text: give a source with a column of text",
    }.items():
        with pytest.raises(DataError, match=message) as caught:
            read(tmp_path, f"path={name}")
        assert "\n" not in str(caught.value)
    assert texts(tmp_path, "path=nested.parquet", "text_field=data.body") == ["a"]
    with pytest.raises(DataError, match=r"no column 'body' \(columns: text, language, score\): set text_field"):
        read(tmp_path, "path=a.parquet", "text_field=body")
    with pytest.raises(DataError, match=r"no column 'scor' .*: correct the filter"):
        read(tmp_path, "path=a.parquet", "filter=scor > 1")


def test_null_and_badly_encoded_cells_are_bad_rows(tmp_path):
    values = pa.Array.from_buffers(
        pa.string(),
        4,
        [
            pa.py_buffer(b"\x0d"),
            pa.py_buffer(pa.array([0, 4, 4, 8, 12], pa.int32()).buffers()[1]),
            pa.py_buffer(b"goodcaf\xe9fine"),
        ],
    )
    pq.write_table(pa.table({"text": values}), tmp_path / "a.parquet")
    with pytest.raises(
        DataError, match=r"2 of 4 lines cannot be used, first .*a\.parquet, row 2: field 'text' is null"
    ):
        read(tmp_path, "path=a.parquet")
    chosen = load_settings(None, ["data.domains.d.path=a.parquet", f"data.root={tmp_path}", "data.max_bad_share=0.5"])
    report = DomainReport("d")
    got = list(read_documents("d", chosen.data.domains["d"], chosen.data, 0, set(), report))
    assert [document.text for document in got] == ["good", "fine"]
    assert "row 3: not UTF-8" in report.bad_places[1]


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["a.jsonl.gz", "a.parquet", "a.jsonl"]), st.integers(0, 10**6), st.integers(1, 255))
def test_a_corrupt_file_gives_documents_or_one_error(same_records, name, place, flip):
    """With any wrong byte: the rows as written, bad rows with their places, or a DataError."""
    whole = (
        gzip.compress((same_records / "a.jsonl").read_bytes(), mtime=0)
        if name.endswith("gz")
        else (same_records / name).read_bytes()
    )
    place %= len(whole)
    damaged = same_records / f"damaged-{name}"
    damaged.write_bytes(whole[:place] + bytes([whole[place] ^ flip]) + whole[place + 1 :])
    message = ""
    try:
        documents, report = read(same_records, f"path={damaged.name}")
        assert len(documents) <= 21
        assert report.bad == 0
    except DataError as error:
        message = str(error)
    assert message == "" or (damaged.name in message and "\n" not in message)


# Changes of files, and fingerprints


def test_a_file_that_changes_or_vanishes_while_read_is_an_error(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {n}"}) + "\n" for n in range(5)))
    chosen = load_settings(None, ["data.domains.d.path=a.jsonl", f"data.root={tmp_path}"])
    documents = read_documents("d", chosen.data.domains["d"], chosen.data, 0, set(), DomainReport("d"))
    next(documents)
    with open(path, "a") as file:
        file.write('{"text": "more"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl: changed while it was read"):
        list(documents)
    documents = read_documents("d", chosen.data.domains["d"], chosen.data, 0, set(), DomainReport("d"))
    next(documents)
    path.unlink()
    with pytest.raises(DataError, match=r"a\.jsonl: cannot be read \(No such file or directory\): restore it"):
        list(documents)


def test_the_fingerprint_follows_the_settings_that_change_documents(same_records):
    def of(*overrides):
        chosen = load_settings(None, [f"data.root={same_records}", *(f"data.domains.d.{o}" for o in overrides)])
        return fingerprint("d", chosen.data.domains["d"], chosen.data, 0)

    prints = [
        of("path=a.jsonl"),
        of("path=a.jsonl", "filter=score > 1"),
        of("path=a.jsonl", "limit=3"),
        of("path=a.jsonl", "text_field=language"),
        of("hub=hub"),
        of("hub=hub", "split=test"),
    ]
    assert len(set(prints)) == len(prints)
    assert of("hub=hub") == of("hub=hub", "streaming=true") == prints[4]
    (same_records / "hub" / "data" / "test-0.parquet").unlink()
    assert of("hub=hub") != prints[4]


def test_small_files_share_a_portion_and_large_ones_do_not(tmp_path):
    for number, size in enumerate([10, 10, 5_000_000, 10, 3_000_000, 3_000_000]):
        (tmp_path / f"{number}.txt").write_bytes(b"x" * size)

    def of(*overrides):
        chosen = load_settings(None, ["data.domains.d.path=*.txt", f"data.root={tmp_path}", *overrides])
        return [[int(f.path.stem) for f in p.files] for p in portions("d", chosen.data.domains["d"], chosen.data)]

    assert of() == [[0, 1], [2], [3, 4], [5]]
    assert of("data.domains.d.limit=3") == [[0, 1, 2, 3, 4, 5]]


# Filters


@pytest.mark.parametrize(
    ("expression", "kept"),
    [
        ("score >= 3", [3, 4]),
        ("2 <= score < 4", [2, 3]),
        ("language == 'en' or score == 0", [0, 1, 3]),
        ("not (score > 0)", [0]),
        ("language in ['de', 'fr']", [0, 2, 4]),
        ("'e' in language", [0, 1, 2, 3, 4]),
        ("language not in ('de',)", [1, 3]),
        ("len(text) == 1 and score != -1", [0, 1, 2, 3, 4]),
        ("missing == None", [0, 1, 2, 3, 4]),
        ("missing < 3 or len(missing) > 0", []),
    ],
)
def test_filters_keep_the_rows_that_pass(expression, kept):
    rows = [{"score": n, "language": "en" if n % 2 else "de", "text": str(n), "missing": None} for n in range(5)]
    chosen = parse_filter(expression)
    assert [n for n, row in enumerate(rows) if chosen.keeps(row)] == kept


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os').system('x')",
        "text.upper() == 'A'",
        "score + 1 > 2",
        "[x for x in text]",
        "len(text, text) > 1",
        "text[0] == 'a'",
        "lambda: 1",
        "score is None",
        "(x := 3) > score",
        "f'{score}' == '1'",
        "1 < 2",
        "score >",
        "a; b",
        "",
        "[score] == [1]",
        "not " * 2000 + "a",
        "a" * 20000,
    ],
)
def test_other_expressions_are_refused_in_one_line(expression):
    with pytest.raises(SettingsError, match=r"data\.domains\.d\.filter: ") as caught:
        load_settings(None, ["data.domains.d.path=x.jsonl", f"data.domains.d.filter={json.dumps(expression)}"])
    assert "\n" not in str(caught.value)


@given(st.text(st.sampled_from("ab12 <>=!()[],.'+-*/ndotriel:\n"), max_size=30))
def test_any_text_is_parsed_or_is_a_value_error(expression):
    try:
        chosen = parse_filter(expression)
    except ValueError:
        return
    with contextlib.suppress(TypeError):  # e.g. len() of a number
        assert chosen.keeps(dict.fromkeys(chosen.columns, 1)) in (True, False)


def test_a_filter_that_fails_on_a_row_makes_a_bad_row(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a", "score": "high"}\n{"text": "b"}\n{"text": "c", "score": 2}\n')
    chosen = load_settings(
        None,
        [
            "data.domains.d.path=a.jsonl",
            f"data.root={tmp_path}",
            "data.max_bad_share=1",
            "data.domains.d.filter=score > 1",
        ],
    )
    report = DomainReport("d")
    got = list(read_documents("d", chosen.data.domains["d"], chosen.data, 0, set(), report))
    assert [document.text for document in got] == ["c"]
    assert "a.jsonl:1: the filter cannot be applied" in report.bad_places[0]
    assert "a.jsonl:2: no field 'score' for the filter (fields: text)" in report.bad_places[1]
