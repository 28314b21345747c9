"""Parquet files: the columns that are needed, a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from moetrain.data.errors import DataError
from moetrain.data.sources.rows import Row, Wanted

_ROWS_AT_ONCE = 256
_BUFFER = 2**20  # bytes; without it a whole column of a row group is buffered, which may be gigabytes


def read(path: Path, wanted: Wanted, start: int) -> Iterator[Row]:
    """Rows from number ``start`` (0 the first).

    Raises:
        DataError: the file is not Parquet or corrupt, a column is missing, or the text column is not text.
    """
    number = 0
    try:
        with pq.ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False) as file:
            check_columns(str(path), file.schema_arrow, wanted)
            rows, size = max(1, file.metadata.num_rows), path.stat().st_size
            groups: list[int] = []
            for group in range(file.num_row_groups):
                inside = file.metadata.row_group(group).num_rows
                if not groups and number + inside <= start:
                    number += inside
                else:
                    groups.append(group)
            for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=groups, columns=wanted.columns):
                position = size * (number + len(batch)) // rows
                columns = [_values(column) for column in batch.columns]
                for values in zip(*columns, strict=True):
                    number += 1
                    if number <= start:
                        continue
                    place = f"{path}, row {number}"
                    bad = next((value for value in values if isinstance(value, UnicodeDecodeError)), None)
                    if bad is not None:
                        yield Row(
                            None, place, number, position, problem=f"not UTF-8 ({bad.reason} at byte {bad.start})"
                        )
                        continue
                    record = dict(zip(batch.schema.names, values, strict=True))
                    yield wanted.pick(record, place, number, position)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        where = f"{path}, row {number + 1}" if number else f"{path}"
        reason = str(error).partition("\n")[0]
        raise DataError(f"{where}: the file ends or breaks here ({reason}): fetch it again") from None


def check_columns(place: str, schema: pa.Schema, wanted: Wanted) -> None:
    """Raise DataError if a column is missing or the text column is not text."""
    for column in wanted.columns:
        if column not in schema.names:
            known = " ".join(", ".join(schema.names).split())  # a corrupt name may hold a line break
            remedy = "set text_field" if column == wanted.text_field else "correct the filter"
            raise DataError(f"{place}: no column {column!r} (columns: {known}): {remedy}")
    kind = schema.field(wanted.text_field).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise DataError(f"{place}: column {wanted.text_field!r} is {kind}, not text: set text_field to one of text")


def _values(column: Any) -> list[Any]:
    """A column as Python values, with an error in place of each value that is not UTF-8."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_value(cell) for cell in column]


def _value(cell: Any) -> Any:
    try:
        return cell.as_py()
    except UnicodeDecodeError as error:
        return error
