"""All that a checkpoint holds of a run beside the model and the optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from moetrain.checkpoint.manager import Checkpoint
from moetrain.distributed.mesh import ParallelLayout
from moetrain.monitoring.state import MonitorState
from moetrain.training.balancing import Balancing
from moetrain.training.guards import Guards
from moetrain.training.train_metrics import TrainMetrics

Tensors = Mapping[str, torch.Tensor]


@dataclass
class RunState:
    """The state of training after a step.

    Attributes:
        step: updates done, skipped ones included.
        tokens_trained: tokens of these steps, marks included.
        train_metrics: sums since the last logged point.
    """

    balancing: Balancing
    guards: Guards
    train_metrics: TrainMetrics
    monitor: MonitorState
    step: int = 0
    tokens_trained: int = 0

    def tensors(self) -> dict[str, Tensors]:
        """Tensors per part; all ranks must call."""
        return {
            **self.monitor.tensors(),
            "balancing": self.balancing.state(),
            "interval": self.train_metrics.state(),
        }

    def record(self) -> dict[str, Any]:
        """The rest, as JSON."""
        return {
            **self.monitor.record(),
            "tokens_trained": self.tokens_trained,
            "guards": self.guards.state(),
        }

    def load(self, checkpoint: Checkpoint, layout: ParallelLayout, extended: bool = False) -> None:
        """Restore the state from a checkpoint that holds what `tensors` and `record` returned.

        Args:
            extended: it is of another run, which this one goes on from with more steps or other data.
        """
        tensors, record = checkpoint.states, checkpoint.record
        self.step = checkpoint.step
        self.tokens_trained = record["tokens_trained"]
        self.balancing.load_state(tensors["balancing"])
        self.train_metrics.load_state(tensors.get("interval", {}), layout.device)
        self.guards.load_state(record["guards"], layout.device)
        self.monitor.load_tensors(tensors, layout.is_main, extended)
        self.monitor.load_record(record, layout.is_main)
