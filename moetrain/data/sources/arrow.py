"""Arrow IPC files and streams, as Feather and `datasets` write them: memory-mapped, a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from moetrain.data.errors import DataError
from moetrain.data.sources import tabular
from moetrain.data.sources.opening import check_content, ending_by_content
from moetrain.data.sources.rows import Row, Wanted

_ROWS_AT_ONCE = 256


def read(path: Path, wanted: Wanted, start: int) -> Iterator[Row]:
    """Rows from number ``start`` (0 the first).

    Raises:
        DataError: the file is not Arrow IPC or corrupt, a column is missing, or the text column is not text.
    """
    number = 0
    check_content(path)
    if not path.stat().st_size:
        raise DataError(f"{path}: is empty, which no Arrow file is: fetch it again")
    try:
        with pa.memory_map(str(path)) as source:
            is_file = ending_by_content(path) == ".arrow"  # else a stream, which has no mark of its own
            reader = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
            columns = _roots(tabular.fetched(str(path), reader.schema, wanted), reader.schema)
            for batch, position in _batches(reader, source):
                chosen = batch.select(columns)
                for column in chosen.columns:
                    _validate(column)
                for first in range(max(0, start - number), len(batch), _ROWS_AT_ONCE):
                    piece = chosen.slice(first, _ROWS_AT_ONCE)
                    yield from tabular.rows(piece, wanted, str(path), number + first + 1, position)
                number += len(batch)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise tabular.broken(path, number, error) from None


def _roots(columns: list[str], schema: Any) -> list[str]:
    """The columns that hold these; a struct is mapped as a whole, which costs nothing."""
    return list(dict.fromkeys(name if name in schema.names else name.partition(".")[0] for name in columns))


def _batches(reader: Any, source: Any) -> Iterator[tuple[Any, int]]:
    """Batches, each with the bytes read so far."""
    if isinstance(reader, pa.ipc.RecordBatchFileReader):
        for number in range(reader.num_record_batches):
            yield reader.get_batch(number), source.size() * (number + 1) // reader.num_record_batches
    else:
        for batch in reader:
            yield batch, source.tell()


def _validate(array: Any) -> None:
    """Raise ArrowInvalid if offsets lead outside of the data: Arrow itself trusts them. Text need not be UTF-8.

    Arrow checks an array from its outside to its inside and stops at text that is not UTF-8, so each part is checked.
    """
    if pa.types.is_dictionary(array.type):
        _validate(array.dictionary)
    for number in range(array.type.num_fields if pa.types.is_struct(array.type) else 0):
        _validate(array.field(number))
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type) or pa.types.is_fixed_size_list(array.type):
        array.validate()
        _validate(array.values)
    try:
        array.validate(full=True)
    except pa.ArrowInvalid as error:
        if "UTF8" not in str(error):
            raise
