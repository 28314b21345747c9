"""Parquet files: the columns that are needed, a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from moetrain.data.sources import tabular
from moetrain.data.sources.opening import check_content
from moetrain.data.sources.rows import Row, Wanted

_ROWS_AT_ONCE = 256
_BUFFER = 2**20  # bytes; without it a whole column of a row group is buffered, which may be gigabytes


def read(path: Path, wanted: Wanted, start: int) -> Iterator[Row]:
    """Rows from number ``start`` (0 the first).

    Raises:
        DataError: the file is not Parquet or corrupt, a column is missing, or the text column is not text.
    """
    number = 0
    check_content(path)
    try:
        with pq.ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False) as file:
            columns = tabular.fetched(str(path), file.schema_arrow, wanted)
            count, size = max(1, file.metadata.num_rows), path.stat().st_size
            groups: list[int] = []
            for group in range(file.num_row_groups):
                inside = file.metadata.row_group(group).num_rows
                if not groups and number + inside <= start:
                    number += inside
                else:
                    groups.append(group)
            for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=groups, columns=columns):
                position = size * (number + len(batch)) // count
                if number + len(batch) > start:
                    skipped = max(0, start - number)
                    yield from tabular.rows(batch.slice(skipped), wanted, str(path), number + skipped + 1, position)
                number += len(batch)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise tabular.broken(path, number, error) from None
