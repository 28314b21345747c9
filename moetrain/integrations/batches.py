"""The routing of the samples that another trainer trains on, taken from its own forward passes.

Shapes: B rows of a batch, T their length, S samples (rows, or the sequences of a row without padding), K first tokens,
R = 2S or 2 halves of samples, L routers, E experts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moetrain.device_transfer import HostCopy
from moetrain.integrations.recorder import RouterRecorder
from moetrain.integrations.rows import NO_TOKEN, MonitorError, row_keys
from moetrain.models.router import RecordingMasks
from moetrain.training.throughput import Clock


@dataclass(frozen=True)
class TrainedOn:
    """Samples of one forward pass of training."""

    step: int  # that trains on them, from 1
    first: int  # samples of this rank in the step before them
    keys: np.ndarray  # uint64 [S], what their rows are known by
    tokens: np.ndarray  # int64 [S]
    compared: np.ndarray  # bool [S], whether they have K tokens, over which routing is compared
    sums_SL2E: np.ndarray  # float32, probabilities summed over the even and the odd of the first tokens


class BatchRecorder:
    """Records each forward pass with gradient of a model in training mode.

    Args:
        model: the module that the trainer calls, or one inside of it that gets the same arguments.
        count: first tokens of a sample over which routing is compared.
        clock: what the time is charged to, as ``record``.

    Attributes:
        step: that the coming passes belong to.
    """

    def __init__(self, model: nn.Module, recorder: RouterRecorder, count: int, clock: Clock) -> None:
        self._recorder, self._count, self._clock = recorder, count, clock
        self._samples: tuple[Tensor, Tensor] | None = None
        self._coming: deque[tuple[int, int, HostCopy]] = deque()
        self._in_step = (0, 0)  # a step, and this rank's samples in it so far
        self.step = 1
        self._hooks = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()

    def arrived(self, wait: bool = False) -> Iterator[TrainedOn]:
        """What has reached the host since the last call; with ``wait``, everything."""
        while self._coming and (wait or self._coming[0][2].arrived):
            step, before, copy = self._coming.popleft()
            tokens_SK, length_S, sums_LS2E = copy.wait()
            first = tokens_SK.numpy()
            yield TrainedOn(
                step=step,
                first=before,
                keys=row_keys(first),
                tokens=length_S.numpy(),
                compared=first[:, -1] != NO_TOKEN,
                sums_SL2E=np.ascontiguousarray(sums_LS2E.transpose(0, 1).numpy()),
            )

    @torch.compiler.disable
    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not model.training or not torch.is_grad_enabled():
            return
        ids_BT = kwargs.get("input_ids", args[0] if args else None)
        if ids_BT is None:
            raise MonitorError("the model is called without input_ids: samples cannot be told: remove MonitorCallback")
        with self._clock.measure("record"):
            first, length_S, halves_BRT = first_tokens(
                ids_BT, kwargs.get("attention_mask"), kwargs.get("position_ids"), self._count
            )
            self._samples = first, length_S
            self._recorder.begin(RecordingMasks(ids_BT.new_ones(0).float(), halves_BRT), statistics=False)

    @torch.compiler.disable
    def _after(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        samples, self._samples = self._samples, None
        if samples is None:
            return
        if output is None:  # the pass failed
            self._recorder.drop()
            return
        with self._clock.measure("record"):
            layers = self._recorder.end()
            sums_LBRE = torch.stack([layer.sums_BRE for layer in layers])
            count = len(samples[1])
            before = self._in_step[1] if self._in_step[0] == self.step else 0
            self._in_step = self.step, before + count
            self._coming.append((self.step, before, HostCopy([*samples, sums_LBRE.view(len(layers), count, 2, -1)])))


def first_tokens(
    ids_BT: Tensor, mask: Tensor | None, positions_BT: Tensor | None, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The samples of a batch, padded on either side, or in one row without padding (``position_ids`` start again).

    Returns:
        Their first tokens [S, K], `NO_TOKEN` after the end of shorter ones; their lengths [S]; and which tokens count
        for the even and the odd half of each, float32 [B, R, T]: none of samples of fewer than K tokens.
    """
    rows, row_length = ids_BT.shape
    place_T = torch.arange(row_length, device=ids_BT.device)
    if len(ids_BT) == 1 and positions_BT is not None and positions_BT.ndim == 2 and (mask is None or mask.ndim != 2):
        start_S = (positions_BT[0] == 0).nonzero()[:, 0]
        end = torch.full((1,), row_length, dtype=start_S.dtype, device=start_S.device)
        length_S = torch.diff(start_S, append=end)
        row_S, per_row = torch.zeros_like(start_S), len(start_S)
    else:
        valid_BT = torch.ones_like(ids_BT) if mask is None or mask.ndim != 2 else (mask != 0).long()
        start_S, length_S = valid_BT.argmax(1), valid_BT.sum(1)
        row_S, per_row = torch.arange(rows, device=ids_BT.device), 1
    offset_K = torch.arange(count, device=ids_BT.device)
    column_SK = (start_S[:, None] + offset_K).clamp(max=row_length - 1)
    first_SK = torch.where(offset_K < length_S[:, None], ids_BT[row_S[:, None], column_SK], NO_TOKEN)
    offset_ST = place_T - start_S[:, None]
    counted_ST = (offset_ST >= 0) & (offset_ST < count) & (length_S >= count)[:, None]
    halves_S2T = torch.stack([counted_ST & (offset_ST % 2 == half) for half in (0, 1)], dim=1)
    return first_SK, length_S, halves_S2T.float().view(rows, 2 * per_row, row_length)
