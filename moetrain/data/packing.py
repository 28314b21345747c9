"""Samples cut from documents, and rows packed with samples.

A sample is a piece of a document: at most ``seq_len - 2`` text tokens between a begin and an end mark. Samples do not
depend on packing, seed or batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from moetrain.data.corpus import Corpus

MARKS = 2  # the begin and the end mark of a sample


@dataclass(frozen=True)
class Samples:
    """Samples as columns. ``start`` and ``length`` count text tokens, without marks.

    The answer is the range of text tokens that the document marks. Its length is 0 if the document marks none or the
    sample does not hold all of it.
    """

    domain: np.ndarray  # int16 [S], number of the domain in the corpus
    document: np.ndarray  # uint64 [S], the document's id
    piece: np.ndarray  # int32 [S], which piece of the document
    start: np.ndarray  # int64 [S], into the domain's tokens
    length: np.ndarray  # int32 [S]
    answer_start: np.ndarray  # int32 [S], from the first text token of the sample
    answer_length: np.ndarray  # int32 [S]

    def __len__(self) -> int:
        return len(self.domain)

    @property
    def row_lengths(self) -> np.ndarray:
        """Tokens of each sample in a row, with marks, int64 [S]."""
        return self.length.astype(np.int64) + MARKS

    def take(self, which: np.ndarray) -> Samples:
        return Samples(**{column.name: getattr(self, column.name)[which] for column in fields(self)})


def cut_samples(corpus: Corpus, seq_len: int, heldout: bool) -> Samples:
    """The samples of all training documents, or of all held-out ones, ordered by domain, document and piece."""
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
        complete = (answer >= 0) & (answer < answer_end) & (answer_end <= length)
        columns.append(
            Samples(
                domain=np.full(len(row), number, np.int16),
                document=index["id"][row],
                piece=piece.astype(np.int32),
                start=index["start"][row] + piece * longest,
                length=length.astype(np.int32),
                answer_start=np.where(complete, answer, 0).astype(np.int32),
                answer_length=np.where(complete, answer_end - answer, 0).astype(np.int32),
            )
        )
    return join_samples(columns)


def join_samples(parts: Sequence[Samples]) -> Samples:
    """Concatenate samples."""
    columns = {column.name: [getattr(part, column.name) for part in parts] for column in fields(Samples)}
    return Samples(**{name: np.concatenate(column) for name, column in columns.items()})


@dataclass(frozen=True)
class Rows:
    """Packed rows. Row r holds ``samples[starts[r]:starts[r + 1]]``."""

    starts: np.ndarray  # int64 [R + 1]
    samples: np.ndarray  # int64

    def __len__(self) -> int:
        return len(self.starts) - 1

    def row(self, number: int) -> np.ndarray:
        return self.samples[self.starts[number] : self.starts[number + 1]]

    @property
    def most_samples(self) -> int:
        """The largest number of samples in a row, to which everything recorded per sample is padded."""
        return int(np.diff(self.starts).max(initial=1))


def pack_rows(order: np.ndarray, lengths: np.ndarray, seq_len: int, window: int, seed: int) -> Rows:
    """Pack samples into rows of ``seq_len`` tokens: best-fit decreasing within windows of ``order``.

    The rows of a window are shuffled by the seed, as best fit would put the long samples first. Samples of rows that
    are not full at the end of a window are moved to the next one, so that only the last rows of the stream are short.

    Args:
        order: samples in the order of the stream, int64.
        lengths: tokens of each sample with marks, at most ``seq_len``, indexed by sample.
        window: samples that are packed together.
    """
    rows: list[np.ndarray] = []
    carried = order[:0]
    for number, begin in enumerate(range(0, len(order), window)):
        last = begin + window >= len(order)
        pending = np.concatenate([carried, order[begin : begin + window]])
        packed, room = _best_fit(pending, lengths[pending], seq_len)
        if not last:
            # Samples of rows that are not nearly full go to the next window.
            full = np.asarray(room) <= max(1, seq_len // 50)
            carried = np.concatenate([order[:0], *(packed[r] for r in np.flatnonzero(~full))])
            if len(carried) > window:  # nothing fits together (all samples just over half a row): do not grow
                full[:] = True
                carried = order[:0]
            packed = [packed[r] for r in np.flatnonzero(full)]
        shuffled = np.random.default_rng([seed, number]).permutation(len(packed))
        rows.extend(packed[r] for r in shuffled)
    starts = np.concatenate([[0], np.cumsum([len(row) for row in rows], dtype=np.int64)]).astype(np.int64)
    return Rows(starts, np.concatenate(rows) if rows else order[:0])


def _best_fit(samples: np.ndarray, lengths: np.ndarray, seq_len: int) -> tuple[list[np.ndarray], list[int]]:
    """Rows of samples and the tokens left in each: longest sample first, each into the fullest row it fits into."""
    rows: list[list[int]] = []
    room: list[int] = []
    by_room: list[list[int]] = [[] for _ in range(seq_len + 1)]
    occupied = 0  # bit r is set if some row has room r; the best fit is the lowest set bit from a length on
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
