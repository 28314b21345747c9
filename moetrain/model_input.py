"""What a forward pass reads: packed rows of tokens, typed. Both `moetrain.data` and `moetrain.models` build on it."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PackedTokens:
    """Rows of packed samples, with what the model needs to know about them.

    B rows, T tokens per row, N spans. All tensors are int64 and, but for ``spans_N2``, on the model's device.

    A plain dataclass on purpose: DDP and FSDP2 copy every tensor they find in a forward pass's arguments to the device
    and wait for it. They do not look into this class, which is no registered pytree: ``spans_N2`` stays on the host.
    """

    tokens_BT: torch.Tensor
    targets_BT: torch.Tensor | None  # negative where nothing is predicted; None for a pass without a loss
    positions_BT: torch.Tensor  # from 0 in each sample
    slots_BT: torch.Tensor  # which of its row's samples a token belongs to, -1 for padding
    recorded_BT: torch.Tensor  # which of its row's routing sums a token is added to (2 * slot + parity), -1 for none
    spans_N2: torch.Tensor  # on the CPU: (start, length) of every sample and padding, in the flattened rows
    slots_per_row: int = 0  # samples per row that routing is summed for; 0: no sums per sample

    @classmethod
    def one_sample_per_row(
        cls,
        tokens_BT: torch.Tensor,
        targets_BT: torch.Tensor | None = None,
        recorded_BT: torch.Tensor | None = None,
    ) -> PackedTokens:
        """Rows that each hold one sample and no padding. Without ``recorded_BT`` no routing sums per sample."""
        rows, length = tokens_BT.shape
        return cls(
            tokens_BT=tokens_BT,
            targets_BT=targets_BT,
            positions_BT=torch.arange(length, device=tokens_BT.device).expand(rows, length),
            slots_BT=torch.zeros_like(tokens_BT),
            recorded_BT=torch.full_like(tokens_BT, -1) if recorded_BT is None else recorded_BT,
            spans_N2=torch.tensor([(row * length, length) for row in range(rows)], device="cpu"),
            slots_per_row=0 if recorded_BT is None else 1,
        )
