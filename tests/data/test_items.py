import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain.data.errors import DataError
from moetrain.data.items import check_item, read_all_items, read_items, right_answer


def item(prompt, target=None, *, choices=None, answer=0, task="t", name="a", sep=" "):
    rest = {"target": target or "-"} if choices is None else {"choices": choices, "answer": answer}
    return {"domain": "d", "task": task, "id": name, "prompt": prompt, "sep": sep, **rest}


def write(path, rows):
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


@pytest.mark.parametrize("name", ["p.jsonl", "p.jsonl.gz"])
def test_items_are_read(tmp_path, name):
    items = [item("a b", "c", name="1"), item("é", choices=["x", "y"], answer=1, name="2"), item("z", "z", task="u")]
    assert read_items(write(tmp_path / name, [items[0], "", *items[1:]])) == items


GOOD = item("a", choices=["x", "y"])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "not an item but a list"),
        ({**GOOD, "prompt": 3}, "prompt is no text"),
        ({key: value for key, value in GOOD.items() if key != "id"}, "id is missing"),
        ({**GOOD, "target": "x"}, "either target, or choices and answer"),
        ({key: value for key, value in GOOD.items() if key != "choices"}, "either target, or choices and answer"),
        ({**GOOD, "choices": "xy"}, "choices is no list of two or more texts"),
        ({**GOOD, "choices": []}, "choices is no list of two or more texts"),
        ({**GOOD, "choices": ["x"]}, "choices is no list of two or more texts"),
        ({**GOOD, "choices": ["x", 1]}, "choice 1 is no text"),
        ({**GOOD, "choices": ["x", " "]}, "choice 1 is empty"),
        ({**GOOD, "answer": None}, "answer is None"),
        ({key: value for key, value in GOOD.items() if key != "answer"}, "answer is None"),
        ({**GOOD, "answer": 2}, "answer is 2"),
        ({**GOOD, "answer": True}, "answer is True"),
        ({**GOOD, "answer": -1}, "answer is -1"),
        ({**item("a"), "target": 5}, "target is no text"),
        ({**item("a"), "target": ""}, "target is empty"),
        ({**item("a", "b"), "solution": 5}, "solution is no text"),
        ({**GOOD, "prompt": "\n"}, "prompt is empty"),
        ({**GOOD, "prompt": "\ud800"}, "prompt holds a lone surrogate"),
        ({**GOOD, "task": "a b"}, "task is 'a b'"),
        ({**GOOD, "domain": "a/b"}, "domain is 'a/b'"),
        ({**GOOD, "id": "first"}, "id 'first' is in line 1 already"),
    ],
)
def test_a_broken_line_is_one_clear_error_with_file_and_line(tmp_path, row, message):
    path = write(tmp_path / "p.jsonl", [{**GOOD, "id": "first"}, row])
    with pytest.raises(DataError) as caught:
        read_items(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_broken_file_is_one_clear_error(tmp_path):
    whole = write(tmp_path / "p.jsonl.gz", [{**GOOD, "id": str(n)} for n in range(1000)]).read_bytes()
    (tmp_path / "p.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}\n')
    cases = {
        "p.jsonl.gz": r"p\.jsonl\.gz:\d+: cannot be decompressed",
        "latin.jsonl": r"latin\.jsonl:1: not UTF-8",
        "none.jsonl": "none.jsonl: cannot be read",
        "p.txt": "are read from .jsonl",
        "empty.jsonl": "holds no items",
    }
    write(tmp_path / "empty.jsonl", [""])
    for name, message in cases.items():
        with pytest.raises(DataError, match=message):
            read_items(tmp_path / name)


def test_two_files_with_one_item_are_an_error(tmp_path):
    one, other = write(tmp_path / "t.jsonl", [item("a")]), write(tmp_path / "v.jsonl", [item("b")])
    assert read_all_items([one, one]) == [item("a")]
    with pytest.raises(DataError, match=r"v\.jsonl: item 'a' of t is in .*t\.jsonl already"):
        read_all_items([one, other])


values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@given(
    st.sampled_from([item("a", "b"), item("a", choices=["x", "y"])]),
    st.dictionaries(st.sampled_from(sorted({*GOOD, "target", "solution"})), values, max_size=3),
)
@settings(max_examples=300, deadline=None)
def test_any_item_is_accepted_unchanged_or_refused_in_one_line(good, changes):
    changed = {**good, **changes}
    message = None
    try:
        assert check_item(changed, "p.jsonl:7") is changed
    except DataError as error:
        message = str(error)
    if message is None:
        assert all(changed[key].strip() for key in ("domain", "task", "id", "prompt"))
        assert right_answer(changed).strip()
    else:
        assert message.startswith("p.jsonl:7: ")
        assert "\n" not in message
