"""What every source yields: rows, each with its place, and its text or the problem with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from moetrain.expression import Filter, parse_filter


class Row(NamedTuple):
    """A line, row or document of a source; ``text`` is None if it is filtered out or cannot be used."""

    text: str | None
    place: str  # for messages: file and line or row
    number: int  # rows of the source read so far, with this one: where to resume
    position: int  # bytes on disk read so far
    problem: str | None = None  # why it cannot be used
    answer: tuple[int, int] | None = None  # range of characters marked as the answer
    heldout: bool | None = None  # set if the source decides whether the text is held out


@dataclass(frozen=True)
class Wanted:
    """Which column holds the text, and which rows to use."""

    text_field: str
    filter: Filter | None = None

    @classmethod
    def of(cls, text_field: str, filter_text: str | None) -> Wanted:
        return cls(text_field, parse_filter(filter_text) if filter_text is not None else None)

    @property
    def columns(self) -> list[str]:
        """The columns to read."""
        return list(dict.fromkeys((self.text_field, *(self.filter.columns if self.filter else ()))))

    def pick(self, record: Mapping[str, Any], place: str, number: int, position: int) -> Row:
        """Make a row of a record."""
        if self.filter is not None:
            try:
                if not self.filter.keeps(record):
                    return Row(None, place, number, position)
            except KeyError as error:
                return Row(
                    None, place, number, position, problem=f"no field {error} for the filter ({_fields(record)})"
                )
            except TypeError as error:
                return Row(None, place, number, position, problem=f"the filter cannot be applied ({error})")
        text = record.get(self.text_field)
        if isinstance(text, str):
            return _with_answer(text, record.get("answer"), place, number, position)
        if text is None:
            problem = f"no field {self.text_field!r} ({_fields(record)}; set text_field)"
            if self.text_field in record:
                problem = f"field {self.text_field!r} is null"
        else:
            problem = f"field {self.text_field!r} is a {type(text).__name__}, not text"
        return Row(None, place, number, position, problem=problem)


def _with_answer(text: str, answer: Any, place: str, number: int, position: int) -> Row:
    # In many files "answer" is the answer itself or the number of a choice. Only a list marks characters.
    if not isinstance(answer, list):
        return Row(text, place, number, position)
    if len(answer) != 2 or any(type(at) is not int for at in answer) or not 0 <= answer[0] < answer[1] <= len(text):
        problem = f"answer {answer} marks no characters of the text ({len(text)} long): [start, end)"
        return Row(None, place, number, position, problem=problem)
    return Row(text, place, number, position, answer=(answer[0], answer[1]))


def _fields(record: Mapping[str, Any]) -> str:
    return f"fields: {', '.join(sorted(map(str, record))) or 'none'}"


def json_record(line: bytes) -> Mapping[str, Any] | str:
    """The object of a JSON line, or the problem with it."""
    try:
        record = json.loads(line)
    except UnicodeDecodeError as error:
        return f"not {error.encoding.upper()} ({error.reason} at byte {error.start})"
    except (ValueError, RecursionError) as error:
        return f"not JSON ({error})"
    return record if isinstance(record, Mapping) else f"a {type(record).__name__}, not an object"
