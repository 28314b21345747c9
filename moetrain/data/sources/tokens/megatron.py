"""Megatron's indexed data sets: ``NAME.bin`` holds the ids, ``NAME.idx`` where its sequences and documents begin.

The index is: the nine bytes MMIDIDX and two zeros, version (uint64, 1), code of the type of the ids (uint8), number of
sequences and number of document boundaries (uint64 each), lengths of the sequences (int32), their places in the data in
bytes (int64), boundaries: the sequence that each document begins with, and the end (int64). All are little-endian.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moetrain.data.errors import DataError, cannot_read
from moetrain.data.sources.rows import Row, Wanted

_MAGIC = b"MMIDIDX\x00\x00"
_TYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_FLOATS = {6: "float64", 7: "float32"}
_HEADER = len(_MAGIC) + 8 + 1 + 8 + 8

AGAIN = "fetch both files again"


class _Index(NamedTuple):
    dtype: np.dtype
    starts: np.ndarray  # of each document, in ids from the begin of the data
    ends: np.ndarray


def index_of(path: Path) -> Path:
    """The index of a data file."""
    return path.with_suffix(".idx")


def read(path: Path, wanted: Wanted) -> Iterator[Row]:
    """A row per document.

    Raises:
        DataError: the index is missing or corrupt, of another version, or disagrees with the data.
    """
    index = _read_index(index_of(path), path)
    if not len(index.starts):
        return
    ids = np.memmap(path, index.dtype, mode="r") if path.stat().st_size else np.zeros(0, index.dtype)
    for number, (start, end) in enumerate(zip(index.starts.tolist(), index.ends.tolist(), strict=True)):
        position = end * index.dtype.itemsize
        yield wanted.pick({wanted.text_field: np.array(ids[start:end])}, f"{path}, document {number}", 0, position)


def _read_index(path: Path, data: Path) -> _Index:
    try:
        content = np.fromfile(path, np.uint8)
    except FileNotFoundError:
        raise DataError(
            f"{path}: is missing beside {data.name}: fetch it, or set format: olmo if the ids have no index"
        ) from None
    except OSError as error:
        raise cannot_read(path, error) from None
    header = content[:_HEADER].tobytes()
    if not header.startswith(_MAGIC):
        raise DataError(f"{path}: is no Megatron index (begins with {header[:9]!r}): give the .idx that belongs to it")
    if len(header) < _HEADER:
        raise DataError(f"{path}: ends within its header, after {len(header)} bytes: {AGAIN}")
    version, code = int.from_bytes(header[9:17], "little"), header[17]
    if version != 1:
        raise DataError(f"{path}: version {version} of the index is not known, 1 is: write it again with megatron-core")
    if code not in _TYPES:
        found = f"holds {_FLOATS[code]}, not token ids" if code in _FLOATS else f"has an unknown type code {code}"
        raise DataError(f"{path}: {found}: write it again with ids as uint16 or int32")
    sequences, boundaries = (int.from_bytes(header[at : at + 8], "little") for at in (18, 26))
    needed = _HEADER + 12 * sequences + 8 * boundaries
    if len(content) < needed:
        raise DataError(
            f"{path}: {len(content)} bytes, but {sequences} sequences and {boundaries} document boundaries take "
            f"{needed}: {AGAIN}"
        )
    lengths = np.frombuffer(content, "<i4", sequences, _HEADER).astype(np.int64)
    places = np.frombuffer(content, "<i8", sequences, _HEADER + 4 * sequences)
    documents = np.frombuffer(content, "<i8", boundaries, _HEADER + 12 * sequences)
    dtype = np.dtype(_TYPES[code])
    _check(path, data, dtype, lengths, places, documents)
    edges = np.append(places // dtype.itemsize, lengths.sum())
    return _Index(dtype, edges[documents[:-1]], edges[documents[1:]])


def _check(
    path: Path, data: Path, dtype: np.dtype, lengths: np.ndarray, places: np.ndarray, documents: np.ndarray
) -> None:
    """Raise DataError where the sequences of an index do not fill its data, or its documents its sequences."""
    expected = (np.cumsum(lengths) - lengths) * dtype.itemsize
    wrong = np.flatnonzero((places != expected) | (lengths < 0))
    if len(wrong):
        at = int(wrong[0])
        raise DataError(
            f"{path}: sequence {at} lies at byte {places[at]} of the data instead of {expected[at]}, where the one "
            "before ends: write it again with megatron-core"
        )
    size, needed = data.stat().st_size, int(lengths.sum()) * dtype.itemsize
    if size != needed:
        raise DataError(
            f"{data}: {size} bytes, but {path.name} describes {needed} ({lengths.sum()} ids of {dtype.itemsize} "
            f"bytes): {AGAIN}"
        )
    if len(documents) < 1 or documents[0] != 0 or documents[-1] != len(lengths) or (np.diff(documents) < 0).any():
        raise DataError(
            f"{path}: its {max(len(documents) - 1, 0)} documents do not cover its {len(lengths)} sequences in order: "
            "write it again with megatron-core"
        )
