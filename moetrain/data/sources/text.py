"""Plain text and source code: each file is a document; files over 1 MiB are cut where paragraphs end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from moetrain.data.errors import DataError
from moetrain.data.sources.opening import broken, open_plain
from moetrain.data.sources.rows import Row, Wanted

LONGEST = 2**20  # bytes of a document


def read(path: Path, wanted: Wanted, start: int) -> Iterator[Row]:
    """Documents of a file from number ``start`` (0 the first). A document that is not UTF-8 is a bad row.

    The only column is the text, so that a filter can use its length.

    Raises:
        DataError: a compressed file is truncated or corrupt, or the filter uses other columns.
    """
    others = [column for column in wanted.columns if column != wanted.text_field]
    if others:
        raise DataError(
            f"{path}: a text file has no column {others[0]!r} to filter on or split by: only {wanted.text_field!r}"
        )
    number = begin = 0
    rest = b""
    with open_plain(path) as (file, position):
        while True:
            try:
                more = file.read(LONGEST + 1 - len(rest))
            except broken as error:
                raise DataError(
                    f"{path}: the file ends or breaks after byte {begin + len(rest)} ({error}): fetch it again"
                ) from None
            buffer = rest + more
            if not buffer:
                return
            cut = len(buffer) if len(buffer) <= LONGEST else _cut(buffer)
            document, rest = buffer[:cut], buffer[cut:]
            number += 1
            if number > start:
                # Most files are one document, so the place of the first has no number.
                place = f"{path}" if begin == 0 else f"{path}, from byte {begin}"
                yield _row(document, wanted, place, number, position(), begin)
            begin += cut


def _row(document: bytes, wanted: Wanted, place: str, number: int, position: int, begin: int) -> Row:
    try:
        text = document.decode("utf-8-sig" if begin == 0 else "utf-8")
    except UnicodeDecodeError as error:
        line = document[: error.start].count(b"\n") + 1
        problem = f"not UTF-8 ({error.reason} at byte {begin + error.start}, line {line} of it)"
        return Row(None, place, number, position, problem=problem)
    return wanted.pick({wanted.text_field: text}, place, number, position)


def _cut(buffer: bytes) -> int:
    """Where to cut a buffer longer than a document: after the last blank line, else line, else character."""
    for end in (b"\n\n", b"\n"):
        at = buffer.rfind(end, LONGEST // 2, LONGEST)
        if at >= 0:
            return at + len(end)
    cut = LONGEST
    while cut > LONGEST - 4 and buffer[cut] & 0xC0 == 0x80:  # a continuation byte of a character
        cut -= 1
    return cut
