"""The source files of the installed Python standard library, without tests, packages and generated text."""

from __future__ import annotations

import ast
import functools
import hashlib
import io
import os
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

# Tests, installed packages, and generated text.
SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "pydoc_data", "lib-dynload"}
SKIPPED_PREFIXES = ("_sysconfigdata", "config-")


def library_digest() -> str:
    """A hash of the names and contents of all files."""
    return _digest_files(library_root())


def library_texts(seed: int) -> Iterator[str]:
    """The text of each file, or nothing in place of one that is not UTF-8 or is a table of an encoding.

    The order is by a hash, so that a short run reads files from all over the library.
    """
    root = library_root()
    for path in sorted(_sources(root), key=lambda name: short_digest(f"{seed} {name}")):
        yield _read(root / path)


def take_bytes(texts: Iterable[str], size: int) -> Iterator[str]:
    """The first texts, until at least ``size`` bytes have been yielded or none is left."""
    total = 0
    for text in texts:
        if total >= size:
            return
        total += len(text.encode())
        yield text


def parse(text: str) -> tuple[ast.Module, list[str]] | None:
    """The syntax tree of a text and its lines; None if it is not Python source."""
    text = io.StringIO(text, newline=None).read()  # ast counts all kinds of line ends
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in strings
            return ast.parse(text), text.split("\n")
    except (SyntaxError, ValueError, RecursionError):
        return None


def short_digest(text: str) -> str:
    """A hash to order and to name texts by."""
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def library_root() -> Path:
    """The folder of the library."""
    return Path(sysconfig.get_paths()["stdlib"])


@functools.cache
def _digest_files(root: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(_sources(root)):
        content = hashlib.blake2b((root / path).read_bytes(), digest_size=16).hexdigest()
        digest.update(f"{path}\0{content}\n".encode())
    return digest.hexdigest()


def _sources(root: Path) -> Iterator[str]:
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not _is_skipped(name)]  # site-packages can be huge
        for name in files:
            if name.endswith(".py") and not _is_skipped(name):
                yield Path(folder, name).relative_to(root).as_posix()


def _is_skipped(part: str) -> bool:
    return part in SKIPPED or part.startswith(SKIPPED_PREFIXES)


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""
    return "" if path.parent.name == "encodings" and "decoding_table" in text else text
