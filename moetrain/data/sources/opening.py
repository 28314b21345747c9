"""Opening of files, decompressed by the end of their name; content that is not what the name says is refused."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from moetrain.data.errors import DataError

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
"""Endings of compressed files, of any kind but Parquet and Arrow, which compress by themselves."""

broken = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError)
"""Exceptions of reading a truncated or corrupt compressed file."""

_STARTS = {
    ".gz": (b"\x1f\x8b",),
    ".bz2": tuple(b"BZh%d" % n + after for n in range(1, 10) for after in (b"1AY&SY", b"\x17\x72\x45\x38\x50\x90")),
    ".xz": (b"\xfd7zXZ\x00",),
    ".zst": (b"\x28\xb5\x2f\xfd", *(bytes([0x50 + n]) + b"\x2a\x4d\x18" for n in range(16))),  # or a skippable frame
    ".parquet": (b"PAR1\x15",),
    ".arrow": (b"ARROW1\x00\x00",),
}
NAMES = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd", ".parquet": "Parquet", ".arrow": "Arrow"}
_LFS_POINTER = b"version https://git-lfs"


@contextmanager
def open_plain(path: Path, ending: str | None = None) -> Iterator[tuple[IO[bytes], Callable[[], int]]]:
    """The bytes of a file, decompressed by its ending, and a function that returns the bytes read from disk.

    Args:
        ending: of `COMPRESSIONS`, if the name of the file ends otherwise.

    Raises:
        DataError: the file's content is of another kind than its name says.
    """
    suffix = ending or path.suffix
    check_content(path, suffix)
    with open(path, "rb") as raw:
        match suffix:
            case ".gz":
                with gzip.open(raw, "rb") as file:
                    yield file, raw.tell  # type: ignore[misc]
            case ".xz":
                with lzma.open(raw, "rb") as file:
                    yield file, raw.tell
            case ".bz2":
                with io.BufferedReader(_Checked(bz2.open(raw, "rb")), 2**16) as file:
                    yield file, raw.tell
            case ".zst":
                with io.BufferedReader(_Checked(_zstd(raw)), 2**16) as file:
                    yield file, raw.tell
            case _:
                yield raw, raw.tell


def _zstd(raw: IO[bytes]) -> Any:
    # Not the zstandard package, whose readers end a truncated file without an error (0.25).
    import pyarrow as pa  # importing it is slow

    return pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd")


class _Checked(io.RawIOBase):
    """A decompressing file whose errors about the content are an EOFError, not an OSError like those of the disk."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            count: int = self._file.readinto(buffer)
            return count
        except OSError as error:
            if error.errno is not None:
                raise
            raise EOFError(str(error).partition("\n")[0]) from None

    def close(self) -> None:
        self._file.close()
        super().close()


def check_content(path: Path, ending: str | None = None) -> None:
    """Raise DataError if a file begins like one of another kind than its ending says, or is a Git LFS pointer."""
    head = _head(path)
    if head == _LFS_POINTER:
        raise DataError(f"{path}: is a Git LFS pointer, not the data itself: run git lfs pull in its folder")
    suffix, found = (ending or path.suffix).lower(), _ending_of(head)
    if suffix in COMPRESSIONS and head and found != suffix:
        kind = NAMES[suffix]
        raise DataError(f"{path}: is no {kind} data (begins with {head[:6]!r}): fetch it again, or rename it")
    if found is not None and found != suffix and (found, suffix) != (".arrow", ".feather"):
        raise DataError(f"{path}: holds {NAMES[found]} data: rename it to end in {found}")


def ending_by_content(path: Path) -> str | None:
    """The ending that the first bytes of a file call for, if they are those of a compressed, Parquet or Arrow file."""
    return _ending_of(_head(path))


def _head(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(len(_LFS_POINTER))


def _ending_of(head: bytes) -> str | None:
    return next((ending for ending, starts in _STARTS.items() if head.startswith(starts)), None)
