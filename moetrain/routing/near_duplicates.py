"""Held-out texts of the panel of which the training text holds a copy: near-duplicates under another id.

A held-out text that occurs in the training text is not unseen: its loss, and with it the memorized share, is too low.
Duplicate documents are dropped when the data are prepared; a document that differs by a line is not. So the tokens of
each held-out panel sample are searched for in its domain's training text, by runs of `RUN` consecutive tokens.

Shapes: N tokens, W = N - RUN + 1 runs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moetrain.data.contamination import run_hashes
from moetrain.data.corpus import Corpus
from moetrain.data.packing import Samples
from moetrain.routing.panel import HELDOUT, Panel

RUN = 32
"""Tokens: 13 words, the usual length of such searches, are 17 tokens of a large vocabulary and 35 of a small one.
Shorter runs are phrases that any text of the kind holds: 10 of 64 held-out functions of the quickstart share 24 tokens
with others, 3 share 32."""
SEARCHED = 2**26
"""First tokens of a domain that are searched, 0.08 s of one core per million. Copies beyond them are not found."""
_CHUNK = 2**20


@dataclass(frozen=True)
class NearDuplicates:
    """Held-out panel samples of a domain: how many were searched for, and how many occur in the training text."""

    searched: int
    found: int

    def sentence(self, domain: str) -> str:
        """What was found, and what follows."""
        return (
            f"{domain}: {self.found} of {self.searched} held-out texts of the panel share {RUN} consecutive tokens "
            "with the training text: copies make its memorized share too low"
        )


def near_duplicates(panel: Panel, corpus: Corpus, trained: Samples) -> dict[str, NearDuplicates]:
    """By domain; without domains whose held-out panel samples are all shorter than a run or mark answers.

    Args:
        panel: of the run.
        corpus: whose tokens are searched.
        trained: the samples of the training stream. Text outside of them is not searched.
    """
    found = {}
    for number, domain in enumerate(corpus.domains):
        members = panel.members(number, HELDOUT)
        members = members[(panel.samples.length[members] >= RUN) & ~panel.stream.answered[members]]
        if not len(members):
            continue
        owners, runs = [], []
        for member in members:
            hashes_W = _hashes(panel.stream.sequence(member)[1:-1])
            owners.append(np.full(len(hashes_W), member))
            runs.append(hashes_W)
        own = trained.domain == number
        hit = _found(np.concatenate(runs), domain.tokens[:SEARCHED], trained.start[own], trained.length[own])
        copied = np.unique(np.concatenate(owners)[hit])
        found[domain.name] = NearDuplicates(len(members), len(copied))
    return found


def _hashes(tokens_N: np.ndarray) -> np.ndarray:
    """The hash of each run of `RUN` tokens, uint64 [W]; none of a shorter text."""
    if len(tokens_N) < RUN:
        return np.zeros(0, np.uint64)
    return run_hashes(tokens_N.astype(np.uint64) + np.uint64(1), RUN)


def _found(wanted: np.ndarray, tokens_N: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Whether each wanted hash is that of a run within one of the pieces of text [start, start + length), bool."""
    order = np.argsort(starts, kind="stable")
    starts, ends = starts[order], (starts + lengths)[order]
    distinct, place = np.unique(wanted, return_inverse=True)
    met = np.zeros(len(distinct), bool)
    for begin in range(0, len(tokens_N), _CHUNK):
        hashes_W = _hashes(np.asarray(tokens_N[begin : begin + _CHUNK + RUN - 1]))
        near = np.minimum(distinct.searchsorted(hashes_W), len(distinct) - 1)
        at = np.flatnonzero(distinct[near] == hashes_W)
        if not len(at) or not len(starts):
            continue
        piece = starts.searchsorted(begin + at, side="right") - 1
        inside = (piece >= 0) & (begin + at + RUN <= ends[piece])
        met[near[at[inside]]] = True
    return met[place]
