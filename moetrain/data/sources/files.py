"""The files that a path names, their kind, and what is left out of a folder."""

from __future__ import annotations

import glob
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from moetrain.data.errors import DataError
from moetrain.data.sources import saved
from moetrain.data.sources.opening import COMPRESSIONS, NAMES, ending_by_content

Kind = Literal["jsonl", "parquet", "arrow", "text"]

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
    **dict.fromkeys(("arrow", "feather"), "arrow"),
    **dict.fromkeys((*_PLAIN, *_CODE.split()), "text"),
}
_PACKED = (".zip", ".tar", ".tgz", ".7z", ".rar", ".lz4", ".br", ".sz", ".lzma", ".z")
_TABLES = (".csv", ".tsv", ".xlsx", ".xls", ".orc", ".avro", ".h5", ".hdf5", ".db", ".sqlite", ".pkl", ".pickle")
_PAPERS = ("readme", "license", "licence", "copying", "notice", "citation", "changelog", "authors", "contributing")

_KNOWN = "none of .jsonl, .json, .parquet, .arrow and those of text and source code"

HIDDEN = "hidden"
_UNKNOWN = "of a kind that is not read"
_NO_FILE = "broken links and the like"
_LOOP = "links to a folder that is read already or holds this one"
_TEXT_BESIDE = "text beside files of rows"
_ROWS_BESIDE = "files of rows beside text"
_JSON_BESIDE = ".json beside other files, which may describe them"

_FEW = 0.05
"""Bytes of text per byte of rows, or the reverse, up to which they are no data but describe or test it."""


class Listing(NamedTuple):
    """What a path or pattern stands for.

    Attributes:
        files: to be read, in order.
        left_out: files and folders that are not, by the reason.
    """

    files: list[Path]
    left_out: dict[str, list[Path]]

    def left_out_lines(self) -> list[str]:
        """One line per reason, with how many and the first three."""
        return [f"{len(paths)} {reason} ({_first(paths)})" for reason, paths in self.left_out.items()]


def plain_name(path: Path) -> str:
    """The name of a file without the ending of its compression."""
    return path.name.removesuffix(path.suffix) if path.suffix in COMPRESSIONS else path.name


def kind_of(path: Path) -> Kind | None:
    """How a file is read, by the end of its name; None if unknown."""
    name = plain_name(path)
    kind = KINDS.get(name.rpartition(".")[2].lower()) if "." in name else None
    return None if kind in ("parquet", "arrow") and name != path.name else kind


def named_files(pattern: str, key: str) -> list[Path]:
    """The files of a path or pattern; see `list_files`."""
    return list_files(pattern, key).files


def list_files(pattern: str, key: str) -> Listing:
    """The files of a path or pattern, sorted. A folder, named or matched, stands for the files below it.

    Links are followed. What is found together is read as rows (Parquet, Arrow, JSON Lines) or as text, if nearly all
    of it is; of a data set, what describes it (README.md, .json beside tables) is left out.

    Raises:
        DataError: no file, a file given by name is of unknown kind, both rows and text, or several splits of a data
            set; the message begins with ``key``.
    """
    if os.path.lexists(pattern) and not os.path.isdir(pattern):
        path = Path(pattern)
        if not path.is_file():
            raise DataError(f"{key}: {path} is a broken link or no file: correct it, or give another")
        if kind_of(path) is None:
            raise DataError(f"{key}: {_unread(path)}")
        return Listing([path], {})
    matched = [pattern] if os.path.isdir(pattern) else sorted(glob.glob(pattern, recursive=True))
    files: set[Path] = set()
    left_out: defaultdict[str, list[Path]] = defaultdict(list)
    seen: set[tuple[int, int]] = set()
    for path in map(Path, matched):
        if path.is_dir():
            files.update(_below(path, key, left_out, seen))
        elif not path.is_file():
            left_out[_NO_FILE].append(path)
        else:
            files.add(path)
    sizes = {path: path.stat().st_size for path in sorted(files)}
    listing = Listing(chosen_files(sizes, left_out, f"{key}: {pattern}"), dict(left_out))
    if not listing.files:
        if not left_out:
            raise DataError(f"{key}: no file at {pattern}: correct the path, or data.root it starts from")
        remedy = next((_unread(path) for path in left_out.get(_UNKNOWN, [])), "give others")
        raise DataError(f"{key}: no file at {pattern} can be read: {', '.join(listing.left_out_lines())}: {remedy}")
    return listing


def _below(
    folder: Path, key: str, left_out: defaultdict[str, list[Path]], seen: set[tuple[int, int]]
) -> Iterator[Path]:
    """All files below a folder; ``seen`` holds the folders read already, by device and inode."""
    above = {(state.st_dev, state.st_ino) for state in (parent.stat() for parent in folder.resolve().parents)}
    waiting = [folder]
    while waiting:
        parent = waiting.pop()
        state = parent.stat()
        place = (state.st_dev, state.st_ino)
        if place in above or place in seen:
            if parent.is_symlink():
                left_out[_LOOP].append(parent)
            continue
        seen.add(place)
        try:
            with os.scandir(parent) as found:  # which knows folders from files without asking for each
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            raise DataError(f"{key}: {parent} cannot be listed ({error.strerror}): allow it, or move it") from None
        saved_files = None
        if any(entry.name in saved.PAPERS for entry in entries):
            if (names := saved.splits(parent)) is not None:
                raise DataError(
                    f"{key}: {parent} holds the splits {', '.join(names)} of one data set: give the folder of one, or "
                    "hub: with split:"
                )
            saved_files = saved.data_files(parent)
        if saved_files is not None:
            yield from saved_files
            continue
        for entry in entries:
            path = parent / entry.name
            known = path if entry.is_symlink() else entry  # a link to itself is an error to an entry
            if entry.name.startswith("."):
                left_out[HIDDEN].append(path)
            elif known.is_dir():
                waiting.append(path)
            elif known.is_file():
                yield path
            else:
                left_out[_NO_FILE].append(path)


def chosen_files(sizes: Mapping[Path, int], left_out: defaultdict[str, list[Path]], place: str) -> list[Path]:
    """Of files found together, by their bytes, those that are data; the others are added to ``left_out``.

    Raises:
        DataError: there are both rows and text, and neither is but a few; the message begins with ``place``.
    """
    found: defaultdict[Kind | None, list[Path]] = defaultdict(list)
    for path in sizes:
        found[kind_of(path)].append(path)
    tables, text = found["parquet"] + found["arrow"], found["text"]
    lines = [path for path in found["jsonl"] if not _is_json(path)]
    json = [path for path in found["jsonl"] if _is_json(path) and path.name not in saved.PAPERS]
    rows, own_text = tables + lines, [path for path in text if not path.name.lower().startswith(_PAPERS)]
    if rows and own_text:
        row_bytes, text_bytes = (sum(sizes[path] for path in paths) for paths in (rows, own_text))
        if text_bytes <= _FEW * row_bytes:
            own_text = []
        elif row_bytes <= _FEW * text_bytes:
            rows = []
        else:
            patterns = " or ".join(f"FOLDER/**/*{_ending(paths[0])}" for paths in (rows, own_text))
            raise DataError(
                f"{place} holds rows ({_first(rows)}) and text ({_first(own_text)}): give a pattern for what is data, "
                f"such as {patterns}"
            )
    if rows:
        chosen = rows if tables else rows + json
    elif json and not own_text:
        chosen = json
    else:
        chosen = text
    reasons = {None: _UNKNOWN, "text": _TEXT_BESIDE, "jsonl": _JSON_BESIDE}
    kept = set(chosen)
    for kind, paths in found.items():
        for path in paths:
            if path not in kept:
                beside = _ROWS_BESIDE if path in tables or path in lines else reasons[kind]
                left_out[beside].append(path)
    return [path for path in sizes if path in kept]


def _ending(path: Path) -> str:
    return "".join(path.suffixes[-2:] if path.suffix in COMPRESSIONS else path.suffixes[-1:])


def _is_json(path: Path) -> bool:
    return plain_name(path).lower().endswith(".json")


def _unread(path: Path) -> str:
    """Why a file of unknown kind is not read, and what helps, by its name and content."""
    by_name = unread_name(path)
    if not by_name.startswith(f"{path} ends in {_KNOWN}"):
        return by_name
    found = ending_by_content(path)
    if found is not None:
        return f"{path} holds {NAMES[found]} data: rename it to end in {found}"
    if _is_text(path):
        return f"{path} ends in {_KNOWN}, but holds text: rename it to end in .jsonl (one object a line) or .txt"
    return by_name


def unread_name(path: Path) -> str:
    """Why a file of unknown kind is not read, and what helps, by its name."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if any(suffix in _PACKED for suffix in suffixes):
        return f"{path} is packed in a way that is not read: unpack it ({', '.join(COMPRESSIONS)} are read)"
    if any(suffix in _TABLES for suffix in suffixes):
        return f"{path} is a table that is not read: write it as Parquet or JSON Lines"
    if kind_of(path.with_name(plain_name(path))) is not None:
        return f"{path}: Parquet and Arrow files are not read if compressed as a whole: decompress it"
    if path.suffix in COMPRESSIONS:
        return f"{path} does not say what it holds: rename it, for instance to NAME.jsonl{path.suffix}"
    return f"{path} ends in {_KNOWN}: convert it to JSON Lines or Parquet"


def _is_text(path: Path) -> bool:
    with open(path, "rb") as file:
        head = file.read(4096)
    try:
        head.decode()
    except UnicodeDecodeError as error:
        return error.start > len(head) - 4  # a character cut at the end
    return b"\x00" not in head


def _first(paths: list[Path]) -> str:
    shown = ", ".join(str(path) for path in paths[:3])
    return shown + (", ..." if len(paths) > 3 else "")
