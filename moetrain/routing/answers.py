"""Routing where an answer is decided: the router's probabilities at each token that a panel sample's answer follows.

The sums by sample that a forward pass returns do not hold single tokens, and tokens among those whose routing is
compared cannot be counted twice. So rows with marked answers are passed through the model once more, each such token
a slot of its own; a panel without marked answers costs nothing.

Suffixes: A answer tokens, of all samples; L layers, E experts; B rows of T tokens, S samples a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from moetrain.data.stream import Batch, Stream
from moetrain.models.transformer import Transformer

LONGEST_ANSWER = 16
"""Tokens of an answer above which it is not read: a long text does not come out whole, and would fill the disk."""


@dataclass(frozen=True)
class AnswerRouting:
    """Routing of answer tokens, ordered by sample and place; there may be none."""

    member: np.ndarray  # int32 [A], the sample's place in the panel
    place: np.ndarray  # int16 [A], the token's place in the answer, from 0
    token: np.ndarray  # int32 [A], its id
    weights: np.ndarray  # float32 [A, L, E], float16 as stored: probabilities, before the top-k cut, it is predicted by

    def __len__(self) -> int:
        return len(self.member)

    def arrays(self) -> list[np.ndarray]:
        return [self.member, self.place, self.token, self.weights]


def no_answers(layers: int, experts: int, dtype: type[np.floating] = np.float32) -> AnswerRouting:
    """What is read of a panel without marked answers."""
    nothing = np.zeros(0, np.int32)
    return AnswerRouting(nothing, nothing.astype(np.int16), nothing, np.zeros((0, layers, experts), dtype))


def join_answers(parts: Sequence[AnswerRouting]) -> AnswerRouting:
    """Parts put together and into order, whichever process or row each came from."""
    member, place, token, weights = (
        np.concatenate(arrays) for arrays in zip(*(p.arrays() for p in parts), strict=True)
    )
    order = np.lexsort((place, member))
    return AnswerRouting(member[order], place[order], token[order], weights[order])


def short_answers(stream: Stream) -> np.ndarray:
    """Whether a sample has a marked answer that is read, bool [samples]."""
    return stream.answered & (stream.samples.answer_length <= LONGEST_ANSWER)


@torch.no_grad()
def read_answers(
    model: Transformer, batch: Batch, stream: Stream, chosen: np.ndarray, device: torch.device
) -> AnswerRouting:
    """The answer tokens of one batch's samples, by a forward pass of its own; none where it has no ``chosen`` sample.

    Args:
        stream: the one the batch is of, which predicts of ``chosen`` samples the answer alone.
        chosen: bool [samples], see `short_answers`.
    """
    samples_BS = batch.samples_BS.numpy()
    chosen_BS = (samples_BS >= 0) & chosen[samples_BS]
    if not chosen_BS.any():
        return no_answers(model.settings.num_hidden_layers, model.settings.num_experts)
    recorded_BT, slots = batch.record_per_token(torch.from_numpy(chosen_BS))
    inputs = replace(batch, recorded_BT=recorded_BT).to(device).model_input()
    _, routing = model.hidden_states(replace(inputs, slots_per_row=slots))
    assert routing is not None
    row_A, column_A = (recorded_BT >= 0).nonzero(as_tuple=True)
    member_A = samples_BS[row_A, batch.slots_BT[row_A, column_A]]
    # Text token j is predicted from position j: the begin mark stands at 0.
    place_A = batch.positions_BT[row_A, column_A].numpy() - stream.samples.answer_start[member_A]
    single_LAE = routing.sums_LBRE[:, row_A.to(device), recorded_BT[row_A, column_A].to(device)]
    return AnswerRouting(
        member_A.astype(np.int32),
        place_A.astype(np.int16),
        batch.targets_BT[row_A, column_A].numpy().astype(np.int32),
        single_LAE.transpose(0, 1).cpu().numpy(),
    )
