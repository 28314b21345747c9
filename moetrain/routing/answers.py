"""Routing of answers: the router's probabilities at each token from which a token of a marked answer is predicted.

A forward pass returns sums per sample, not single tokens. Samples whose answers are compared are therefore passed
through the model a second time, in rows of their own, with a slot for each answer token.

Suffixes: A answer tokens of all samples, L layers, E experts; B rows of T tokens, S samples per row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from moetrain.data.batch import Batch
from moetrain.data.stream import Stream
from moetrain.distributed.mesh import ParallelLayout
from moetrain.models.transformer import Transformer

LONGEST_ANSWER = 16
"""Longer answers, in tokens, are not read: long texts are rarely predicted completely, and would fill the disk."""


@dataclass(frozen=True)
class AnswerRouting:
    """Routing of answer tokens, ordered by sample and place; it may be empty."""

    member: np.ndarray  # int32 [A], index of the sample in the panel
    place: np.ndarray  # int16 [A], the token's place in the answer, from 0
    token: np.ndarray  # int32 [A], its id
    weights: np.ndarray  # float32 [A, L, E], stored as float16: router probabilities at the token before

    def __len__(self) -> int:
        return len(self.member)

    def take(self, which: np.ndarray) -> AnswerRouting:
        """Some of the answer tokens, by mask or index."""
        return AnswerRouting(**{field.name: getattr(self, field.name)[which] for field in fields(self)})


def no_answers(layers: int, experts: int, dtype: type[np.floating] = np.float32) -> AnswerRouting:
    """The routing of no answer tokens."""
    return AnswerRouting(
        member=np.zeros(0, np.int32),
        place=np.zeros(0, np.int16),
        token=np.zeros(0, np.int32),
        weights=np.zeros((0, layers, experts), dtype),
    )


def join_answers(parts: Sequence[AnswerRouting]) -> AnswerRouting:
    """The parts of all rows and ranks, concatenated and ordered by sample and place."""
    names = [field.name for field in fields(AnswerRouting)]
    joined = AnswerRouting(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})
    return joined.take(np.lexsort((joined.place, joined.member)))


def short_answers(stream: Stream) -> np.ndarray:
    """Whether each sample has a marked answer that is read, bool [samples]."""
    return stream.answered & (stream.samples.answer_length <= LONGEST_ANSWER)


@torch.no_grad()
def read_answers(model: Transformer, batch: Batch, stream: Stream, layout: ParallelLayout) -> AnswerRouting:
    """The answer tokens of the samples of a batch, by a forward pass.

    A collective where the model is sharded.

    Args:
        model: the model.
        batch: packed rows; none where this rank has no rows left.
        stream: the stream of the batch. All its samples have a short answer, which is all that is predicted of them.
    """
    samples_BS = batch.samples_BS.numpy()
    chosen_BS = samples_BS >= 0
    if not layout.passes(int(chosen_BS.any())):
        return no_answers(model.settings.num_hidden_layers, model.settings.recorded_experts)
    recorded_BT, slots = batch.record_per_token(torch.from_numpy(chosen_BS))
    inputs = replace(batch, recorded_BT=recorded_BT).to(layout.device).model_input()
    _, routing = model.hidden_states(replace(inputs, slots_per_row=slots))
    assert routing is not None
    row_A, column_A = (recorded_BT >= 0).nonzero(as_tuple=True)
    member_A = samples_BS[row_A, batch.slots_BT[row_A, column_A]]
    # Text token j is predicted from position j, since the begin marker is at position 0.
    place_A = batch.positions_BT[row_A, column_A].numpy() - stream.samples.answer_start[member_A]
    single_LAE = routing.sums_LBRE[:, row_A.to(layout.device), recorded_BT[row_A, column_A].to(layout.device)]
    return AnswerRouting(
        member=member_A.astype(np.int32),
        place=place_A.astype(np.int16),
        token=batch.targets_BT[row_A, column_A].numpy().astype(np.int32),
        weights=single_LAE.transpose(0, 1).cpu().numpy(),
    )
