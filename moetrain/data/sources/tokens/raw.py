"""Raw token ids, as OLMo's ``.npy`` files hold them: no header, documents one after another, each with its end mark.

Files that `numpy.save` wrote are read too; their header names the type.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from moetrain.data.errors import DataError
from moetrain.data.sources.rows import Row, Wanted
from moetrain.data.sources.tokens.documents import REMEDY

_BLOCK = 2**20  # ids
_TYPES = ("uint16", "uint32", "int32", "int64", "uint8")
_TRIED = 4096  # first ids by which a wrong type is noticed
_NUMPY = b"\x93NUMPY"
_LLM_C = (20240520).to_bytes(4, "little")  # of files of llm.c and its successors, before a header of 1,024 bytes


def read(path: Path, wanted: Wanted, dtype: str | None, vocab_size: int) -> Iterator[Row]:
    """Rows of consecutive ids.

    Raises:
        DataError: the size of the file is no multiple of that of an id, or its first ids are of another type.
    """
    ids = _open(path, dtype, vocab_size)
    for start in range(0, len(ids), _BLOCK):
        block = np.array(ids[start : start + _BLOCK])
        position = (start + len(block)) * ids.dtype.itemsize
        yield wanted.pick({wanted.text_field: block}, str(path), 0, position)


def _open(path: Path, given: str | None, vocab_size: int) -> np.ndarray:
    with open(path, "rb") as file:
        head = file.read(_TRIED * 8)
    if head.startswith(_NUMPY):
        return _open_numpy(path, given)
    if head.startswith(_LLM_C):
        raise DataError(
            f"{path}: begins with the header of llm.c's token files: write its ids without it (from byte 1024 on)"
        )
    dtype = given or ("uint16" if vocab_size <= 2**16 else "uint32")
    check_type(head, dtype, vocab_size, str(path))
    size, one = path.stat().st_size, np.dtype(dtype).itemsize
    if size % one:
        raise DataError(f"{path}: {size} bytes are no whole number of {dtype} ids: fetch it again, or correct dtype")
    ids: np.ndarray = np.memmap(path, np.dtype(dtype).newbyteorder("<"), mode="r") if size else np.zeros(0, dtype)
    return ids


def _open_numpy(path: Path, given: str | None) -> np.ndarray:
    try:
        ids: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise DataError(f"{path}: cannot be read as a NumPy file ({error}): fetch it again") from None
    if ids.ndim != 1 or ids.dtype.kind not in "ui":
        shape = "x".join(map(str, ids.shape))
        raise DataError(f"{path}: holds {ids.dtype} of shape {shape}, not a row of token ids: save one row of integers")
    if given is not None and ids.dtype != given:
        raise DataError(f"{path}: holds {ids.dtype} by its header, but dtype is {given}: remove dtype")
    return ids


def check_type(head: bytes, dtype: str, vocab_size: int, place: str) -> None:
    """Check that a type holds the whole vocabulary, and that the first bytes of ids look like it.

    They do not where an id is outside of the vocabulary, or two ids are halves of one.

    Raises:
        DataError: the message names the types that they fit.
    """
    if (largest := int(np.iinfo(dtype).max)) < vocab_size - 1:
        wider = next(name for name in ("uint16", "uint32") if np.iinfo(name).max >= vocab_size - 1)
        raise DataError(
            f"{place}: dtype {dtype} holds ids up to {largest}, and the vocabulary has {vocab_size} ids: set dtype: "
            f"{wider}, or {REMEDY}"
        )
    if not head or _fits(head, dtype, vocab_size):
        return
    ids = _as(head, dtype)
    outside = np.flatnonzero((ids >= vocab_size) | (ids < 0))
    if len(outside):
        problem = f"id {ids[outside[0]]} at {outside[0]} is outside of the vocabulary of {vocab_size} ids"
    elif len(ids):
        problem = "every second id is 0, as where larger ids were cut in two"
    else:
        return
    any_bytes = vocab_size >= 2**8  # fit uint8
    fitting = [name for name in _TYPES if _fits(head, name, vocab_size) and not (any_bytes and name == "uint8")]
    better = f"set dtype: {fitting[0]}, which its first ids fit, or " if fitting else ""
    raise DataError(f"{place}: read as {dtype}, {problem}: {better}{REMEDY}")


def _as(head: bytes, dtype: str) -> np.ndarray:
    one = np.dtype(dtype).newbyteorder("<")
    return np.frombuffer(head, one, min(len(head) // one.itemsize, _TRIED))


def _fits(head: bytes, dtype: str, vocab_size: int) -> bool:
    ids = _as(head, dtype)
    if not len(ids) or int(ids.max()) >= vocab_size or int(ids.min()) < 0:
        return False
    # Ids of twice the size, read as two each: every second one is the upper half, 0 in small vocabularies.
    halves = len(ids) >= 16 and vocab_size <= 2**16 and not ids[1::2].any() and ids[::2].any()
    return not halves
