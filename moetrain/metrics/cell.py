"""The argument of every metric: samples of one domain with their routing, losses and answers.

Shapes: S samples, L layers, E experts, D hidden size, A answer tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np

from moetrain import grokking
from moetrain.grokking import Estimate
from moetrain.grokking.consistency import GroupConsistency

CellName = Literal["seen", "to_come", "heldout", "unseen", "stream", "domain", "model", "probe"]
SEEN: CellName = "seen"  # panel samples that the run has trained on by now
TO_COME: CellName = "to_come"  # panel samples that it first trains on in its last tenth
HELDOUT: CellName = "heldout"  # panel samples that it never trains on
UNSEEN: CellName = "unseen"  # both: panel samples that it has not trained on by now
STREAM: CellName = "stream"  # the newest samples that it trained on
DOMAIN: CellName = "domain"  # a domain's text as a whole: the trainer or the evaluation takes the value
MODEL: CellName = "model"  # the model as a whole: likewise
PROBE: CellName = "probe"  # the items of a probe task


def _nothing() -> np.ndarray:
    return np.zeros(0)


@dataclass(frozen=True)
class AnswerTokens:
    """Routing at the tokens that marked answers are predicted from; see `moetrain.grokking.left_out`."""

    weights: np.ndarray  # float64 [A, L, E], router probabilities, each [token, layer] summing to 1
    sample: np.ndarray  # int [A], the sample's index in the panel
    place: np.ndarray  # int [A], the token's place in the answer, from 0
    token: np.ndarray  # int [A], its id


@dataclass(frozen=True)
class Cell:
    """Samples of one domain in one cell at one reading, or in a window of the training stream.

    A window has routing only: the fields below ``tau`` keep their defaults. ``foreign`` are seen samples of other
    domains over an equal number of tokens.
    """

    name: CellName
    weights: np.ndarray  # float64 [S, L, E], mean router probabilities, each [sample, layer] summing to 1
    blocks: tuple[np.ndarray, np.ndarray]  # Gram blocks of the routers, see `moetrain.grokking.gram_blocks`
    tau: float  # share of the routing weight that a pathway covers
    max_pairs: int | None = None  # of a mean distance; None: all
    losses: np.ndarray = field(default_factory=_nothing)  # float32, nats per token, the finite ones
    documents: np.ndarray = field(default_factory=_nothing)  # uint64, the document of each of ``losses``
    initial: np.ndarray = field(default_factory=_nothing)  # float32, each of ``losses`` before the first step, or NaN
    difficulty: np.ndarray = field(default_factory=_nothing)  # float32, likewise: loss under the tokens' frequencies
    claims: np.ndarray = field(default_factory=_nothing)  # float32 [2, ...], likewise: gain and claim, or NaN
    texts: np.ndarray = field(default_factory=_nothing)  # uint64 [S], the document of each sample; empty in a window
    foreign_texts: np.ndarray = field(default_factory=_nothing)  # likewise, of ``foreign``
    tokens: np.ndarray = field(default_factory=_nothing)  # int [S], whose routing it is
    even: np.ndarray = field(default_factory=_nothing)  # float64 [S, L, E], routing of the even tokens
    odd: np.ndarray = field(default_factory=_nothing)  # float64 [S, L, E], of the odd tokens; NaN for a single token
    inputs: np.ndarray = field(default_factory=_nothing)  # float [S, L, D], mean layer inputs; empty if not recorded
    answers: AnswerTokens | None = None  # of the samples whose documents mark an answer
    foreign: np.ndarray = field(default_factory=_nothing)  # float64 [S', L, E], see below
    peers: Mapping[CellName, Cell] = field(default_factory=dict)  # the domain's other cells at this reading
    step: int = 0  # of the reading
    steps: int = 0  # of the whole run

    def __len__(self) -> int:
        return len(self.weights)

    @cached_property
    def distances(self) -> tuple[Estimate, Estimate]:
        """Mean pathway distance in edits, and normalised, from one pass over the pairs."""
        return grokking.d_path_both(self.weights, self.tau, self.max_pairs, documents=self.resampled)

    @cached_property
    def consistency(self) -> GroupConsistency:
        """Cosine, consistency and inconsistency of consecutive layers, from one pass over the layers."""
        return grokking.group_consistency(self.weights, self.blocks, documents=self.resampled)

    @property
    def resampled(self) -> np.ndarray | None:
        """What intervals resample: the documents of the samples, or, where they are not known, the samples."""
        return self.texts if len(self.texts) else None

    def statistic(self, of_weights: Callable[[np.ndarray], float]) -> Estimate:
        """A statistic of the routing weights with its jackknife interval; a window, read often, has no interval."""
        if self.name == STREAM:
            return Estimate(of_weights(self.weights), math.nan, math.nan, len(self), 0)
        return grokking.jackknife(lambda which: of_weights(self.weights[which]), len(self), documents=self.resampled)
