"""What every source yields: rows, each with its place, and its text or the problem with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from moetrain.expression import Filter, field_value, parse_filter


class Row(NamedTuple):
    """A line, row or document of a source; text and tokens are None if it is filtered out or cannot be used."""

    text: str | None
    place: str  # for messages: file and line or row
    number: int  # rows of the source read so far, with this one: where to resume
    position: int  # bytes on disk read so far
    problem: str | None = None  # why it cannot be used
    answer: tuple[int, int] | None = None  # range of characters marked as the answer
    heldout: bool | None = None  # set if the source decides whether the text is held out
    group: str | None = None  # value of the field that the domain is split by
    elsewhere: bool = False  # belongs to another domain of the same source
    tokens: np.ndarray | None = None  # ids, in place of the text, if the source holds them

    @property
    def content(self) -> str | np.ndarray | None:
        """The text or the ids."""
        return self.text if self.tokens is None else self.tokens

    @property
    def is_empty(self) -> bool:
        """Whether there is text but only white space, or no id."""
        return not len(self.tokens) if self.tokens is not None else self.text is not None and not self.text.strip()


ANSWER = "answer"
"""The field that marks the answer; unlike the others it need not be there."""


@dataclass(frozen=True)
class Wanted:
    """The fields to read: which holds the text, and those that choose the rows. ``a.b`` is field b of field a."""

    text_field: str
    filter: Filter | None = None
    by: str | None = None
    value: str | None = None

    @classmethod
    def of(cls, text_field: str, filter_text: str | None, by: str | None = None, value: str | None = None) -> Wanted:
        """The fields that settings of these names ask for."""
        return cls(text_field, parse_filter(filter_text) if filter_text is not None else None, by, value)

    @property
    def columns(self) -> dict[str, str]:
        """The fields that must be there, each with what helps if it is not."""
        found = {self.text_field: "set text_field"}
        if self.by is not None:
            found.setdefault(self.by, "correct by")
        for name in self.filter.columns if self.filter is not None else ():
            found.setdefault(name, "correct the filter")
        return found

    def pick(self, record: Mapping[str, Any], place: str, number: int, position: int) -> Row:
        """Make a row of a record."""

        def bad(problem: str) -> Row:
            return Row(None, place, number, position, problem=problem)

        if self.filter is not None:
            try:
                if not self.filter.keeps(record):
                    return Row(None, place, number, position)
            except KeyError as error:
                return bad(f"no field {error} for the filter (fields: {', '.join(field_names(record)) or 'none'})")
            except (TypeError, ValueError) as error:  # ValueError: whether an array of ids is true
                return bad(f"the filter cannot be applied ({error})")
        group = None
        if self.by is not None:
            try:
                value = field_value(record, self.by)
            except KeyError:
                return bad(f"no field {self.by!r} for by (fields: {', '.join(field_names(record)) or 'none'})")
            group = group_name(value)
            if group is None:
                return bad(f"field {self.by!r}, which by names, is {_kind(value)}: leave such rows out by filter")
            if self.value not in (None, group):
                return Row(None, place, number, position, elsewhere=True)
        try:
            text = field_value(record, self.text_field)
        except KeyError:
            names = field_names(record)
            return bad(
                f"no field {self.text_field!r} (fields: {', '.join(names) or 'none'}; "
                f"{'set text_field' if field_names(record, str) else 'none of them is text'})"
            )
        if isinstance(text, np.ndarray):
            return Row(None, place, number, position, group=group, tokens=text)
        if isinstance(text, list) and all(isinstance(part, str) for part in text):
            text = "\n".join(text)
        if isinstance(text, str):
            return _with_answer(text, record.get(ANSWER), place, number, position)._replace(group=group)
        if text is None:
            return bad(f"field {self.text_field!r} is null")
        return bad(f"field {self.text_field!r} is a {type(text).__name__}, not text")


def group_name(value: Any) -> str | None:
    """A value that rows are split by, as text; None if it is null, empty or no text, whole number or truth value."""
    if isinstance(value, bool):
        return str(value).lower()
    return (str(value) or None) if isinstance(value, str | int) else None


def _kind(value: Any) -> str:
    return "null" if value is None else "empty" if value == "" else f"a {type(value).__name__}"


def field_names(record: Mapping[str, Any], kind: type = object) -> list[str]:
    """The fields of a record, sorted, with those inside of others as ``a.b``; only those of a kind."""
    names: list[str] = []
    for name, value in record.items():
        if isinstance(value, Mapping) and value:
            names += [f"{name}.{inner}" for inner in field_names(value, kind)]
        elif isinstance(value, kind):
            names.append(str(name))
    return sorted(names)


def _with_answer(text: str, answer: Any, place: str, number: int, position: int) -> Row:
    # In many files "answer" is the answer itself or the number of a choice. Only a list marks characters.
    if not isinstance(answer, list):
        return Row(text, place, number, position)
    if len(answer) != 2 or any(type(at) is not int for at in answer) or not 0 <= answer[0] < answer[1] <= len(text):
        problem = f"answer {answer} marks no characters of the text ({len(text)} long): [start, end)"
        return Row(None, place, number, position, problem=problem)
    return Row(text, place, number, position, answer=(answer[0], answer[1]))


def json_record(line: bytes) -> Mapping[str, Any] | str:
    """The object of a JSON line, or the problem with it."""
    try:
        record = json.loads(line)
    except UnicodeDecodeError as error:
        return f"not {error.encoding.upper()} ({error.reason} at byte {error.start})"
    except (ValueError, RecursionError) as error:
        return f"not JSON ({error})"
    return record if isinstance(record, Mapping) else f"a {type(record).__name__}, not an object"
