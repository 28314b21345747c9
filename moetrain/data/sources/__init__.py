"""Sources of text: JSON, Parquet, Arrow, plain text and source code, and data sets of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from moetrain.data.errors import DataError, cannot_read
from moetrain.data.sources import json_values, jsonl, text
from moetrain.data.sources.files import kind_of, plain_name
from moetrain.data.sources.rows import Row, Wanted


def read_file(path: Path, wanted: Wanted, start: int = 0) -> Iterator[Row]:
    """Rows of a file from number ``start``, read according to the end of its name.

    Raises:
        DataError: the file cannot be read to its end, or lacks a column.
    """
    try:
        match kind_of(path):
            case "jsonl" if plain_name(path).lower().endswith(".json") and not json_values.holds_lines(path):
                yield from json_values.read(path, wanted, start)
            case "jsonl":
                yield from jsonl.read(path, wanted, start)
            case "text":
                yield from text.read(path, wanted, start)
            case "parquet":
                from moetrain.data.sources import parquet  # importing pyarrow is slow

                yield from parquet.read(path, wanted, start)
            case "arrow":
                from moetrain.data.sources import arrow

                yield from arrow.read(path, wanted, start)
            case None:
                raise DataError(f"{path}: files of this kind cannot be read")
    except OSError as error:
        raise cannot_read(path, error) from None
