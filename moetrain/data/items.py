"""Benchmark items: read from .jsonl files, plain or compressed, one per line, and checked."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from moetrain.data.errors import DataError, cannot_read
from moetrain.data.sources.files import kind_of
from moetrain.data.sources.opening import broken, open_plain

Item = Mapping[str, Any]
"""domain, task, id, prompt, sep, and either choices with answer (its index from 0) or target; optionally solution."""


def right_answer(item: Item) -> str:
    """The text of the right choice, or the target."""
    answer: str = item["target"] if "target" in item else item["choices"][item["answer"]]
    return answer


def read_items(path: Path) -> list[Item]:
    """The items of a file.

    Raises:
        DataError: the file cannot be read, or a line is no item.
    """
    items: list[Item] = []
    places = dict[tuple[str, str], int]()
    for line, content in read_lines(path, "item"):
        item = check_item(content, f"{path}:{line}")
        former = places.setdefault((item["task"], item["id"]), line)
        if former != line:
            raise DataError(f"{path}:{line}: id {item['id']!r} is in line {former} already: rename it")
        items.append(item)
    return items


def read_lines(path: Path, what: str) -> Iterator[tuple[int, Any]]:
    """(number from 1, parsed content) of each non-blank line of a JSON Lines file.

    Args:
        what: what a line holds, for error messages.

    Raises:
        DataError: the file or a line cannot be read, or there are no lines.
    """
    if kind_of(path) != "jsonl":
        raise DataError(f"{path}: {what}s are read from .jsonl, plain or compressed: convert it, or give another file")
    line, found = 0, False
    try:
        with open_plain(path) as (file, _):
            for line, content in enumerate(file, 1):
                if content.strip():
                    found = True
                    yield line, _parsed(content, f"{path}:{line}", what)
    except broken as error:
        raise DataError(f"{path}:{line + 1}: cannot be decompressed ({error}): restore the file") from None
    except OSError as error:
        raise cannot_read(path, error) from None
    if not found:
        raise DataError(f"{path}: holds no {what}s: give a file with one per line, or leave it out")


def read_all_items(paths: Iterable[Path]) -> list[Item]:
    """The items of several files.

    Raises:
        DataError: as `read_items`, or two files hold an item of the same task and id.
    """
    items: list[Item] = []
    files: dict[tuple[str, str], Path] = {}
    for path in dict.fromkeys(paths):
        for item in read_items(path):
            former = files.setdefault((item["task"], item["id"]), path)
            if former != path:
                raise DataError(f"{path}: item {item['id']!r} of {item['task']} is in {former} already: remove one")
            items.append(item)
    return items


def _parsed(content: bytes, place: str, what: str) -> Any:
    try:
        return json.loads(content.decode("utf-8"))
    except UnicodeDecodeError:
        raise DataError(f"{place}: not UTF-8: save it as that") from None
    except (ValueError, RecursionError):
        raise DataError(f"{place}: not JSON: write one {what} per line") from None


def check_item(item: Any, place: str) -> Item:
    """Check an item and return it.

    Raises:
        DataError: a field is missing or wrong; the message begins with ``place``.
    """
    if not isinstance(item, dict):
        raise DataError(f"{place}: not an item but a {type(item).__name__}: write an object with prompt, choices, ...")
    for key in ("domain", "task", "id", "prompt", "sep"):
        check_text(item, key, place, empty=key == "sep")
    for key in ("domain", "task"):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", item[key]):
            raise DataError(
                f"{place}: {key} is {item[key]!r}: use letters, digits, '.', '_' and '-' only, it becomes part of tags"
            )
    if ("target" in item) == ("choices" in item):
        raise DataError(f"{place}: give either target, or choices and answer")
    if "solution" in item:
        check_text(item, "solution", place)
    if "target" in item:
        check_text(item, "target", place)
        return item
    choices, answer = item["choices"], item.get("answer")
    if not isinstance(choices, list) or len(choices) < 2:
        raise DataError(f"{place}: choices is no list of two or more texts: give the choices as strings")
    for number, choice in enumerate(choices):
        check_text({f"choice {number}": choice}, f"choice {number}", place)
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise DataError(f"{place}: answer is {answer!r}: give the number of the right one of the choices, from 0")
    return item


def check_text(item: Item, key: str, place: str, empty: bool = False) -> None:
    """Raise DataError if a field is no text, or is empty and ``empty`` is false."""
    text = item.get(key)
    if not isinstance(text, str):
        raise DataError(f"{place}: {key} is {'no text' if key in item else 'missing'}: give it as a string")
    if not empty and not text.strip():
        raise DataError(f"{place}: {key} is empty: fill it in, or leave the item out")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{place}: {key} holds a lone surrogate, which is no Unicode text: remove it") from None
