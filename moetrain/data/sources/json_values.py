"""A .json file that holds a list of objects, or objects over several lines: read a value at a time."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from moetrain.data.errors import DataError
from moetrain.data.sources.opening import broken, open_plain
from moetrain.data.sources.rows import Row, Wanted

_HEAD = 2**16  # bytes by which the layout is told
_CHUNK = 2**20  # bytes read at once
_LONGEST_SIGN = 16  # characters that the decoder looks ahead, as for \uD83C\uDF89 or -Infinity
_NUMBER_GOES_ON = "0123456789.eE+-"  # or the empty text, where no more is held
_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()


def holds_lines(path: Path) -> bool:
    """Whether a .json file holds one object a line. If not, it holds a list, or objects over several lines.

    Raises:
        DataError: a compressed file is truncated or corrupt.
    """
    try:
        with open_plain(path) as (file, _):
            head = file.read(_HEAD).removeprefix(codecs.BOM_UTF8).lstrip()
    except broken as error:
        raise DataError(f"{path}: the file ends or breaks at its begin ({error}): fetch it again") from None
    line, newline, _ = head.partition(b"\n")
    return not line.startswith(b"[") and not (newline and line.startswith(b"{") and line.rstrip()[-1:] in b"{[,")


def read(path: Path, wanted: Wanted, start: int) -> Iterator[Row]:
    """Rows from value ``start`` (0 the first).

    Raises:
        DataError: the file breaks off or is no JSON from some value on, or a compressed file is corrupt.
    """
    with open_plain(path) as (file, position):
        values = _values(file, path)
        number = 0
        while True:
            number += 1
            place = f"{path}, value {number}"
            try:
                value = next(values)
            except StopIteration:
                return
            except broken as error:
                raise DataError(f"{place}: the file ends or breaks here ({error}): fetch it again") from None
            except UnicodeDecodeError as error:
                raise DataError(f"{place}: not UTF-8 ({error.reason}) soon after: save the file as UTF-8") from None
            except (ValueError, RecursionError) as error:
                reason = getattr(error, "msg", str(error))
                raise DataError(f"{place}: not JSON ({reason}), nor can be what follows: correct the file") from None
            if number <= start:
                continue
            if isinstance(value, Mapping):
                yield wanted.pick(value, place, number, position())
            else:
                problem = f"a {type(value).__name__}, not an object"
                yield Row(None, place, number, position(), problem=problem)


def _values(file: IO[bytes], path: Path) -> Iterator[Any]:
    """The items of a list, or the values that follow each other.

    Raises:
        ValueError: what follows is no JSON.
    """
    text = _Text(file)
    in_list = text.sign() == "["
    if in_list:
        text.at += 1
        if text.sign() == "]":
            text.at += 1
            text.expect_end()
            return
    while in_list or text.sign():
        yield text.value()
        if in_list:
            sign = text.sign()
            if sign not in (",", "]"):
                raise ValueError("the file ends within its list" if not sign else f"{sign!r} between two items")
            text.at += 1
            if sign == "]":
                text.expect_end()
                return


class _Text:
    """The characters of a file, held as far as the value that is read needs them."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._utf8 = file, codecs.getincrementaldecoder("utf-8-sig")()
        self._held, self.at, self._ended = "", 0, False

    def _fill(self) -> None:
        """Read on, at least as much again as is held, so that a long value is tried a few times only."""
        data = self._file.read(max(_CHUNK, len(self._held) - self.at))
        self._held = self._held[self.at :] + self._utf8.decode(data, final=not data)
        self.at, self._ended = 0, not data

    def sign(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            match = _SPACE.match(self._held, self.at)
            assert match is not None
            self.at = match.end()
            if self.at < len(self._held) or self._ended:
                return self._held[self.at : self.at + 1]
            self._fill()

    def value(self) -> Any:
        """The next value.

        Raises:
            ValueError: it is no JSON.
        """
        self.sign()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._held, self.at)
                if self._ended or self._held[end : end + 1] not in _NUMBER_GOES_ON:
                    self.at = end
                    return value
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self._held) - _LONGEST_SIGN
                if self._ended or not cut:
                    raise
            self._fill()

    def expect_end(self) -> None:
        if self.sign():
            raise ValueError(f"{self.sign()!r} after its list")
