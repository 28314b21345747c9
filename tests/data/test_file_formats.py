"""Every format of file gives the same documents, and one that is broken or of another kind is one error that helps."""

import bz2
import datetime
import gzip
import io
import json
import lzma

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moetrain.data.documents import DataError
from moetrain.data.sources import json_values, read_file
from moetrain.data.sources.rows import Wanted
from tests.data.reading import read
from tests.fuzz.inputs import check_refusal, damaged, fuzz

RECORDS = [
    {
        "text": f"Dokument {n} \u00fcber {n * n}.",
        "answer": [0, 8],
        "meta": {"lang": "de" if n % 3 else "en", "score": n, "about": {"body": f"a body {n}"}},
        "tags": ["a", "b"][: n % 3],
        "parts": [{"say": f"one {n}"}, {"say": "two"}],
        "id": n,
    }
    for n in range(40)
]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
COMPRESS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pa.compress(data, codec="zstd", asbytes=True),
}


pytestmark = pytest.mark.usefixtures("datasets_cache")


def table():
    return pa.Table.from_pylist(RECORDS)


def write_ipc(new, path, batch_rows=7, options=None):
    with pa.OSFile(str(path), "wb") as sink, new(sink, table().schema, options=options) as writer:
        writer.write_table(table(), max_chunksize=batch_rows)


def with_column(kind):
    """The same table with its text as another type of text."""
    made = table()
    return made.set_column(0, "text", made["text"].cast(kind) if kind != "dictionary" else dictionary(made["text"]))


def dictionary(column):
    return column.dictionary_encode()


def saved(path):
    import datasets

    datasets.Dataset.from_list(RECORDS).save_to_disk(path, num_shards=3)


def saved_splits(path):
    import datasets

    whole = datasets.Dataset.from_list(RECORDS)
    datasets.DatasetDict({"train": whole, "test": datasets.Dataset.from_list(RECORDS[:3])}).save_to_disk(path)


FORMATS = {
    "jsonl": ("a.jsonl", lambda path: path.write_bytes(LINES)),
    **{
        f"jsonl{ending}": (f"a.jsonl{ending}", lambda path, compress=compress: path.write_bytes(compress(LINES)))
        for ending, compress in COMPRESS.items()
    },
    "zstd, several frames": (
        "a.jsonl.zst",
        lambda path: path.write_bytes(COMPRESS[".zst"](LINES[:999]) + COMPRESS[".zst"](LINES[999:])),
    ),
    "json, lines": ("a.json", lambda path: path.write_bytes(LINES)),
    "json, a list": ("a.json", lambda path: path.write_text(json.dumps(RECORDS, indent=2))),
    "json, a list in one line": ("a.json", lambda path: path.write_text(json.dumps(RECORDS))),
    "json, a packed list": ("a.json.xz", lambda path: path.write_bytes(lzma.compress(json.dumps(RECORDS).encode()))),
    "json, a list with a byte order mark": ("a.json", lambda path: path.write_text(json.dumps(RECORDS), "utf-8-sig")),
    "json, objects over several lines": (
        "a.json",
        lambda path: path.write_text("".join(json.dumps(record, indent=2) + "\n" for record in RECORDS)),
    ),
    "parquet": ("a.parquet", lambda path: pq.write_table(table(), path, row_group_size=7)),
    "parquet, large": ("a.parquet", lambda path: pq.write_table(with_column(pa.large_string()), path)),
    "parquet, view": ("a.parquet", lambda path: pq.write_table(with_column(pa.string_view()), path)),
    "parquet, dictionary": ("a.parquet", lambda path: pq.write_table(with_column("dictionary"), path)),
    "arrow": ("a.arrow", lambda path: write_ipc(pa.ipc.new_file, path)),
    "arrow, a stream": ("a.arrow", lambda path: write_ipc(pa.ipc.new_stream, path)),
    "arrow, compressed": (
        "a.arrow",
        lambda path: write_ipc(pa.ipc.new_file, path, options=pa.ipc.IpcWriteOptions(compression="zstd")),
    ),
    "feather": ("a.feather", lambda path: feather.write_feather(table(), str(path), compression="lz4")),
    "save_to_disk": ("saved", saved),
}


@pytest.fixture(scope="module", params=FORMATS)
def written(request, tmp_path_factory):
    """The path of the records in some format."""
    name, write = FORMATS[request.param]
    path = tmp_path_factory.mktemp("formats") / name
    write(path)
    return path


def test_every_format_gives_the_same_documents_with_their_answers(written):
    documents, report = read(written.parent, f"path={written.name}")
    assert [document.text for document in documents] == [record["text"] for record in RECORDS]
    assert {document.answer for document in documents} == {(0, 8)}
    assert (report.rows, report.bad, report.left_out) == (40, 0, 0)


def test_fields_inside_of_others_hold_the_text_and_choose_rows(written):
    documents, report = read(
        written.parent,
        f"path={written.name}",
        "text_field=meta.about.body",
        "filter=meta.lang == 'de' and len(tags) > 1 and meta.score < 12 and 'two' in parts.say",
    )
    assert [document.text for document in documents] == [f"a body {n}" for n in (2, 5, 8, 11)]
    assert report.filtered == 36
    documents, _ = read(written.parent, f"path={written.name}", "text_field=parts.say", "filter=id < 2")
    assert [document.text for document in documents] == ["one 0\ntwo", "one 1\ntwo"]


def test_reading_resumes_after_any_row(written):
    files = sorted(written.glob("*.arrow")) if written.is_dir() else [written]
    for path in files:
        rows = list(read_file(path, Wanted("text")))
        assert [row.number for row in rows] == list(range(1, len(rows) + 1))
        for start in range(len(rows) + 1):
            assert list(read_file(path, Wanted("text"), start)) == rows[start:]


def test_a_field_whose_name_has_a_dot_is_found_before_one_inside_another(tmp_path):
    record = {"a.b": "outer", "a": {"b": "inner", "c": "other"}}
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    pq.write_table(pa.Table.from_pylist([record]), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        for field, text in {"a.b": "outer", "a.c": "other"}.items():
            assert [d.text for d in read(tmp_path, f"path={name}", f"text_field={field}")[0]] == [text]


def test_a_missing_field_inside_of_others_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINES)
    pq.write_table(table(), tmp_path / "a.parquet")
    columns = "text, answer, meta.lang, meta.score, meta.about.body, tags, parts, id"
    with pytest.raises(DataError, match=rf"no column 'meta\.body' \(columns: {columns}\): set text_field"):
        read(tmp_path, "path=a.parquet", "text_field=meta.body")
    with pytest.raises(DataError, match=r"a\.jsonl:1: no field 'meta\.body' \(fields: answer, id, meta\.about\.body"):
        read(tmp_path, "path=a.jsonl", "text_field=meta.body")
    with pytest.raises(DataError, match=r"no column 'meta\.none' .*: correct the filter"):
        read(tmp_path, "path=a.parquet", "filter=meta.none > 1")
    with pytest.raises(DataError, match=r"a\.jsonl:1: no field 'meta\.none' for the filter"):
        read(tmp_path, "path=a.jsonl", "filter=meta.none > 1")


def test_an_answer_column_that_marks_nothing_is_no_mark(tmp_path):
    for name, values in {"text": ["yes", "no"], "number": [3, 4], "texts": [["yes"], []]}.items():
        pq.write_table(pa.table({"text": ["a text", "another"], "answer": values}), tmp_path / f"{name}.parquet")
        documents, report = read(tmp_path, f"path={name}.parquet")
        assert [document.answer for document in documents] == [None, None]
        assert report.bad == 0
    pq.write_table(pa.table({"text": ["a text"], "answer": [[0, 99]]}), tmp_path / "wrong.parquet")
    with pytest.raises(DataError, match=r"wrong\.parquet, row 1: answer \[0, 99\] marks no characters"):
        read(tmp_path, "path=wrong.parquet")


def test_answers_are_kept_from_a_local_data_set(tmp_path):
    (tmp_path / "hub").mkdir()
    pq.write_table(table(), tmp_path / "hub" / "train.parquet")
    wanted, _ = read(tmp_path, "path=hub")
    for streaming in ("false", "true"):
        assert read(tmp_path, "hub=hub", f"streaming={streaming}")[0] == wanted
        nested, _ = read(tmp_path, "hub=hub", f"streaming={streaming}", "text_field=meta.about.body", "filter=id < 1")
        assert [document.text for document in nested] == ["a body 0"]
    assert {document.answer for document in wanted} == {(0, 8)}


# Folders of datasets.save_to_disk


def test_a_saved_data_set_is_read_by_path_and_as_hub_and_its_papers_are_not(tmp_path):
    saved(tmp_path / "saved")
    saved_splits(tmp_path / "splits")
    wanted, report = read(tmp_path, "path=saved")
    assert len(wanted) == 40
    assert report.left_out == 0
    assert read(tmp_path, "hub=saved")[0] == wanted
    assert read(tmp_path, "hub=splits")[0] == read(tmp_path, "path=splits/train")[0] == wanted
    assert read(tmp_path, "hub=splits", "split=test")[0] == wanted[:3]
    (tmp_path / "all").mkdir()
    (tmp_path / "saved").rename(tmp_path / "all" / "saved")
    assert read(tmp_path, "path=all")[0] == wanted


def test_a_saved_data_set_that_cannot_be_read_as_asked_is_one_error_that_helps(tmp_path):
    saved(tmp_path / "saved")
    saved_splits(tmp_path / "splits")
    with pytest.raises(DataError, match=r"splits holds the splits train, test of one data set: give the folder of one"):
        read(tmp_path, "path=splits")
    with pytest.raises(DataError, match=r"no split 'dev' \(splits: train, test\): set split to one of them"):
        read(tmp_path, "hub=splits", "split=dev")
    with pytest.raises(DataError, match=r"holds the split train alone: set split to it"):
        read(tmp_path, "hub=saved", "split=dev")
    state = json.loads((tmp_path / "saved" / "state.json").read_text())
    chosen = state | {"_indices_data_files": [{"filename": "indices.arrow"}]}
    (tmp_path / "saved" / "state.json").write_text(json.dumps(chosen))
    with pytest.raises(DataError, match=r"saved: its rows are chosen by indices .* to_parquet"):
        read(tmp_path, "path=saved")
    (tmp_path / "saved" / "state.json").write_text(json.dumps(state))
    (tmp_path / "saved" / "data-00001-of-00003.arrow").unlink()
    with pytest.raises(DataError, match=r"data-00001-of-00003\.arrow: is missing"):
        read(tmp_path, "hub=saved")


# Files that are cut short, or hold something else than their names say


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".txt"])
def test_a_compressed_file_that_is_cut_short_is_an_error(tmp_path, ending, kind):
    content = json.dumps(RECORDS * 50).encode() if kind == ".json" else LINES * 50
    whole = COMPRESS[ending](content)
    path = tmp_path / f"a{kind}{ending}"
    for cut in (len(whole) - 1, len(whole) // 2, 12):
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=rf"a\{kind}\{ending}.*the file ends or breaks") as caught:
            read(tmp_path, f"path={path.name}")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ending", COMPRESS)
def test_a_name_that_hides_or_claims_compression_is_told_and_the_remedy_helps(tmp_path, ending):
    (tmp_path / "hidden.jsonl").write_bytes(COMPRESS[ending](LINES))
    with pytest.raises(DataError, match=rf"hidden\.jsonl: holds \w+ data: rename it to end in \{ending}"):
        read(tmp_path, "path=hidden.jsonl")
    (tmp_path / "hidden.jsonl").rename(tmp_path / f"hidden.jsonl{ending}")
    assert len(read(tmp_path, f"path=hidden.jsonl{ending}")[0]) == 40
    (tmp_path / f"plain.jsonl{ending}").write_bytes(LINES)
    with pytest.raises(DataError, match=r"is no \w+ data \(begins with b'.*'\): fetch it again, or rename it"):
        read(tmp_path, f"path=plain.jsonl{ending}")


def test_a_table_under_a_wrong_name_is_told_and_the_remedy_helps(tmp_path):
    pq.write_table(table(), tmp_path / "a.jsonl")
    write_ipc(pa.ipc.new_file, tmp_path / "b.parquet")
    for name, ending in {"a.jsonl": ".parquet", "b.parquet": ".arrow"}.items():
        with pytest.raises(DataError, match=rf"holds \w+ data: rename it to end in \{ending}"):
            read(tmp_path, f"path={name}")
        (tmp_path / name).rename(tmp_path / f"right{ending}")
        assert len(read(tmp_path, f"path=right{ending}")[0]) == 40


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.arrow", "a.txt", "a.jsonl.zst"])
def test_a_pointer_of_git_lfs_is_told(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(DataError, match=rf"{name}: is a Git LFS pointer, not the data itself: run git lfs pull"):
        read(tmp_path, f"path={name}")


def test_arrow_that_is_cut_short_or_empty_is_an_error(tmp_path):
    for write in (pa.ipc.new_file, pa.ipc.new_stream):
        write_ipc(write, tmp_path / "a.arrow")
        whole = (tmp_path / "a.arrow").read_bytes()
        for cut in (len(whole) // 2, 20, 0):
            (tmp_path / "a.arrow").write_bytes(whole[:cut])
            with pytest.raises(DataError, match=r"a\.arrow.*: (the file ends or breaks here|is empty)") as caught:
                read(tmp_path, "path=a.arrow")
            assert "\n" not in str(caught.value)


@given(st.data(), st.booleans())
@fuzz
def test_a_corrupt_arrow_file_gives_rows_or_one_error(tmp_path_factory, data, stream):
    path = tmp_path_factory.getbasetemp() / "corrupt.arrow"
    write_ipc(pa.ipc.new_stream if stream else pa.ipc.new_file, path)
    whole = bytearray(path.read_bytes())
    for _ in range(3):
        whole[data.draw(st.integers(8, len(whole) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(whole)
    try:
        rows = list(read_file(path, Wanted.of("text", "meta.score >= 0 or 'two' in parts.say")))
    except DataError as error:
        check_refusal(error, path)
        return
    assert len(rows) <= 40


@given(st.data(), st.sampled_from(["list", "objects", *COMPRESS]), st.integers(0, 3))
@fuzz
def test_damaged_json_and_compressed_files_give_rows_or_one_error(tmp_path_factory, data, form, start):
    content = {
        "list": json.dumps(RECORDS[:4], indent=1).encode(),
        "objects": "\n".join(json.dumps(record, indent=1) for record in RECORDS[:4]).encode(),
    }.get(form)
    content = content or COMPRESS[form](LINES[:600])
    path = tmp_path_factory.getbasetemp() / ("damaged.json" if form in ("list", "objects") else f"damaged.jsonl{form}")
    path.write_bytes(data.draw(damaged(content)))
    try:
        rows = list(read_file(path, Wanted("text"), start))
    except DataError as error:
        check_refusal(error, path)
        return
    assert all((row.text is None) != (row.problem is None) and row.place.startswith(str(path)) for row in rows)


# JSON that is not one object a line


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "a"}, {"text": "b"}', r"a\.json, value 3: not JSON \(the file ends within its list\)"),
        ('[{"text": "a"}, {"text": "b', r"a\.json, value 2: not JSON \(Unterminated string"),
        ('[{"text": "a"} {"text": "b"}]', r"a\.json, value 2: not JSON \('{' between two items\)"),
        ('[{"text": "a"}, oops]', r"a\.json, value 2: not JSON \(Expecting value\), nor can be what follows: correct"),
        ('[{"text": "a"}]\n[{"text": "b"}]', r"a\.json, value 2: not JSON \('\[' after its list\)"),
        (b'[{"text": "a"}, {"text": "caf\xe9"}]', r"a\.json, value 1: not UTF-8 .*: save the file as UTF-8"),
        ("[" * 5000, r"a\.json, value 1: not JSON"),
        (
            '[{"text": "a"}, 5, {"n": 1}]',
            r"2 of 3 lines cannot be used, first .*a\.json, value 2: a int, not an object",
        ),
    ],
)
def test_a_list_that_breaks_off_is_one_error_with_its_place(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path, "path=a.json")
    assert "\n" not in str(caught.value)


def test_an_empty_list_has_no_documents(tmp_path):
    (tmp_path / "a.json").write_text(" [ ]\n")
    with pytest.raises(DataError, match=r"no documents in a\.json"):
        read(tmp_path, "path=a.json")


def test_a_list_in_a_file_of_lines_is_called_by_name_and_the_remedy_helps(tmp_path):
    for content in (json.dumps(RECORDS), json.dumps(RECORDS, indent=1)):
        (tmp_path / "a.jsonl").write_text(content)
        with pytest.raises(
            DataError, match=r"a\.jsonl:1: .*; a list of objects is read from a file that ends in \.json"
        ):
            read(tmp_path, "path=a.jsonl")
        (tmp_path / "a.jsonl").rename(tmp_path / "a.json")
        assert len(read(tmp_path, "path=a.json")[0]) == 40


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=8,
)


@given(st.lists(VALUES, max_size=6), st.integers(1, 40), st.sampled_from([None, 1]), st.booleans())
@fuzz
def test_any_values_are_read_as_written_whatever_is_read_at_once(tmp_path_factory, values, chunk, indent, as_list):
    path = tmp_path_factory.getbasetemp() / "values.json"
    ensure = {"ensure_ascii": len(values) % 2 == 0, "indent": indent}
    text = json.dumps(values, **ensure) if as_list else "\n".join(json.dumps(value, **ensure) for value in values)
    try:
        path.write_text(text, encoding="utf-8")
    except UnicodeEncodeError:  # a lone surrogate
        return
    if not as_list and text.startswith("["):  # the first value is taken for the list of all
        return
    with pytest.MonkeyPatch.context() as patch, open(path, "rb") as file:
        patch.setattr(json_values, "_CHUNK", chunk)
        found = list(json_values._values(file, path))
    assert found == values


# Data sets that `datasets` changes


@pytest.mark.parametrize("streaming", ["false", "true"])
@pytest.mark.parametrize(
    ("files", "message", "wanted"),
    [
        (
            {"a": [{"text": "x"}], "b": [{"text": "y", "n": 1}]},
            "hub cannot be read: .*: give the folder as path",
            ["x", "y"],
        ),
        (
            {"a": [{"text": "2024-01-01"}, {"text": "2024-01-02"}]},
            r"reads column 'text' as Value\('timestamp\[s\]'\), not as text: give the folder as path",
            ["2024-01-01", "2024-01-02"],
        ),
    ],
    ids=["other columns", "dates"],
)
def test_what_datasets_cannot_read_or_changes_is_told_and_the_remedy_helps(tmp_path, files, message, wanted, streaming):
    (tmp_path / "hub").mkdir()
    for name, records in files.items():
        (tmp_path / "hub" / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(DataError, match=message):
        read(tmp_path, "hub=hub", f"streaming={streaming}")
    assert [document.text for document in read(tmp_path, "path=hub")[0]] == wanted


def test_text_that_datasets_takes_for_other_json_is_told(tmp_path):
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "a.jsonl").write_text('{"text": "abc"}\n{"text": 7}\n{"text": "007"}\n')
    with pytest.raises(DataError, match=r"reads column 'text' as Json\(.*\), not as text: give the folder as path"):
        read(tmp_path, "hub=hub")


def test_dates_are_told_from_text_in_parquet(tmp_path):
    days = [datetime.date(2024, 1, day) for day in (1, 2)]
    pq.write_table(pa.table({"text": days, "body": ["a", "b"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"column 'text' is date32\[day\], not text: set text_field to body"):
        read(tmp_path, "path=a.parquet")
    assert len(read(tmp_path, "path=a.parquet", "text_field=body")[0]) == 2


def test_a_column_that_is_missing_or_changes_in_a_later_file_is_told_with_the_file(tmp_path):
    pq.write_table(table(), tmp_path / "0.parquet")
    pq.write_table(pa.table({"body": ["a"]}), tmp_path / "1.parquet")
    with pytest.raises(DataError, match=r"1\.parquet: no column 'text' \(columns: body\): set text_field"):
        read(tmp_path, "path=*.parquet")
    pq.write_table(pa.table({"text": [1], "body": ["a"]}), tmp_path / "1.parquet")
    with pytest.raises(DataError, match=r"1\.parquet: column 'text' is int64, not text: set text_field to body"):
        read(tmp_path, "path=*.parquet")
    (tmp_path / "a.jsonl").write_bytes(LINES + b'{"text": 7}\n')
    with pytest.raises(DataError, match=r"1 of 41 lines .*a\.jsonl:41: field 'text' is a int, not text"):
        read(tmp_path, "path=a.jsonl")
    pq.write_table(pa.table({"n": [1]}), tmp_path / "1.parquet")
    with pytest.raises(
        DataError, match=r"1\.parquet: no column 'text' \(columns: n\): leave it out, no column is text"
    ):
        read(tmp_path, "path=*.parquet")
    assert len(read(tmp_path, "path=0.parquet")[0]) == 40


def test_zstd_as_its_own_tools_write_it_is_read(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    whole = zstandard.ZstdCompressor(level=19, write_checksum=True).compress(LINES)
    skipped = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"size"  # as pzstd puts before each frame
    stream = io.BytesIO()
    with zstandard.ZstdCompressor().stream_writer(stream, closefd=False) as file:  # without the size of its content
        file.write(LINES)
    for content in (whole, skipped + whole, stream.getvalue(), stream.getvalue() + whole):
        (tmp_path / "a.jsonl.zst").write_bytes(content)
        documents, report = read(tmp_path, "path=a.jsonl.zst")
        assert len(documents) == 40
        assert report.rows in (40, 80)
    (tmp_path / "a.jsonl.zst").write_bytes(whole[:-1])  # its checksum
    with pytest.raises(DataError, match="the file ends or breaks"):
        read(tmp_path, "path=a.jsonl.zst")


def test_zstd_in_a_local_data_set_needs_a_package_or_is_read_whole(tmp_path, monkeypatch):
    pytest.importorskip("zstandard")
    (tmp_path / "hub").mkdir()
    path = tmp_path / "hub" / "a.jsonl.zst"
    path.write_bytes(COMPRESS[".zst"](LINES))
    assert len(read(tmp_path, "hub=hub")[0]) == 40
    path.write_bytes(COMPRESS[".zst"](LINES)[:-40])
    with pytest.raises(DataError, match=r"a\.jsonl\.zst: the file ends or breaks before its end .*: fetch it again"):
        read(tmp_path, "hub=hub")
    path.write_bytes(COMPRESS[".zst"](LINES))
    import fsspec.compression
    import fsspec.utils

    monkeypatch.delitem(fsspec.compression.compr, "zstd")
    monkeypatch.setattr("moetrain.data.sources.hub.importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"compressed by zstd, .*: pip install 'moetrain\[zstd\]', or give the folder"):
        read(tmp_path, "hub=hub", "streaming=true")
    assert len(read(tmp_path, "path=hub")[0]) == 40
