"""Token ids of records, split into documents at marks, and checked against the tokenizer.

A document ends after an end mark, before a begin mark, and with its record unless records are concatenated. The marks
themselves are left out, as every sample gets its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from moetrain.data.errors import DataError
from moetrain.data.sources.rows import Row
from moetrain.data.tokenizer_base import Tokenizer

LONGEST = 2**28
"""Ids of concatenated records without a mark after which reading stops."""

_LOOKED_AT = 64  # last ids of records by which another end mark is noticed
_FEWEST = 8

REMEDY = "set tokenizer.model to the tokenizer that made them"


def split_documents(
    rows: Iterable[Row], path: Path, tokenizer: Tokenizer, concatenated: bool, start: int
) -> Iterator[Row]:
    """A row of each document from number ``start``, with ids without marks.

    Args:
        rows: records in the order of the file, each with all of its ids.
        concatenated: the records are pieces of one sequence.

    Raises:
        DataError: an id is outside of the vocabulary; records end with another special token; or concatenated records
            hold no mark.
    """
    if concatenated:
        rows = _joined(_checked(rows, path, tokenizer, True), path, tokenizer)
    else:
        rows = _separated(_checked(_same_end(rows, path, tokenizer), path, tokenizer, False), tokenizer)
    for number, row in enumerate(rows, 1):
        if number > start:
            yield row._replace(number=number)


def _checked(rows: Iterable[Row], path: Path, tokenizer: Tokenizer, concatenated: bool) -> Iterator[Row]:
    """The same rows; raises DataError at an id outside of the vocabulary."""
    before = 0
    for row in rows:
        ids = row.tokens
        if ids is not None and len(ids):
            if int(ids.max()) >= tokenizer.vocab_size or int(ids.min()) < 0:
                at = int(np.argmax((ids >= tokenizer.vocab_size) | (ids < 0)))
                place = f"{path}, token {before + at}" if concatenated else f"{row.place}, token {at}"
                raise DataError(
                    f"{place}: id {ids[at]} is outside of the vocabulary of {tokenizer.vocab_size} ids: {REMEDY}"
                )
            before += len(ids)
        yield row


def _same_end(rows: Iterable[Row], path: Path, tokenizer: Tokenizer) -> Iterator[Row]:
    """The same rows; raises DataError if a special token ends the first of them all, and is not the end mark.

    A token that also stands within rows, as the one that ends a turn of a conversation, does not count.
    """
    rows = iter(rows)
    first = list(islice(rows, _LOOKED_AT))
    filled = [row.tokens for row in first if row.tokens is not None and len(row.tokens)]
    ends = {int(ids[-1]) for ids in filled}
    if len(ends) == 1 and len(filled) >= _FEWEST:
        end = ends.pop()
        known = end in (tokenizer.begin_id, tokenizer.end_id) or not tokenizer.is_special(end)
        if not known and all((np.diff((ids == end).astype(np.int8)) >= 0).all() for ids in filled):
            raise DataError(
                f"{path}: its documents end with {_named(end, tokenizer)}, but the end mark is "
                f"{_named(tokenizer.end_id, tokenizer)}: if it ends them, set tokenizer.end_token to it; if it pads "
                "them, write them without padding"
            )
    yield from first
    yield from rows


def _separated(rows: Iterable[Row], tokenizer: Tokenizer) -> Iterator[Row]:
    """Documents of rows that each hold one or several."""
    for row in rows:
        if row.tokens is None:
            yield row
            continue
        documents = [part for part in _parts(row.tokens, tokenizer) if part[0] < part[1]]
        if not documents:
            yield row._replace(tokens=row.tokens[:0])
        for first, last, _, _ in documents:
            place = row.place if len(documents) == 1 else f"{row.place}, from token {first}"
            yield row._replace(tokens=row.tokens[first:last], place=place)


def _joined(rows: Iterable[Row], path: Path, tokenizer: Tokenizer) -> Iterator[Row]:
    """Documents of rows that are pieces of one sequence."""
    waiting: list[np.ndarray] = []  # of the document that is not closed yet
    before, begin, marks, last = 0, 0, 0, None
    special: Counter[int] = Counter()

    def document() -> Iterator[Row]:
        if waiting and last is not None:
            ids = waiting[0] if len(waiting) == 1 else np.concatenate(waiting)
            yield last._replace(tokens=ids, place=f"{path}, from token {begin}")
        waiting.clear()

    for row in rows:
        ids = row.tokens
        if ids is None:
            yield row
            continue
        last = row
        for first, end, is_new, is_closed in _parts(ids, tokenizer):
            marks += is_new + is_closed
            if is_new:
                yield from document()
            if first < end:
                begin = begin if waiting else before + first
                waiting.append(ids[first:end])
            if is_closed:
                yield from document()
        before += len(ids)
        if not marks:
            special.update(tokenizer.special_ids(ids))
            if before >= LONGEST:
                raise _no_mark(path, before, special, tokenizer)
    if before and not marks:
        raise _no_mark(path, before, special, tokenizer)
    yield from document()


def _parts(ids: np.ndarray, tokenizer: Tokenizer) -> Iterator[tuple[int, int, bool, bool]]:
    """(first id, one past the last, begins with a begin mark, ends with an end mark) of each part, marks left out."""
    begin, end = tokenizer.begin_id, tokenizer.end_id
    cuts = [np.array([0, len(ids)]), np.flatnonzero(ids == end) + 1]
    if begin != end:
        cuts.append(np.flatnonzero(ids == begin))
    edges = np.unique(np.concatenate(cuts))
    firsts, lasts = edges[:-1], edges[1:]
    new = (ids[firsts] == begin) & (begin != end)
    closed = ids[lasts - 1] == end
    yield from zip((firsts + new).tolist(), (lasts - closed).tolist(), new.tolist(), closed.tolist(), strict=True)


def _no_mark(path: Path, count: int, special: Counter[int], tokenizer: Tokenizer) -> DataError:
    found = [f"{_named(i, tokenizer)} {times} times" for i, times in special.most_common(3)]
    hint = f" (special tokens in it: {', '.join(found)})" if found else ""
    return DataError(
        f"{path}: no end mark {_named(tokenizer.end_id, tokenizer)} among its first {count} tokens{hint}, so that "
        "documents cannot be told apart: set tokenizer.end_token to the token that ends them, or correct dtype"
    )


def _named(i: int, tokenizer: Tokenizer) -> str:
    return f"{i} ({tokenizer.piece(i)!r})"
