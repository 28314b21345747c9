"""What a step may run into and training survives: numbers that are not finite, loss spikes, experts that die.

Shapes: L layers, E experts.
"""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from moetrain.config import GuardSettings


class TrainingDivergedError(RuntimeError):
    """So many updates in a row were skipped that training cannot go on."""


@dataclass(frozen=True)
class Incident:
    """Something that went wrong and was survived: a line for people, and details that JSON can hold."""

    problem: str
    kind: Literal["not_finite", "loss_spike", "dead_experts", "storage"]
    details: dict[str, Any] = field(default_factory=dict)


class Guards:
    """Watches each step's loss, gradient and load of experts.

    What it has seen is part of a checkpoint, so that a resumed run tells the same.
    """

    def __init__(self, settings: GuardSettings) -> None:
        self.settings = settings
        self.skipped = 0  # updates of the whole run
        self.skipped_in_a_row = 0
        self._losses: deque[float] = deque(maxlen=settings.spike_window)
        self._in_spike = False
        self._idle_LE: torch.Tensor | None = None  # int64, steps since each expert got a token

    def check(self, step: int, finite: bool, loss: float, load_LE: torch.Tensor) -> list[Incident]:
        """What a step ran into.

        Args:
            finite: whether its loss and gradient were; if not, its update was skipped.
            loss: mean over its tokens, nats.
            load_LE: tokens sent to each expert.
        """
        if not finite:
            self.skipped += 1
            self.skipped_in_a_row += 1
            return [Incident("the loss or the gradient was not finite; the update was skipped", "not_finite")]
        self.skipped_in_a_row = 0
        return [*self._spike(loss), *self._dead(step, load_LE)]

    @property
    def diverged(self) -> bool:
        """Whether so many updates in a row were skipped that training cannot go on."""
        return self.skipped_in_a_row >= self.settings.skipped

    def state(self) -> dict[str, Any]:
        """For a checkpoint's record."""
        idle = None if self._idle_LE is None else self._idle_LE.tolist()
        in_a_row = {"skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row}
        return in_a_row | {"losses": list(self._losses), "in_spike": self._in_spike, "idle": idle}

    def load_state(self, state: dict[str, Any], device: torch.device) -> None:
        self.skipped, self.skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]
        self._losses.extend(state["losses"])
        self._in_spike = state["in_spike"]
        self._idle_LE = None if state["idle"] is None else torch.tensor(state["idle"], device=device)

    def _spike(self, loss: float) -> list[Incident]:
        """A loss far above those of the last steps; of several steps in a row, the first."""
        before, was_in_spike = list(self._losses), self._in_spike
        self._losses.append(loss)
        if len(before) < self.settings.spike_window // 2:
            return []
        mean, deviation = statistics.fmean(before), statistics.stdev(before)
        self._in_spike = loss > mean + self.settings.spike * deviation
        if was_in_spike or not self._in_spike:
            return []
        above = (loss - mean) / deviation if deviation else float("inf")
        said = f"the loss rose to {loss:.3f} from {mean:.3f}, the mean of the last {len(before)} steps"
        details = {"loss": loss, "mean": mean, "deviations": above if deviation else None}
        return [Incident(said, "loss_spike", details)]

    def _dead(self, step: int, load_LE: torch.Tensor) -> list[Incident]:
        """Experts that with this step have had no token for so long that they count as dead."""
        if not load_LE.numel():
            return []
        idle_LE = torch.zeros_like(load_LE, dtype=torch.int64) if self._idle_LE is None else self._idle_LE
        self._idle_LE = torch.where(load_LE > 0, 0, idle_LE + 1)
        died = (self._idle_LE == self.settings.dead_steps).nonzero().tolist()
        if not died:
            return []
        dead_L = (self._idle_LE >= self.settings.dead_steps).sum(-1).tolist()
        layers = sorted({layer for layer, _ in died})
        where = ", ".join(f"{dead_L[layer]} of {load_LE.shape[1]} in layer {layer}" for layer in layers)
        said = f"experts without a token for {self.settings.dead_steps} steps: {where}"
        details = {"experts": died, "dead_by_layer": dead_L, "last_fed": step - self.settings.dead_steps}
        return [Incident(said, "dead_experts", details)]
