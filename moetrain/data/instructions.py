"""Instruction data sets: prompts and responses from .jsonl or .jsonl.gz files, one example per line.

A line has one of three forms, recognized by its fields in this order:

    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}, ...]}
    {"instruction": ..., "input": ..., "output": ...}                       # input may be missing or empty
    {"prompt": ..., "answer": ..., "sep": ...}                              # sep may be missing: a space

The third is used as it is, like a probe item. The others are formatted as paragraphs with headings
(``### Instruction:`` and so on), the response last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moetrain.data.errors import DataError
from moetrain.data.items import check_text, read_lines

ROLES = ("system", "user", "assistant")


class Example(NamedTuple):
    """A prompt and the response to learn; ``prompt + sep + answer`` is the text."""

    prompt: str
    sep: str
    answer: str

    @property
    def text(self) -> str:
        return "".join(self)


def read_instructions(paths: Sequence[Path]) -> list[Example]:
    """The examples of files, in their order.

    A conversation gives one example per turn of the assistant, with everything before it as the prompt.

    Raises:
        DataError: a file cannot be read, or a line has none of these forms.
    """
    return [
        example
        for path in dict.fromkeys(paths)
        for line, content in read_lines(path, "example")
        for example in examples_of(content, f"{path}:{line}")
    ]


def examples_of(content: Any, place: str) -> list[Example]:
    """The examples of one line; see `read_instructions`."""
    if not isinstance(content, dict):
        raise DataError(f"{place}: not an example but a {type(content).__name__}: write an object with prompt, answer")
    if "messages" in content:
        return _conversation(content["messages"], place)
    if "instruction" in content:
        for key in ("instruction", "output"):
            check_text(content, key, place)
        asked = [("Instruction", content["instruction"])]
        if content.get("input") is not None:
            check_text(content, "input", place, empty=True)
            asked += [("Input", content["input"])] if content["input"].strip() else []
        return [Example(_layout(asked) + "### Response:", "\n", content["output"])]
    if "prompt" not in content:
        fields = ", ".join(map(str, content)) or "no fields"
        raise DataError(f"{place}: has {fields}: give prompt and answer, instruction and output, or messages")
    for key in ("prompt", "answer"):
        check_text(content, key, place)
    if "sep" in content:
        check_text(content, "sep", place, empty=True)
    return [Example(content["prompt"], content.get("sep", " "), content["answer"])]


def _conversation(messages: Any, place: str) -> list[Example]:
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{place}: messages is no list of messages: give objects with role and content")
    said: list[tuple[str, str]] = []
    examples = []
    for number, message in enumerate(messages):
        where = f"{place}: message {number}"
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            found = repr(message.get("role")) if isinstance(message, Mapping) else f"in a {type(message).__name__}"
            raise DataError(f"{where}: its role is {found}: give an object whose role is one of {', '.join(ROLES)}")
        role = message["role"]
        check_text(message, "content", where, empty=role == "system")
        if role == "assistant":
            if not said:
                raise DataError(f"{where}: the assistant speaks first: put what it answers before it")
            examples.append(Example(_layout(said) + "### Assistant:", "\n", message["content"]))
        if message["content"].strip():
            said.append((role.capitalize(), message["content"]))
    if not examples:
        raise DataError(f"{place}: messages hold no turn of the assistant: add one, or leave the line out")
    return examples


def _layout(parts: Sequence[tuple[str, str]]) -> str:
    return "".join(f"### {heading}:\n{text}\n\n" for heading, text in parts)
