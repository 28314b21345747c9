"""The code domain: the source of the installed Python standard library, and functions of held-out documents."""

import ast
from collections.abc import Iterable, Iterator
from typing import Any

from moetrain.data.builtin.python_library import library_texts, parse, short_digest, take_bytes

LONGEST = 50_000  # characters of a document, unless a single definition is longer
BODY = range(20, 401)  # characters of a function's body that make it a probe item


def documents(size: int, seed: int) -> Iterator[str]:
    """Yield files, long ones in pieces, until at least `size` bytes have been yielded or none is left."""
    return take_bytes((piece for text in library_texts(seed) for piece in _pieces(text)), size)


def items(count: int, seed: int, held_out: Iterable[str]) -> list[dict[str, Any]]:
    """Return up to `count` items: the signature and docstring of a function in a held-out text, its body to follow.

    Texts that are not Python source are skipped.
    """
    functions = {function for text in held_out for function in _functions(text)}
    chosen = sorted(functions, key=lambda function: short_digest(f"{seed} {function[0]}{function[1]}"))[:count]
    return [
        {
            "domain": "code",
            "task": "builtin_code",
            "prompt": prompt,
            "target": body,
            "sep": "",
            "id": f"builtin_code-{short_digest(prompt + body)}",
        }
        for prompt, body in chosen
    ]


def _pieces(text: str) -> list[str]:
    """Cut the text before top-level definitions into pieces as long as `LONGEST` allows."""
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
    """Yield (signature with docstring, body) of each documented function, as in the text."""
    parsed = parse(text)
    if parsed is None:
        return
    tree, lines = parsed
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or not ast.get_docstring(node):
            continue
        start, docstring_end, end = node.lineno - 1, node.body[0].end_lineno, node.end_lineno
        if docstring_end is None or end is None or len(node.body) < 2 or node.body[1].lineno == docstring_end:
            continue
        body = "\n".join(lines[docstring_end:end])
        if len(body) in BODY:
            yield "\n".join(lines[start:docstring_end]) + "\n", body
