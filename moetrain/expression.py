"""Filters on the columns of a data set, such as ``language == "en" and score >= 3``. Parsed, never run as code.

Allowed: column names (``meta.score`` is field score of column meta), constants, comparisons (also chained, ``in`` and
``not in``), ``and``, ``or``, ``not`` and ``len()``. A comparison by order (``< <= > >=``) with null is false.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_Term = Callable[[Mapping[str, Any]], Any]

_MAX_LENGTH = 10_000  # characters; nesting deeper than this allows would exhaust the parser


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
    """A parsed filter."""

    text: str
    columns: tuple[str, ...]
    _term: _Term

    def keeps(self, row: Mapping[str, Any]) -> bool:
        """Whether the row passes.

        Raises:
            KeyError: the row has no such column.
            TypeError: the row's values cannot be compared, e.g. text with a number.
        """
        return bool(self._term(row))


def parse_filter(text: str) -> Filter:
    """Parse a filter.

    Raises:
        ValueError: the text holds anything but column names, constants, comparisons, and/or/not and len().
    """
    if len(text) > _MAX_LENGTH:
        raise ValueError(f"the filter is longer than {_MAX_LENGTH} characters")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{text!r} is not an expression ({_first_line(error)})") from None
    columns: dict[str, None] = {}
    try:
        term = _parse_term(tree, columns)
    except RecursionError:
        raise ValueError("the filter is nested too deeply") from None
    if not columns:
        raise ValueError(f"{text!r} names no column")
    return Filter(text, tuple(columns), term)


def _first_line(error: BaseException) -> str:
    return str(getattr(error, "msg", None) or error).partition("\n")[0]


def _parse_term(node: ast.expr, columns: dict[str, None]) -> _Term:
    """The function of a row that a node stands for; ``columns`` collects the columns it reads."""
    match node:
        case ast.Name() | ast.Attribute() if (name := _field_name(node)) is not None:
            columns[name] = None
            return lambda row: field_value(row, name)
        case ast.Constant(value=value) if isinstance(value, str | int | float | type(None)):
            return lambda row: value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=value)) if type(value) in (int, float):
            negative = -value  # type: ignore[operator]
            return lambda row: negative
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            inner = _parse_term(operand, columns)
            return lambda row: not inner(row)
        case ast.BoolOp(op=op, values=values):
            terms = [_parse_term(value, columns) for value in values]
            if isinstance(op, ast.And):
                return lambda row: all(term(row) for term in terms)
            return lambda row: any(term(row) for term in terms)
        case ast.Compare(left=left, ops=ops, comparators=others) if all(type(op) in _COMPARE for op in ops):
            terms = [_parse_term(part, columns) for part in (left, *others)]
            tests = [_COMPARE[type(op)] for op in ops]
            return lambda row: all(test(a(row), b(row)) for test, a, b in zip(tests, terms, terms[1:], strict=False))
        case ast.List(elts=parts) | ast.Tuple(elts=parts) if all(isinstance(part, ast.Constant) for part in parts):
            members = [_parse_term(part, columns)({}) for part in parts]
            return lambda row: members
        case ast.Call(func=ast.Name(id="len"), args=[argument], keywords=[]):
            measured = _parse_term(argument, columns)
            return lambda row: _length(measured(row))
    raise ValueError(
        f"{ast.unparse(node)!r} is not allowed in a filter: use column names, constants, comparisons, "
        "and, or, not, len()"
    )


def _field_name(node: ast.expr) -> str | None:
    """``a`` or ``a.b`` of a node that names a field; None if it is something else."""
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=inner, attr=name) if (outer := _field_name(inner)) is not None:
            return f"{outer}.{name}"
    return None


def field_value(record: Mapping[str, Any], name: str) -> Any:
    """A field of a record, or of a record inside it by ``a.b``; of a list of records, the list of their fields.

    Raises:
        KeyError: there is no such field.
    """
    if name in record:
        return record[name]
    outer, _, inner = name.partition(".")
    if not inner or outer not in record:
        raise KeyError(name)
    try:
        return _inner_value(record[outer], inner)
    except KeyError:
        raise KeyError(name) from None


def _inner_value(value: Any, name: str) -> Any:
    if value is None:
        return None
    if isinstance(value, list):
        return [_inner_value(each, name) for each in value]
    if isinstance(value, Mapping):
        return field_value(value, name)
    raise KeyError(name)


def _length(value: Any) -> int:
    return 0 if value is None else len(value)
