"""The functions domain: functions and methods of the installed Python standard library, one document each.

Short documents, of which a small domain has many: enough to hold some out of a domain that is repeated.
"""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Iterator

from moetrain.data.builtin.python_library import library_texts, parse, take_bytes

LENGTH = range(200, 3001)  # characters of a function that is a document


def documents(size: int, seed: int) -> Iterator[str]:
    """Yield functions, file by file, until at least ``size`` bytes have been yielded or none is left."""
    return take_bytes((function for text in library_texts(seed) for function in functions(text)), size)


def functions(text: str) -> Iterator[str]:
    """The source of each function at the top level and each method of a class there, without its indentation.

    Nothing of a text that is not Python source.
    """
    parsed = parse(text)
    if parsed is None:
        return
    tree, lines = parsed
    bodies = [tree.body, *(node.body for node in tree.body if isinstance(node, ast.ClassDef))]
    for node in (node for body in bodies for node in body):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        first = min([node.lineno, *(each.lineno for each in node.decorator_list)])
        source = textwrap.dedent("\n".join(lines[first - 1 : node.end_lineno])) + "\n"
        if len(source) in LENGTH:
            yield source
