"""litdata's chunks, as ``optimize`` writes them: with TokensLoader, or items with one-dimensional arrays.

A chunk is: the number of items n (uint32), n + 1 places of items in the file in bytes (uint32), and the items. With
TokensLoader an item is its ids; else the sizes (uint32) of its leaves, and the leaves. ``index.json`` beside the chunks
lists them, and names the leaves and their types.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moetrain.data.errors import DataError
from moetrain.data.sources.opening import broken, open_plain
from moetrain.data.sources.rows import Row, Wanted
from moetrain.data.sources.tokens.described import ChunkConfig, ChunkIndex, parse

INDEX = "index.json"
_AGAIN = "fetch it again"
_USUAL = ("input_ids", "tokens")
_REWRITE = "write it again with item_loader=TokensLoader() and one-dimensional tensors of integers"
_TORCH_TYPES = {11: "u1", 12: "i1", 13: "<i2", 14: "<i2", 15: "<i4", 16: "<i4", 17: "<i8", 18: "<i8", 20: "<u2"}
_NUMPY_TYPES = ("i1", "<i2", "<i4", "<i8", "u1", "<u2", "<u4", "<u8")


class _Layout(NamedTuple):
    leaves: int  # of an item; 0 if it is ids alone
    leaf: int  # that holds the ids
    dtype: np.dtype
    items: int  # of this chunk


def read(path: Path, wanted: Wanted) -> Iterator[Row]:
    """A row per item.

    Raises:
        DataError: the chunk is corrupt or disagrees with the index, or its items hold no row of integers.
    """
    layout = _layout(path, wanted)
    wanted = replace(wanted, text_field="ids")
    content = _content(path)
    count = int(np.frombuffer(content, "<u4", 1)[0]) if len(content) >= 4 else 0
    head = 4 + 4 * (count + 1)
    if count != layout.items or len(content) < head:
        raise DataError(
            f"{path}: {len(content)} bytes with {count} items, but {INDEX} says {layout.items} items: {_AGAIN}"
        )
    places = np.frombuffer(content, "<u4", count + 1, 4).astype(np.int64)
    if places[0] != head or places[-1] != len(content) or (np.diff(places) < 0).any():
        raise DataError(
            f"{path}: {len(content)} bytes, but by its head its {count} items end at byte {places[-1]}: {_AGAIN}"
        )
    for number in range(count):
        place = f"{path}, item {number}"
        ids = _ids(content[places[number] : places[number + 1]], layout, place)
        yield wanted.pick({"ids": ids}, place, 0, int(places[number + 1]))


def _layout(path: Path, wanted: Wanted) -> _Layout:
    index = path.parent / INDEX
    try:
        tree = parse(ChunkIndex, index.read_bytes(), index)
    except FileNotFoundError:
        raise DataError(f"{index}: is missing beside its chunks: fetch it") from None
    config = tree.config
    chunk = next((chunk for chunk in tree.chunks if chunk.filename == path.name), None)
    if chunk is None:
        raise DataError(f"{index}: does not list {path.name}: fetch both again")
    others = [column for column in wanted.columns if column != wanted.text_field]
    if others:
        raise DataError(f"{path}: filter and by cannot read {others[0]!r} of litdata chunks: remove them")
    if config.encryption or config.compression_level not in (None, "chunk"):
        what = "encrypted" if config.encryption else f"compressed by {config.compression_level}"
        raise DataError(f"{path}: is {what}, which is not read: write it again without, or compressed by chunk")
    formats = config.data_format
    # Older versions do not name the loader; only TokensLoader counts the ids of a chunk.
    if config.item_loader == "TokensLoader" or (config.item_loader is None and chunk.dim is not None):
        if wanted.text_field:
            raise DataError(f"{path}: its items are ids alone, without a column {wanted.text_field!r}: remove column")
        return _Layout(0, 0, _type(formats[0] if formats else "", path), chunk.chunk_size)
    names = _leaf_names(config, len(formats))
    rows = [names[number] for number, name in enumerate(formats) if _row_type(name) is not None]
    usual = [name for name in _USUAL if name in rows]
    chosen = wanted.text_field or (usual or rows if len(usual or rows) == 1 else [""])[0]
    if chosen not in rows:
        described = ", ".join(f"{name} ({kind})" for name, kind in zip(names, formats, strict=True)) or "none"
        remedy = "set column to one that does" if rows else _REWRITE
        raise DataError(f"{path}: no one field is a row of integers (fields: {described}): {remedy}")
    return _Layout(len(formats), names.index(chosen), _type(formats[names.index(chosen)], path), chunk.chunk_size)


def _leaf_names(config: ChunkConfig, count: int) -> list[str]:
    """The keys of an item that is one dictionary, else the numbers of its leaves."""
    numbers = [str(number) for number in range(count)]
    try:
        _, spec = json.loads(config.data_spec)  # [protocol, {"type", "context", "children_spec"}]
        keys = spec["context"]
        keys = json.loads(keys) if isinstance(keys, str) else keys
    except (ValueError, TypeError, KeyError, RecursionError):
        return numbers
    return [str(key) for key in keys] if isinstance(keys, list) and len(keys) == count else numbers


def _row_type(name: str) -> np.dtype | None:
    """The type of the integers that a format describes a row of; None if it is something else."""
    kind, _, code = name.partition(":")
    types = {"no_header_tensor": _TORCH_TYPES, "no_header_numpy": dict(enumerate(_NUMPY_TYPES))}.get(kind, {})
    found = types.get(int(code)) if code.isdigit() else None
    return np.dtype(found) if found is not None else None


def _type(name: str, path: Path) -> np.dtype:
    dtype = _row_type(name)
    if dtype is None:
        raise DataError(f"{path}: its items are {name or 'of no format'}, no rows of integers: {_REWRITE}")
    return dtype


def _content(path: Path) -> np.ndarray:
    if path.name.endswith(".zstd.bin") or ".zstd:" in path.name:
        try:
            with open_plain(path, ".zst") as (file, _):
                return np.frombuffer(file.read(), np.uint8)
        except broken as error:
            raise DataError(f"{path}: the compressed chunk ends or breaks ({error}): {_AGAIN}") from None
    return np.memmap(path, np.uint8, mode="r") if path.stat().st_size else np.zeros(0, np.uint8)


def _ids(item: np.ndarray, layout: _Layout, place: str) -> np.ndarray:
    if layout.leaves:
        sizes = np.frombuffer(item, "<u4", layout.leaves) if len(item) >= 4 * layout.leaves else np.zeros(1)
        if len(item) < 4 * layout.leaves or 4 * layout.leaves + int(sizes.sum()) != len(item):
            raise DataError(f"{place}: its {len(item)} bytes are not those of its {layout.leaves} fields: {_AGAIN}")
        begin = 4 * layout.leaves + int(sizes[: layout.leaf].sum())
        item = item[begin : begin + int(sizes[layout.leaf])]
    if len(item) % layout.dtype.itemsize:
        raise DataError(f"{place}: {len(item)} bytes are no whole number of {layout.dtype} ids: {_AGAIN}")
    return np.frombuffer(item.tobytes(), layout.dtype)
