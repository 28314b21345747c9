"""Where text comes from: JSON Lines, Parquet, plain text and source code, and data sets of the hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from moetrain.data.errors import DataError
from moetrain.data.sources import jsonl, text
from moetrain.data.sources.files import kind_of
from moetrain.data.sources.rows import Row, Wanted


def read_file(path: Path, wanted: Wanted, start: int = 0) -> Iterator[Row]:
    """Rows of one file from number ``start``, read by what its name ends in.

    Raises:
        DataError: a file that cannot be read to its end, or has no such column.
    """
    try:
        match kind_of(path):
            case "jsonl":
                yield from jsonl.read(path, wanted, start)
            case "text":
                yield from text.read(path, wanted, start)
            case "parquet":
                from moetrain.data.sources import parquet  # pyarrow takes a while to import

                yield from parquet.read(path, wanted, start)
            case None:
                raise DataError(f"{path}: not known how to read it")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}): restore it") from None
