"""The code domain: the Python standard library's source as it lies on this machine, and functions held out of it."""

import ast
import functools
import hashlib
import io
import os
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

LONGEST = 50_000  # characters of a document, unless a single definition is longer
BODY = range(20, 401)  # characters of a function's body that make it a probe item

# Tests, what is installed rather than the library's own, and text that a program wrote.
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "pydoc_data", "lib-dynload"}
LEFT_OUT_START = ("_sysconfigdata", "config-")


def library_digest() -> str:
    """Return a hash of the names and contents of all files that documents are made of."""
    return _digest_files(_root())


@functools.cache
def _digest_files(root: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(_sources(root)):
        content = hashlib.blake2b((root / path).read_bytes(), digest_size=16).hexdigest()
        digest.update(f"{path}\0{content}\n".encode())
    return digest.hexdigest()


def documents(size: int, seed: int) -> Iterator[str]:
    """Yield documents, one a file or a piece of a long file, until at least `size` bytes are given or none is left."""
    root = _root()
    given = 0
    # By hash: neither the file system's order nor that of the names decides what a short run reads.
    for path in sorted(_sources(root), key=lambda name: _digest(f"{seed} {name}")):
        for piece in _pieces(_read(root / path)):
            if given >= size:
                return
            given += len(piece.encode())
            yield piece


def items(count: int, seed: int, held_out: Iterable[str]) -> list[dict[str, Any]]:
    """Return up to `count` items: the signature and docstring of a function of a held-out text, its body to follow.

    Fewer are returned where the texts hold fewer such functions. A text that is not Python source is passed over.
    """
    functions = {function for text in held_out for function in _functions(text)}
    chosen = sorted(functions, key=lambda function: _digest(f"{seed} {function[0]}{function[1]}"))[:count]
    return [
        {
            "domain": "code",
            "task": "builtin_code",
            "prompt": prompt,
            "target": body,
            "sep": "",
            "id": f"builtin_code-{_digest(prompt + body)}",
        }
        for prompt, body in chosen
    ]


def _root() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _sources(root: Path) -> Iterator[str]:
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not _left_out(name)]  # not walked at all: site-packages can be huge
        for name in files:
            if name.endswith(".py") and not _left_out(name):
                yield Path(folder, name).relative_to(root).as_posix()


def _left_out(part: str) -> bool:
    return part in LEFT_OUT or part.startswith(LEFT_OUT_START)


def _read(path: Path) -> str:
    """Return a file's text, or nothing where it is not UTF-8 or is one of the encodings' tables."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""
    return "" if path.parent.name == "encodings" and "decoding_table" in text else text


def _pieces(text: str) -> list[str]:
    """Return the text cut before top-level definitions into pieces that are as long as they may be."""
    if not text.strip():
        return []
    if len(text) <= LONGEST:
        return [text]
    pieces = [""]
    for block in _blocks(text):
        if pieces[-1] and len(pieces[-1]) + len(block) > LONGEST:
            pieces.append("")
        pieces[-1] += block
    return pieces


def _blocks(text: str) -> Iterator[str]:
    block: list[str] = []
    decorated = False  # a definition stays with its decorators
    for line in text.splitlines(keepends=True):
        definition = line.startswith(("def ", "class ", "async def "))
        if block and not decorated and (definition or line.startswith("@")):
            yield "".join(block)
            block = []
        block.append(line)
        decorated = line.startswith("@") or (decorated and not definition)
    yield "".join(block)


def _functions(text: str) -> Iterator[tuple[str, str]]:
    """Yield signature with docstring, and body, as they stand in the text."""
    text = io.StringIO(text, newline=None).read()  # ast counts lines by any line end, split below by one
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in others' strings
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return
    lines = text.split("\n")
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or not ast.get_docstring(node):
            continue
        start, docstring_end, end = node.lineno - 1, node.body[0].end_lineno, node.end_lineno
        if docstring_end is None or end is None or len(node.body) < 2 or node.body[1].lineno == docstring_end:
            continue
        body = "\n".join(lines[docstring_end:end])
        if len(body) in BODY:
            yield "\n".join(lines[start:docstring_end]) + "\n", body


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
