import gzip
import json

import pytest

from moetrain.data.errors import DataError
from moetrain.data.instructions import read_instructions


def written(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_each_form_is_read_and_files_keep_their_order(tmp_path):
    first = written(
        tmp_path / "first.jsonl",
        {"prompt": "1 plus 1 is", "answer": "2."},
        "",
        {"prompt": "Say", "answer": "hi", "sep": ":\n", "task": "greeting"},
        {"instruction": "Add.", "input": "3 and 4", "output": "7", "text": "ignored"},
        {"instruction": "Greet.", "input": " ", "output": "Hello."},
        {"instruction": "Greet.", "input": None, "output": "Hi."},
    )
    second = tmp_path / "second.jsonl.gz"
    turns = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello."), ("user", "Bye"), ("assistant", "Bye.")]
    messages = [{"role": role, "content": content} for role, content in turns]
    second.write_bytes(gzip.compress(json.dumps({"prompt": "ignored", "messages": messages}).encode()))
    assert [example.text for example in read_instructions([second, first, second])] == [
        "### System:\nBe brief.\n\n### User:\nHi\n\n### Assistant:\nHello.",
        "### System:\nBe brief.\n\n### User:\nHi\n\n### Assistant:\nHello.\n\n### User:\nBye\n\n### Assistant:\nBye.",
        "1 plus 1 is 2.",
        "Say:\nhi",
        "### Instruction:\nAdd.\n\n### Input:\n3 and 4\n\n### Response:\n7",
        "### Instruction:\nGreet.\n\n### Response:\nHello.",
        "### Instruction:\nGreet.\n\n### Response:\nHi.",
    ]
    answers = [example.answer for example in read_instructions([first, second])]
    assert answers == ["2.", "hi", "7", "Hello.", "Hi.", "Hello.", "Bye."]


GOOD = {"prompt": "a", "answer": "b"}
USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("{", "not JSON: write one example per line"),
        ([1], "not an example but a list"),
        ({}, "has no fields: give prompt and answer, instruction and output, or messages"),
        ({"question": "a", "answer": "b"}, "has question, answer: give prompt and answer"),
        ({"prompt": "a"}, "answer is missing"),
        ({"prompt": "a", "answer": 3}, "answer is no text"),
        ({"prompt": " ", "answer": "b"}, "prompt is empty"),
        ({"prompt": "a", "answer": "b\ud800"}, "answer holds a lone surrogate"),
        ({"prompt": "a", "answer": "b", "sep": 1}, "sep is no text"),
        ({"instruction": "a", "input": "b"}, "output is missing"),
        ({"instruction": "a", "input": 1, "output": "b"}, "input is no text"),
        ({"messages": []}, "messages is no list of messages"),
        ({"messages": [USER]}, "messages hold no turn of the assistant"),
        ({"messages": [ASSISTANT]}, "message 0: the assistant speaks first"),
        ({"messages": [USER, {"role": "tool", "content": "c"}]}, "message 1: its role is 'tool'"),
        ({"messages": ["a"]}, "message 0: its role is in a str"),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, "message 1: content is empty"),
    ],
)
def test_a_malformed_example_is_an_error_of_one_line_with_its_place(tmp_path, row, expected):
    path = written(tmp_path / "bad.jsonl", GOOD, "", row, GOOD)
    with pytest.raises(DataError) as caught:
        read_instructions([path])
    assert str(caught.value).startswith(f"{path}:3: {expected}")
    assert "\n" not in str(caught.value)


def test_files_without_examples_are_errors(tmp_path):
    (tmp_path / "table.parquet").write_bytes(b"")
    (tmp_path / "blank.jsonl").write_text("\n\n")
    (tmp_path / "torn.jsonl.gz").write_bytes(gzip.compress(json.dumps(GOOD).encode() * 1000)[:-20])
    for name, expected in {
        "table.parquet": "examples are read from .jsonl",
        "blank.jsonl": "holds no examples",
        "torn.jsonl.gz": "cannot be decompressed",
        "none.jsonl": "cannot be read",
    }.items():
        with pytest.raises(DataError, match=expected):
            read_instructions([tmp_path / name])
