"""The files that a path names, their kind, and how they are opened."""

from __future__ import annotations

import glob
import gzip
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Literal

from moetrain.data.errors import DataError

Kind = Literal["jsonl", "parquet", "text"]

_JSONL = ("jsonl", "json", "ndjson")
_PLAIN = ("txt", "text", "md", "markdown", "rst", "tex", "org")
_CODE = """
    py pyi pyx c h cc cpp cxx hh hpp hxx cu cuh java kt kts scala groovy cs fs vb go rs swift m mm js jsx mjs cjs ts tsx
    vue svelte html htm css scss less php rb pl pm lua r jl hs lhs ml mli ex exs erl clj cljs lisp el scm rkt f f90 f95
    for pas ada adb ads asm s v sv vhd vhdl sql sh bash zsh fish ps1 bat awk tcl dart zig nim cmake mk proto thrift toml
    yaml yml ini cfg xml tf sol
"""
KINDS: dict[str, Kind] = {
    **dict.fromkeys(_JSONL, "jsonl"),
    "parquet": "parquet",
    **dict.fromkeys((*_PLAIN, *_CODE.split()), "text"),
}

broken = (EOFError, gzip.BadGzipFile, zlib.error)
"""Exceptions of reading a truncated or corrupt .gz file."""


def kind_of(path: Path) -> Kind | None:
    """How a file is read, by the end of its name; None if unknown."""
    name = path.name.removesuffix(".gz")
    kind = KINDS.get(name.rpartition(".")[2].lower()) if "." in name else None
    return None if kind == "parquet" and path.suffix == ".gz" else kind


def named_files(pattern: str, key: str) -> list[Path]:
    """The files of a path or pattern, sorted; of a folder all files below it of a known kind, except hidden ones.

    Raises:
        DataError: no file, or a file given by name is of unknown kind; the message begins with ``key``.
    """
    found = sorted(glob.glob(pattern, recursive=True)) if glob.has_magic(pattern) else [pattern]
    files: list[Path] = []
    for path in map(Path, found):
        if path.is_dir() and not glob.has_magic(pattern):
            files.extend(sorted(_below(path)))
        elif path.is_file():
            if kind_of(path) is None:
                raise DataError(
                    f"{key}: {path} ends in none of .jsonl, .json, .parquet (not .gz) and those of text and source "
                    "code: rename it, or give other files"
                )
            files.append(path)
    if not files:
        raise DataError(f"{key}: no file at {pattern}: correct the path, or data.root it starts from")
    return files


def _below(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(parent, name)
            if not name.startswith(".") and kind_of(path) is not None and path.is_file():
                yield path


@contextmanager
def open_plain(path: Path) -> Iterator[tuple[IO[bytes], Callable[[], int]]]:
    """The bytes of a file, decompressed if it ends in .gz, and a function that returns the bytes read from disk."""
    with open(path, "rb") as raw:
        if path.suffix == ".gz":
            with gzip.open(raw, "rb") as file:
                yield file, raw.tell  # type: ignore[misc]
        else:
            yield raw, raw.tell
