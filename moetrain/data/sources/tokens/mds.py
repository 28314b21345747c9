"""MDS shards, as mosaicml-streaming and llm-foundry write them.

A shard is: the number of samples n (uint32), n + 1 places of samples in the file in bytes (uint32), the JSON of its
columns, and the samples: the sizes (uint32) of those of its columns that have no fixed size, and then all its columns.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from moetrain.data.errors import DataError
from moetrain.data.sources.opening import broken, open_plain
from moetrain.data.sources.rows import Row, Wanted
from moetrain.data.sources.tokens.described import Columns, parse
from moetrain.data.sources.tokens.raw import check_type

COMPRESSIONS = {".zstd": ".zst", ".zst": ".zst", ".gz": ".gz", ".bz2": ".bz2"}
_AGAIN = "fetch it again"
_USUAL = ("input_ids", "tokens")
_CODES = {8: "u1", 9: "i1", 16: "<u2", 17: "<i2", 32: "<u4", 33: "<i4", 64: "<u8", 65: "<i8"}
_SCALARS = ("int", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)), "float32", "float64")


def read(path: Path, wanted: Wanted, dtype: str | None, vocab_size: int) -> Iterator[Row]:
    """A row per sample.

    Raises:
        DataError: the shard is corrupt, of an unknown version, or has no such column of ids.
    """
    content = _content(path)
    count = int(np.frombuffer(content, "<u4", 1)[0]) if len(content) >= 4 else 0
    head = 4 + 4 * (count + 1)
    if len(content) < max(head, 8):
        raise DataError(f"{path}: {len(content)} bytes, too few for the places of its {count} samples: {_AGAIN}")
    places = np.frombuffer(content, "<u4", count + 1, 4).astype(np.int64)
    if places[-1] != len(content) or places[0] < head or (np.diff(places) < 0).any():
        raise DataError(
            f"{path}: {len(content)} bytes, but by its head its {count} samples end at byte {places[-1]}: {_AGAIN}"
        )
    columns = _columns(bytes(content[head : places[0]]), path)
    name = _column_of_ids(columns, wanted.text_field, path)
    wanted = replace(wanted, text_field=name)
    missing = [(column, remedy) for column, remedy in wanted.columns.items() if column not in columns.column_names]
    if missing:
        column, remedy = missing[0]
        raise DataError(f"{path}: no column {column!r} (columns: {', '.join(columns.column_names)}): {remedy}")
    for number in range(count):
        place = f"{path}, sample {number}"
        sample = content[places[number] : places[number + 1]]
        record = dict(_fields(sample, columns, wanted, place))
        record[name] = _ids(
            record[name], columns.column_encodings[columns.column_names.index(name)], dtype, vocab_size, place
        )
        yield wanted.pick(record, place, 0, int(places[number + 1]))


def _content(path: Path) -> np.ndarray:
    """The bytes of a shard, decompressed by its ending."""
    if path.suffix == ".mds":
        return np.memmap(path, np.uint8, mode="r") if path.stat().st_size else np.zeros(0, np.uint8)
    try:
        with open_plain(path, COMPRESSIONS[path.suffix]) as (file, _):
            return np.frombuffer(file.read(), np.uint8)
    except broken as error:
        raise DataError(f"{path}: the compressed shard ends or breaks ({error}): {_AGAIN}") from None


def _columns(text: bytes, path: Path) -> Columns:
    columns = parse(Columns, text, path)
    if (columns.version, columns.format) != (2, "mds"):
        raise DataError(
            f"{path}: format {columns.format}, version {columns.version} is not known, mds 2 is: write it again with "
            "mosaicml-streaming"
        )
    return columns


def _column_of_ids(columns: Columns, given: str, path: Path) -> str:
    names = [
        name
        for name, encoding in zip(columns.column_names, columns.column_encodings, strict=True)
        if encoding.partition(":")[0] in ("ndarray", "bytes")
    ]
    usual = [name for name in _USUAL if name in names]
    chosen = given or (usual or names if len(usual or names) == 1 else [""])[0]
    if chosen in names:
        return chosen
    described = ", ".join(
        f"{name} ({encoding})" for name, encoding in zip(columns.column_names, columns.column_encodings, strict=True)
    )
    raise DataError(
        f"{path}: {f'column {given!r} holds no' if given else 'no one column holds'} token ids as ndarray or bytes "
        f"(columns: {described}): set column to one that does"
    )


def _fields(sample: np.ndarray, columns: Columns, wanted: Wanted, place: str) -> Iterator[tuple[str, Any]]:
    """The fields of a sample that are wanted, the ids as bytes."""
    open_sizes = sum(size is None for size in columns.column_sizes)
    if len(sample) < 4 * open_sizes:
        raise DataError(f"{place}: {len(sample)} bytes, too few for the sizes of its columns: {_AGAIN}")
    given = iter(np.frombuffer(sample, "<u4", open_sizes).tolist())
    sizes = [next(given) if size is None else size for size in columns.column_sizes]
    if 4 * open_sizes + sum(sizes) != len(sample):
        raise DataError(f"{place}: {len(sample)} bytes, but its columns take {4 * open_sizes + sum(sizes)}: {_AGAIN}")
    begin = 4 * open_sizes
    for name, encoding, size in zip(columns.column_names, columns.column_encodings, sizes, strict=True):
        value = bytes(sample[begin : begin + size])
        begin += size
        if name == wanted.text_field:
            yield name, value
        elif name in wanted.columns:
            yield name, _plain(value, encoding, f"{place}, column {name}")


def _plain(value: bytes, encoding: str, place: str) -> Any:
    """A value that rows are chosen by."""
    try:
        if encoding == "str":
            return value.decode()
        if encoding in ("str_int", "str_float"):
            return int(value) if encoding == "str_int" else float(value)
        if encoding == "json":
            return json.loads(value)
        if encoding in _SCALARS:
            return np.frombuffer(value, np.dtype("int64" if encoding == "int" else encoding))[0].item()
    except (ValueError, IndexError, RecursionError) as error:
        raise DataError(f"{place}: cannot be read as {encoding} ({error}): {_AGAIN}") from None
    raise DataError(f"{place}: is {encoding}, by which rows cannot be chosen: remove filter or by")


def _ids(value: bytes, encoding: str, dtype: str | None, vocab_size: int, place: str) -> np.ndarray:
    """Token ids, from bytes of the given type or an array that names its own."""
    kind, _, described = encoding.partition(":")
    if kind == "bytes":
        if dtype is None:
            raise DataError(f"{place}: its ids are plain bytes: set dtype to their type (llm-foundry wrote int64)")
        if len(value) % np.dtype(dtype).itemsize:
            raise DataError(f"{place}: {len(value)} bytes are no whole number of {dtype} ids: correct dtype")
        check_type(value, dtype, vocab_size, place)
        return np.frombuffer(value, np.dtype(dtype).newbyteorder("<"))
    named, _, shape = described.partition(":")
    at = 0
    try:
        if not named:
            named, at = _CODES[value[0]], 1
        if not shape:
            dimensions, width = value[at] >> 2, 2 ** (value[at] & 3)
            sizes = np.frombuffer(value, f"<u{width}", dimensions, at + 1).tolist()
            at += 1 + dimensions * width
        else:
            sizes = [int(each) for each in shape.split(",")]
        ids = np.frombuffer(value, np.dtype(named).newbyteorder("<"), offset=at)
    except (KeyError, IndexError, ValueError, TypeError):
        ids, sizes = np.zeros(0, "f4"), []
    if ids.dtype.kind not in "ui" or len(sizes) != 1 or math.prod(sizes) != len(ids):
        raise DataError(f"{place}: is no row of integers ({encoding}): set column to one that holds token ids")
    return ids
