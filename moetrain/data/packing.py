"""Samples cut from documents, and rows packed from samples.

A sample is a piece of a document: at most ``seq_len - 2`` text tokens between a begin and an end mark. It does not
depend on packing, seed or batch (METRICS, section 0).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from moetrain.data.corpus import Corpus

MARKS = 2  # the begin and the end mark of a sample


@dataclass(frozen=True)
class Samples:
    """Samples as columns; ``domain`` counts the corpus's domains, ``start`` and ``length`` are text tokens.

    The answer is the span of the sample's text tokens that its document marks: of length 0 where it marks none, or
    where the piece does not hold the whole of it.
    """

    domain: np.ndarray  # int16 [S]
    document: np.ndarray  # uint64 [S], the document's id
    piece: np.ndarray  # int32 [S], which piece of the document
    start: np.ndarray  # int64 [S], into the domain's tokens
    length: np.ndarray  # int32 [S]
    answer_start: np.ndarray  # int32 [S], counted from the sample's first text token
    answer_length: np.ndarray  # int32 [S]

    def __len__(self) -> int:
        return len(self.domain)

    @property
    def row_lengths(self) -> np.ndarray:
        """Tokens each sample takes in a row, marks included, int64 [S]."""
        return self.length.astype(np.int64) + MARKS

    def take(self, which: np.ndarray) -> Samples:
        return Samples(*(getattr(self, column.name)[which] for column in fields(self)))


def cut_samples(corpus: Corpus, seq_len: int, heldout: bool) -> Samples:
    """The samples of all training (or all held-out) documents, by domain, document and piece."""
    longest = seq_len - MARKS
    columns = []
    for number, domain in enumerate(corpus.domains):
        index = domain.index[(domain.index["heldout"] == heldout) & (domain.index["length"] > 0)]
        pieces = -(-index["length"] // longest)
        row = np.repeat(np.arange(len(index)), pieces)
        piece = np.arange(len(row)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        length = np.minimum(longest, index["length"][row] - piece * longest)
        answer = index["answer_start"][row] - piece * longest
        answer_end = index["answer_end"][row] - piece * longest
        held = (answer >= 0) & (answer < answer_end) & (answer_end <= length)
        columns.append(
            Samples(
                domain=np.full(len(row), number, np.int16),
                document=index["id"][row],
                piece=piece.astype(np.int32),
                start=index["start"][row] + piece * longest,
                length=length.astype(np.int32),
                answer_start=np.where(held, answer, 0).astype(np.int32),
                answer_length=np.where(held, answer_end - answer, 0).astype(np.int32),
            )
        )
    return join_samples(columns)


def join_samples(parts: Sequence[Samples]) -> Samples:
    """Samples one after another."""
    return Samples(*(np.concatenate([getattr(part, column.name) for part in parts]) for column in fields(Samples)))


@dataclass(frozen=True)
class Rows:
    """Packed rows: row r holds ``samples[starts[r]:starts[r + 1]]``."""

    starts: np.ndarray  # int64 [R + 1]
    samples: np.ndarray  # int64

    def __len__(self) -> int:
        return len(self.starts) - 1

    def row(self, number: int) -> np.ndarray:
        return self.samples[self.starts[number] : self.starts[number + 1]]

    @property
    def most_samples(self) -> int:
        """The largest number of samples in one row: the fixed, padded size of what is recorded by sample."""
        return int(np.diff(self.starts).max(initial=1))


def pack_rows(order: np.ndarray, lengths: np.ndarray, seq_len: int, window: int, seed: int) -> Rows:
    """Pack samples into rows of ``seq_len`` tokens, best fit in decreasing length within windows of ``order``.

    Args:
        order: samples in the order of the stream, int64.
        lengths: tokens each sample takes, by sample number, at most ``seq_len``.
        window: samples that are packed together. Within a window rows come out in a seeded order, so that the
            long samples, which best fit places first, do not all come first.

    What does not fill a row at the end of a window goes over to the next one, so that only the stream's last rows
    are short.
    """
    rows: list[np.ndarray] = []
    carried = order[:0]
    for number, begin in enumerate(range(0, len(order), window)):
        last = begin + window >= len(order)
        pending = np.concatenate([carried, order[begin : begin + window]])
        packed, room = _best_fit(pending, lengths[pending], seq_len)
        if not last:
            # A row emptier than the rest would be filled by samples to come: hand it over.
            keep = np.asarray(room) <= max(1, seq_len // 50)
            carried = np.concatenate([order[:0], *(packed[r] for r in np.flatnonzero(~keep))])
            if len(carried) > window:  # nothing fits together (all samples just over half a row): do not grow
                keep[:] = True
                carried = order[:0]
            packed = [packed[r] for r in np.flatnonzero(keep)]
        shuffled = np.random.default_rng([seed, number]).permutation(len(packed))
        rows.extend(packed[r] for r in shuffled)
    starts = np.concatenate([[0], np.cumsum([len(row) for row in rows], dtype=np.int64)]).astype(np.int64)
    return Rows(starts, np.concatenate(rows) if rows else order[:0])


def _best_fit(samples: np.ndarray, lengths: np.ndarray, seq_len: int) -> tuple[list[np.ndarray], list[int]]:
    """Rows of samples and the room left in each: longest first, each into the fullest row that still takes it."""
    rows: list[list[int]] = []
    room: list[int] = []
    by_room: list[list[int]] = [[] for _ in range(seq_len + 1)]
    occupied = 0  # bit r set: some row has room r; the lowest set bit from a length on is the best fit
    for place in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[place])
        fitting = occupied >> length
        if fitting:
            left = length + (fitting & -fitting).bit_length() - 1
            row = by_room[left].pop()
            if not by_room[left]:
                occupied &= ~(1 << left)
        else:
            row, left = len(rows), seq_len
            rows.append([])
            room.append(seq_len)
        left -= length
        rows[row].append(place)
        room[row] = left
        by_room[left].append(row)
        occupied |= 1 << left
    return [samples[row] for row in rows], room
