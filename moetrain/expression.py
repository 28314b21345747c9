"""Filters on the columns of a data set: ``language == "en" and score >= 3``. Parsed, never evaluated as code.

Column names, constants, comparisons (also chained, ``in`` and ``not in``), ``and``, ``or``, ``not`` and ``len()``;
nothing else is an expression. A null orders with nothing: each of ``< <= > >=`` with it is false.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_Term = Callable[[Mapping[str, Any]], Any]

_LONGEST = 10_000  # characters; deeper nesting than this can hold would be a mistake, and exhaust the parser


def _unless_null(test: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
    return lambda left, right: left is not None and right is not None and test(left, right)


_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: _unless_null(operator.lt),
    ast.LtE: _unless_null(operator.le),
    ast.Gt: _unless_null(operator.gt),
    ast.GtE: _unless_null(operator.ge),
    ast.In: lambda left, right: right is not None and left in right,
    ast.NotIn: lambda left, right: right is None or left not in right,
}


@dataclass(frozen=True)
class Filter:
    """A filter ready to be asked about rows."""

    text: str
    columns: tuple[str, ...]
    _keep: _Term

    def keeps(self, row: Mapping[str, Any]) -> bool:
        """Whether the row passes.

        Raises:
            KeyError: the row has no such column.
            TypeError: the row's values cannot be compared, e.g. text with a number.
        """
        return bool(self._keep(row))


def parse_filter(text: str) -> Filter:
    """The filter that a text describes.

    Raises:
        ValueError: anything but column names, constants, comparisons, and/or/not and len().
    """
    if len(text) > _LONGEST:
        raise ValueError(f"the filter is longer than {_LONGEST} characters")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{text!r} is not an expression ({_first_line(error)})") from None
    columns: dict[str, None] = {}
    try:
        keep = _term(tree, columns)
    except RecursionError:
        raise ValueError("the filter is nested too deeply") from None
    if not columns:
        raise ValueError(f"{text!r} names no column")
    return Filter(text, tuple(columns), keep)


def _first_line(error: BaseException) -> str:
    return str(getattr(error, "msg", None) or error).partition("\n")[0]


def _term(node: ast.expr, columns: dict[str, None]) -> _Term:
    match node:
        case ast.Name(id=name):
            columns[name] = None
            return lambda row: row[name]
        case ast.Constant(value=value) if isinstance(value, str | int | float | type(None)):
            return lambda row: value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=value)) if type(value) in (int, float):
            negative = -value  # type: ignore[operator]
            return lambda row: negative
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            inner = _term(operand, columns)
            return lambda row: not inner(row)
        case ast.BoolOp(op=op, values=values):
            terms = [_term(value, columns) for value in values]
            if isinstance(op, ast.And):
                return lambda row: all(term(row) for term in terms)
            return lambda row: any(term(row) for term in terms)
        case ast.Compare(left=left, ops=ops, comparators=others) if all(type(op) in _COMPARE for op in ops):
            terms = [_term(part, columns) for part in (left, *others)]
            tests = [_COMPARE[type(op)] for op in ops]
            return lambda row: all(test(a(row), b(row)) for test, a, b in zip(tests, terms, terms[1:], strict=False))
        case ast.List(elts=parts) | ast.Tuple(elts=parts) if all(isinstance(part, ast.Constant) for part in parts):
            members = [_term(part, columns)({}) for part in parts]
            return lambda row: members
        case ast.Call(func=ast.Name(id="len"), args=[argument], keywords=[]):
            measured = _term(argument, columns)
            return lambda row: _length(measured(row))
    raise ValueError(
        f"{ast.unparse(node)!r} is not allowed in a filter: use column names, constants, comparisons, "
        "and, or, not, len()"
    )


def _length(value: Any) -> int:
    return 0 if value is None else len(value)
