"""Problems that a training step may meet and survive: values that are not finite, loss spikes, experts that die.

Shapes: L layers, E experts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from moetrain.config import GuardSettings
from moetrain.data.batch import Batch
from moetrain.device_transfer import HostCopy
from moetrain.grokking.wording import decimals
from moetrain.models.transformer import Output
from moetrain.training.incidents import Incident

MicroBatches = Sequence[tuple[Batch, Output]]
"""A step's micro-batches on this rank, each with the model's output."""
Findings = list[tuple[Incident, MicroBatches]]


class Guards:
    """Checks each step's loss, gradient and expert load.

    On a GPU the result of a step is read while the next one runs, so that the host does not synchronize. The state is
    part of a checkpoint: a resumed run reports the same incidents.
    """

    def __init__(self, settings: GuardSettings) -> None:
        self.settings = settings
        self.skipped = 0  # updates of the whole run
        self.skipped_in_a_row = 0
        self.last_skipped = 0  # step
        self._losses: deque[float] = deque(maxlen=settings.spike_window)
        self._in_spike = False
        self._idle_LE: torch.Tensor | None = None  # int64 on the device, steps since each expert received a token
        self._pending: deque[tuple[int, HostCopy, MicroBatches]] = deque()

    def check(
        self, step: int, applied: torch.Tensor, loss: torch.Tensor, load_LE: torch.Tensor, outputs: MicroBatches
    ) -> Findings:
        """Check a step; returns the incidents of the steps whose results have arrived.

        Args:
            applied: whether the update was applied; it is skipped where the loss or the gradient is not finite.
            loss: mean per predicted token, nats.
            load_LE: tokens sent to each expert.
        """
        idle_LE = torch.zeros_like(load_LE, dtype=torch.int64) if self._idle_LE is None else self._idle_LE
        self._idle_LE = torch.where(applied, torch.where(load_LE > 0, 0, idle_LE + 1), idle_LE)
        self._pending.append((step, HostCopy([applied, loss, self._idle_LE]), outputs))
        return self._evaluate(keep_pending=0 if applied.device.type == "cpu" else 1)

    def settle(self) -> Findings:
        """Wait for the results of all steps, as before a checkpoint; returns as `check`."""
        return self._evaluate(keep_pending=0)

    @property
    def diverged(self) -> bool:
        """Whether so many updates in a row were skipped that training cannot go on."""
        return self.skipped_in_a_row >= self.settings.skipped

    def state(self) -> dict[str, Any]:
        """For a checkpoint's record; call `settle` first."""
        assert not self._pending
        idle = None if self._idle_LE is None else self._idle_LE.tolist()
        skipped = {"skipped": self.skipped, "in_a_row": self.skipped_in_a_row, "last": self.last_skipped}
        return skipped | {"losses": list(self._losses), "in_spike": self._in_spike, "idle": idle}

    def load_state(self, state: dict[str, Any], device: torch.device) -> None:
        """Restore what `state` returned."""
        self.skipped, self.skipped_in_a_row, self.last_skipped = (state[k] for k in ("skipped", "in_a_row", "last"))
        self._losses.extend(state["losses"])
        self._in_spike = state["in_spike"]
        # A dense model's has no layers, and as a list no number of experts either.
        self._idle_LE = torch.tensor(state["idle"], device=device) if state["idle"] else None

    def _evaluate(self, keep_pending: int) -> Findings:
        findings: Findings = []
        while len(self._pending) > keep_pending:
            step, copy, outputs = self._pending.popleft()
            applied, loss, idle_LE = copy.wait()
            if applied:
                self.skipped_in_a_row = 0
                incidents = [*self._spike(step, float(loss)), *self._dead_experts(step, idle_LE)]
            else:
                self.skipped += 1
                self.skipped_in_a_row += 1
                self.last_skipped = step
                problem = "the loss or the gradient was not finite; the update was skipped"
                incidents = [Incident(step, "not_finite", problem)]
            findings += [(incident, outputs) for incident in incidents]
        return findings

    def _spike(self, step: int, loss: float) -> list[Incident]:
        """A loss far above those of the last steps; of several such steps in a row, the first."""
        before, was_in_spike = list(self._losses), self._in_spike
        self._losses.append(loss)
        if len(before) < self.settings.spike_window // 2:
            return []
        mean, deviation = float(np.mean(before)), float(np.std(before, ddof=1))
        self._in_spike = loss > mean + self.settings.spike * deviation
        if was_in_spike or not self._in_spike:
            return []
        places = decimals(loss, mean, least=3)
        problem = f"the loss rose to {loss:.{places}f} from {mean:.{places}f}, the mean of the last {len(before)} steps"
        deviations = (loss - mean) / deviation if deviation else None
        return [Incident(step, "loss_spike", problem, {"loss": loss, "mean": mean, "deviations": deviations})]

    def _dead_experts(self, step: int, idle_LE: torch.Tensor) -> list[Incident]:
        """Experts that have received no token for exactly ``guard.dead_steps`` steps."""
        newly_dead = (idle_LE == self.settings.dead_steps).nonzero().tolist()
        if not newly_dead:
            return []
        dead_L = (idle_LE >= self.settings.dead_steps).sum(-1).tolist()
        layers = sorted({layer for layer, _ in newly_dead})
        where = ", ".join(f"{dead_L[layer]} of {idle_LE.shape[1]} in layer {layer}" for layer in layers)
        problem = f"experts without a token for {self.settings.dead_steps} steps: {where}"
        details = {"experts": newly_dead, "dead_by_layer": dead_L, "last_fed": step - self.settings.dead_steps}
        return [Incident(step, "dead_experts", problem, details)]
