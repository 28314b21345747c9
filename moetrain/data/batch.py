"""Packed rows as tensors: the model's input, and the sample and domain of each token.

Shapes: B rows, T tokens per row, S samples per row (padded), N spans.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
import torch

from moetrain.device_transfer import to_device
from moetrain.model_input import PackedTokens

IGNORED = -100
"""Target of tokens from which nothing is predicted: the end mark of a sample, and padding."""


@dataclass(frozen=True)
class Batch:
    """Packed rows as tensors: the model's input, and the sample and domain of each token."""

    tokens_BT: torch.Tensor  # int64, padding is the end mark
    targets_BT: torch.Tensor  # int64, IGNORED if nothing is predicted from the token
    positions_BT: torch.Tensor  # int64, from 0 in each sample
    slots_BT: torch.Tensor  # int64, slot of the token's sample in its row, -1 for padding
    domains_BT: torch.Tensor  # int64, domain that the loss of the token counts for, -1 if nothing is predicted
    recorded_BT: torch.Tensor  # int64, 2 * slot + parity of text tokens whose routing is recorded, else -1
    spans_N2: torch.Tensor  # int64 on the CPU: (start, length) of each sample and padding in the flattened rows
    samples_BS: torch.Tensor  # int64 on the CPU, number of the sample, -1 for empty slots
    domains_BS: torch.Tensor  # int64 on the CPU, domain of the sample, -1 for empty slots
    compared_BS: torch.Tensor  # bool on the CPU, whether the sample has enough tokens for routing distances

    def model_input(self, by_sample: bool = True) -> PackedTokens:
        """The input of `moetrain.models.transformer.Transformer`; without ``by_sample`` no routing sums per sample."""
        return PackedTokens(
            tokens_BT=self.tokens_BT,
            targets_BT=self.targets_BT,
            positions_BT=self.positions_BT,
            slots_BT=self.slots_BT,
            recorded_BT=self.recorded_BT,
            spans_N2=self.spans_N2,
            slots_per_row=self.samples_BS.shape[1] if by_sample else 0,
        )

    def sum_by_sample(self, values_BT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sum of values over the predicted tokens of each sample, and their number: two float64 arrays [B, S]."""
        rows, slots = self.samples_BS.shape
        predicted = self.targets_BT.cpu().numpy() != IGNORED
        place = (np.arange(rows)[:, None] * slots + self.slots_BT.cpu().numpy())[predicted]
        sums = np.bincount(place, values_BT[predicted], rows * slots)
        return sums.reshape(rows, slots), np.bincount(place, minlength=rows * slots).reshape(rows, slots).astype(float)

    def record_per_token(self, chosen_BS: torch.Tensor) -> tuple[torch.Tensor, int]:
        """A ``recorded_BT`` that records the routing of each predicted token of the chosen samples by itself.

        Args:
            chosen_BS: bool, the samples.

        Returns:
            ``recorded_BT``, which numbers these tokens 0, 1, ... in each row and holds -1 for all others; and the
            slots per row that this takes at 2 tokens per slot, a multiple of 8 so that few shapes occur.
        """
        chosen_BT = chosen_BS.gather(1, self.slots_BT.clamp(min=0)) & (self.targets_BT != IGNORED)
        recorded_BT = torch.where(chosen_BT, chosen_BT.cumsum(1) - 1, -1)
        return recorded_BT, -(-int(chosen_BT.sum(1).max()) // 16) * 8

    def to(self, device: torch.device) -> Batch:
        """The batch with the tensors that the model reads on ``device``; the others stay on the host."""
        return self._map(lambda tensor: to_device(tensor, device))

    def pin_memory(self) -> Batch:
        """The batch with the tensors that the model reads in pinned memory, from which a GPU copies beside its work."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        host = ("spans_N2", "samples_BS", "domains_BS", "compared_BS")
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return Batch(**{name: tensor if name in host else change(tensor) for name, tensor in tensors.items()})
