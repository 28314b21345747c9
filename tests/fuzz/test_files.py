"""Fuzzing of data files and probe items: any content gives rows, each with its text or a problem, or one error."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from moetrain.data.errors import DataError
from moetrain.data.items import read_items
from moetrain.data.sources import read_file
from moetrain.data.sources.rows import Wanted
from tests.fuzz.inputs import TREES, altered, check_refusal, damaged, fuzz

RECORDS = [
    {"text": "Ada has a bread.", "n": 1, "language": "en"},
    {"text": "é漢\U0001f389", "n": None, "language": None},
    {"text": "", "n": 2.5, "answer": "B"},
    {"text": "3 plus 4 is 7.", "n": -1, "answer": [12, 13], "language": "de"},
]
LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS).encode()
ITEMS = [
    {"domain": "a", "task": "t", "id": "1", "prompt": "3 plus 4 is", "sep": " ", "choices": ["7.", "8."], "answer": 0},
    {"domain": "a", "task": "t", "id": "2", "prompt": "Say", "sep": "", "target": "it", "solution": "so"},
]
ITEM_LINES = "".join(json.dumps(item) + "\n" for item in ITEMS).encode()
PLAIN = Wanted.of("text", None)
FILTERED = Wanted.of("text", "n >= 1 and language in ['en', 'de']")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


def read_through(path, wanted=PLAIN, start=0):
    """All rows of a file, checked; None if the file is refused."""
    try:
        rows = list(read_file(path, wanted, start))
    except DataError as error:
        check_refusal(error, path)
        return None
    for row in rows:
        assert row.place.startswith(str(path))
        assert isinstance(row.text, str | None)
        assert row.text is None or row.problem is None
        if row.answer is not None:
            assert 0 <= row.answer[0] < row.answer[1] <= len(row.text)
    assert [row.number for row in rows] == sorted({row.number for row in rows})
    return rows


def test_the_original_files_are_valid(folder):
    (folder / "good.jsonl").write_bytes(LINES)
    assert [row.text for row in read_through(folder / "good.jsonl")] == [record["text"] for record in RECORDS]
    (folder / "items.jsonl").write_bytes(ITEM_LINES)
    assert read_items(folder / "items.jsonl") == ITEMS


@given(damaged(LINES), st.booleans(), st.integers(0, 5))
@fuzz
@example(b"[" * 10**6 + b"\n", False, 0)
@example(b'{"text": ' + b"9" * 5000 + b"}", False, 0)
@example(b'{"text": "\\ud800"}', False, 0)
@example(b'{"text": "a", "text": "b"}\xff', False, 0)
@example(b"\xef\xbb\xbf" + LINES, False, 0)
@example("{}".encode("utf-16"), False, 0)
@example(LINES.replace(b"\n", b"\r"), True, 1)
def test_lines(folder, content, filtered, start):
    path = folder / "damaged.jsonl"
    path.write_bytes(content)
    read_through(path, FILTERED if filtered else PLAIN, start)


@given(st.lists(altered(RECORDS[3]) | TREES, max_size=4), st.booleans())
@fuzz
def test_lines_of_other_json(folder, trees, filtered):
    path = folder / "trees.jsonl"
    path.write_text("".join(json.dumps(tree) + "\n" for tree in trees))
    rows = read_through(path, FILTERED if filtered else PLAIN)
    assert len(rows) == len(trees)


@given(damaged(gzip.compress(LINES, mtime=0)))
@fuzz
def test_compressed_lines(folder, content):
    path = folder / "damaged.jsonl.gz"
    path.write_bytes(content)
    read_through(path)


@given(damaged("Ünïcödé text.\n\nIn two paragraphs.\n".encode() * 3), st.booleans())
@fuzz
def test_plain_text(folder, content, compressed):
    path = folder / ("damaged.txt.gz" if compressed else "damaged.txt")
    path.write_bytes(gzip.compress(content)[: -1 if len(content) % 2 else None] if compressed else content)
    read_through(path)


def parquet(columns, path):
    pq.write_table(pa.table(columns), path, row_group_size=2)
    return path.read_bytes()


@pytest.fixture(scope="module")
def table(folder):
    columns = {name: [record.get(name) for record in RECORDS] for name in ("text", "n", "language")}
    return parquet(columns, folder / "good.parquet")


@given(st.data(), st.booleans(), st.integers(0, 5))
@fuzz
def test_parquet(folder, table, data, filtered, start):
    path = folder / "damaged.parquet"
    path.write_bytes(data.draw(damaged(table)))
    read_through(path, FILTERED if filtered else PLAIN, start)


COLUMNS = st.sampled_from(
    [
        ["a", None],
        [1, 2],
        [b"\xff", b"a"],
        [[1], None],
        [{"x": 1}, {"x": 2}],
        [1.5, float("nan")],
        ["é", "\x00"],
        pa.array(["a", "a"]).dictionary_encode(),
        pa.array([None, None]),
        pa.array(["x", "y"], pa.large_string()),
    ]
)


@given(st.dictionaries(st.sampled_from(["text", "n", "language", "answer", ""]), COLUMNS, max_size=4), st.booleans())
@fuzz
def test_parquet_of_other_columns(folder, columns, filtered):
    path = folder / "columns.parquet"
    parquet(columns, path)
    read_through(path, FILTERED if filtered else PLAIN)


def items_or_says(path):
    try:
        items = read_items(path)
    except DataError as error:
        check_refusal(error, path)
        return
    assert items
    for item in items:
        assert ("target" in item) != ("choices" in item)


@given(damaged(ITEM_LINES))
@fuzz
@example(b"[" * 10**6)
@example(b'{"id": ' + b"9" * 5000 + b"}")
def test_items(folder, content):
    path = folder / "damaged_items.jsonl"
    path.write_bytes(content)
    items_or_says(path)


@given(st.lists(st.sampled_from(ITEMS).flatmap(altered) | TREES, min_size=1, max_size=3))
@fuzz
def test_items_of_other_json(folder, trees):
    path = folder / "other_items.jsonl"
    path.write_text("".join(json.dumps(tree) + "\n" for tree in trees))
    items_or_says(path)
