"""Rows of Arrow tables, which Parquet and Arrow files hold: the columns that are needed, and whether they are text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from moetrain.data.errors import DataError
from moetrain.data.sources.rows import ANSWER, Row, Wanted

_SHOWN = 20  # columns that a message names


def fetched(place: str, schema: pa.Schema, wanted: Wanted) -> list[str]:
    """The columns to read, as ``a.b`` where a field of a struct is enough: those that are wanted, and marked answers.

    Raises:
        DataError: a column is missing, or the text column is not text; the message begins with ``place``.
    """
    texts = _names(schema, text=True)
    for name, remedy in wanted.columns.items():
        if _type_of(schema, name) is None:
            remedy = remedy if texts else "leave it out, no column is text"
            raise DataError(f"{place}: no column {name!r} (columns: {_listed(_names(schema))}): {remedy}")
    kind = _type_of(schema, wanted.text_field)
    if not _is_text(kind):
        remedy = f"set text_field to {_listed(texts)}" if texts else "give a source with a column of text"
        raise DataError(f"{place}: column {wanted.text_field!r} is {kind}, not text: {remedy}")
    columns = [_column(schema, name) for name in wanted.columns]
    answer = _type_of(schema, ANSWER)
    if answer is not None and _is_list(answer) and _is_number(answer.value_type):
        columns.append(ANSWER)
    return list(dict.fromkeys(columns))


def rows(batch: pa.RecordBatch, wanted: Wanted, place: str, number: int, position: int) -> Iterator[Row]:
    """A row per row of a batch; ``number`` is that of the first, from 1. A value that is not UTF-8 makes a bad row."""
    columns = [_values(column) for column in batch.columns]
    for at, values in enumerate(zip(*columns, strict=True), number):
        bad = next((value for value in values if isinstance(value, UnicodeDecodeError)), None)
        if bad is not None:
            problem = f"not UTF-8 ({bad.reason} at byte {bad.start})"
            yield Row(None, f"{place}, row {at}", at, position, problem=problem)
        else:
            yield wanted.pick(dict(zip(batch.schema.names, values, strict=True)), f"{place}, row {at}", at, position)


def broken(path: Path, number: int, error: Exception) -> DataError:
    """The error for a table that cannot be read on after ``number`` rows."""
    where = f"{path}, row {number + 1}" if number else f"{path}"
    reason = str(error).partition("\n")[0]
    if isinstance(error, pa.ArrowNotImplementedError):
        return DataError(f"{where}: pyarrow {pa.__version__} cannot read it ({reason}): write it in a simpler form")
    return DataError(f"{where}: the file ends or breaks here ({reason}): fetch it again")


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


def _type_of(schema: Any, name: str) -> Any:
    """The type of a column, or of a field inside one by ``a.b``; None if there is none. Of a list, that of a list."""
    if name in schema.names:
        return schema.field(name).type
    outer, _, inner = name.partition(".")
    if not inner or outer not in schema.names:
        return None
    kind = schema.field(outer).type
    if _is_list(kind):
        found = _type_of(kind.value_type, inner) if pa.types.is_struct(kind.value_type) else None
        return None if found is None else pa.list_(found)
    return _type_of(kind, inner) if pa.types.is_struct(kind) else None


def _column(schema: Any, name: str) -> str:
    """What to read to have a field: itself, or the outermost list that it is inside of."""
    if name in schema.names:
        return name
    outer, _, inner = name.partition(".")
    kind = schema.field(outer).type
    return outer if _is_list(kind) else f"{outer}.{_column(kind, inner)}"


def _names(schema: Any, text: bool = False) -> list[str]:
    names: list[str] = []
    for field in schema:
        if pa.types.is_struct(field.type) and field.type.num_fields:
            names += [f"{field.name}.{inner}" for inner in _names(field.type, text)]
        elif not text or _is_text(field.type):
            names.append(field.name)
    return names


def _is_text(kind: Any) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if _is_list(kind):
        return _is_text(kind.value_type)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_list(kind: Any) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _is_number(kind: Any) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


def _listed(names: list[str]) -> str:
    some = [" ".join(name.split()) for name in names[:_SHOWN]]  # a corrupt name may hold a line break
    return ", ".join(some + ["..."] * (len(names) > _SHOWN))
