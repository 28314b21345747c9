"""What a step may run into and training survives: numbers that are not finite, loss spikes, experts that die.

Shapes: L layers, E experts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from moetrain.config import GuardSettings
from moetrain.data.stream import Batch
from moetrain.device_transfer import HostCopy
from moetrain.models.transformer import Output
from moetrain.training.incidents import Incident

Recorded = Sequence[tuple[Batch, Output]]
"""A step's micro-batches and what the model made of them."""
Heard = list[tuple[Incident, Recorded]]


class Guards:
    """Watches each step's loss, gradient and load of experts.

    On a device it hears of a step while the next one is under way: to hear of it at once, the host would have to wait.
    What it has heard of is part of a checkpoint, so that a resumed run tells the same.
    """

    def __init__(self, settings: GuardSettings) -> None:
        self.settings = settings
        self.skipped = 0  # updates of the whole run
        self.skipped_in_a_row = 0
        self.last_skipped = 0  # step
        self._losses: deque[float] = deque(maxlen=settings.spike_window)
        self._in_spike = False
        self._idle_LE: torch.Tensor | None = None  # int64 on the device, steps since each expert got a token
        self._coming: deque[tuple[int, HostCopy, Recorded]] = deque()

    def check(
        self, step: int, made: torch.Tensor, loss: torch.Tensor, load_LE: torch.Tensor, recorded: Recorded
    ) -> Heard:
        """Take note of a step; returns what the steps that are known by now ran into.

        Args:
            made: whether its update was: it is skipped where loss or gradient is not finite.
            loss: mean over its tokens, nats.
            load_LE: tokens sent to each expert.
        """
        idle_LE = torch.zeros_like(load_LE, dtype=torch.int64) if self._idle_LE is None else self._idle_LE
        self._idle_LE = torch.where(made, torch.where(load_LE > 0, 0, idle_LE + 1), idle_LE)
        self._coming.append((step, HostCopy([made, loss, self._idle_LE]), recorded))
        return self._hear(waiting=0 if made.device.type == "cpu" else 1)

    def settle(self) -> Heard:
        """Wait for what is not known yet, as before a checkpoint; returns as `check`."""
        return self._hear(waiting=0)

    @property
    def diverged(self) -> bool:
        """Whether so many updates in a row were skipped that training cannot go on."""
        return self.skipped_in_a_row >= self.settings.skipped

    def state(self) -> dict[str, Any]:
        """For a checkpoint's record; only once all is settled."""
        assert not self._coming
        idle = None if self._idle_LE is None else self._idle_LE.tolist()
        skipped = {"skipped": self.skipped, "in_a_row": self.skipped_in_a_row, "last": self.last_skipped}
        return skipped | {"losses": list(self._losses), "in_spike": self._in_spike, "idle": idle}

    def load_state(self, state: dict[str, Any], device: torch.device) -> None:
        self.skipped, self.skipped_in_a_row, self.last_skipped = (state[k] for k in ("skipped", "in_a_row", "last"))
        self._losses.extend(state["losses"])
        self._in_spike = state["in_spike"]
        self._idle_LE = None if state["idle"] is None else torch.tensor(state["idle"], device=device)

    def _hear(self, waiting: int) -> Heard:
        heard: Heard = []
        while len(self._coming) > waiting:
            step, copy, recorded = self._coming.popleft()
            made, loss, idle_LE = copy.wait()
            if made:
                self.skipped_in_a_row = 0
                found = [*self._spike(step, float(loss)), *self._dead(step, idle_LE)]
            else:
                self.skipped += 1
                self.skipped_in_a_row += 1
                self.last_skipped = step
                said = "the loss or the gradient was not finite; the update was skipped"
                found = [Incident(step, "not_finite", said)]
            heard += [(incident, recorded) for incident in found]
        return heard

    def _spike(self, step: int, loss: float) -> list[Incident]:
        """A loss far above those of the last steps; of several steps in a row, the first."""
        before, was_in_spike = list(self._losses), self._in_spike
        self._losses.append(loss)
        if len(before) < self.settings.spike_window // 2:
            return []
        mean, deviation = float(np.mean(before)), float(np.std(before, ddof=1))
        self._in_spike = loss > mean + self.settings.spike * deviation
        if was_in_spike or not self._in_spike:
            return []
        said = f"the loss rose to {loss:.3f} from {mean:.3f}, the mean of the last {len(before)} steps"
        deviations = (loss - mean) / deviation if deviation else None
        return [Incident(step, "loss_spike", said, {"loss": loss, "mean": mean, "deviations": deviations})]

    def _dead(self, step: int, idle_LE: torch.Tensor) -> list[Incident]:
        """Experts that with this step have had no token for so long that they count as dead."""
        died = (idle_LE == self.settings.dead_steps).nonzero().tolist()
        if not died:
            return []
        dead_L = (idle_LE >= self.settings.dead_steps).sum(-1).tolist()
        layers = sorted({layer for layer, _ in died})
        where = ", ".join(f"{dead_L[layer]} of {idle_LE.shape[1]} in layer {layer}" for layer in layers)
        said = f"experts without a token for {self.settings.dead_steps} steps: {where}"
        details = {"experts": died, "dead_by_layer": dead_L, "last_fed": step - self.settings.dead_steps}
        return [Incident(step, "dead_experts", said, details)]
