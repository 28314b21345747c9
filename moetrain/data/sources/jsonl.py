"""JSON Lines, plain or compressed: one object per line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from moetrain.data.errors import DataError
from moetrain.data.sources.opening import broken, open_plain
from moetrain.data.sources.rows import Row, Wanted, json_record


def read(path: Path, wanted: Wanted, start: int) -> Iterator[Row]:
    """Rows from line ``start`` (0 the first); blank lines are skipped.

    Raises:
        DataError: a compressed file is truncated or corrupt.
    """
    number = 0
    with open_plain(path) as (file, position):
        lines = iter(file)
        while True:
            number += 1
            try:
                line = next(lines)
            except StopIteration:
                return
            except broken as error:
                # All later lines are unreadable, so this is an error and not one bad line.
                raise DataError(f"{path}:{number}: the file ends or breaks here ({error}): fetch it again") from None
            if number <= start or not line.strip():
                continue
            record = json_record(line)
            if isinstance(record, str):
                if line.lstrip().startswith(b"["):
                    record += "; a list of objects is read from a file that ends in .json"
                yield Row(None, f"{path}:{number}", number, position(), problem=record)
            else:
                yield wanted.pick(record, f"{path}:{number}", number, position())
