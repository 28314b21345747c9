"""Held-out loss per domain: forward passes, shared among ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from moetrain.data.batch import IGNORED
from moetrain.data.stream import Stream
from moetrain.distributed.mesh import ParallelLayout
from moetrain.models.transformer import Transformer


@dataclass(frozen=True)
class HeldOutLoss:
    """A domain's loss on held-out text."""

    nats: float  # summed over predicted tokens
    tokens: int
    text_bytes: int

    @property
    def loss(self) -> float:
        """Nats per predicted token."""
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.text_bytes


@torch.no_grad()
def heldout_losses(
    layout: ParallelLayout, model: Transformer, streams: dict[str, Stream], token_bytes: torch.Tensor
) -> dict[str, HeldOutLoss]:
    """The loss on each domain's held-out samples.

    Args:
        token_bytes: bytes of text that each token id stands for, int64 [V].
    """
    sums = torch.zeros(len(streams), 3, dtype=torch.float64, device=layout.device)
    for number, stream in enumerate(streams.values()):
        for step in layout.share(stream.steps):  # rows beyond the stream are empty
            layout.progress.mark()
            batch = stream.batch(step, 0, stream.full_rows(step)).to(layout.device)
            output = model(batch.model_input(by_sample=False))
            predicted = batch.targets_BT[batch.targets_BT != IGNORED]
            sums[number, 0] += output.loss_BT.double().sum()
            sums[number, 1] += len(predicted)
            sums[number, 2] += token_bytes[predicted].sum()
    totals = layout.all_reduce_sum(sums).tolist()
    return {name: HeldOutLoss(nats, int(n), int(size)) for name, (nats, n, size) in zip(streams, totals, strict=True)}
