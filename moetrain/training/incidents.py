"""Problems that a run survived: noted on the rank that met them, reported by the main rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from moetrain.distributed.mesh import ParallelLayout


@dataclass(frozen=True)
class Incident:
    """A problem at a step that training survived: one line for people, and details as JSON can hold them."""

    step: int
    kind: Literal["not_finite", "loss_spike", "dead_experts", "storage"]
    problem: str
    details: dict[str, Any] = field(default_factory=dict)


class IncidentLog:
    """Incidents of this rank that have not been reported yet."""

    def __init__(self) -> None:
        self._pending: list[Incident] = []

    def add(self, incident: Incident) -> None:
        self._pending.append(incident)

    def gather(self, layout: ParallelLayout) -> None:
        """Move the other ranks' incidents to the main rank; all ranks must call."""
        gathered = layout.all_gather_objects(self._pending)
        self._pending = []
        if layout.is_main:
            for rank, incidents in enumerate(gathered):
                prefix = f"rank {rank}: " if rank else ""
                self._pending += [replace(each, problem=prefix + each.problem) for each in incidents]

    def report(self, write: Callable[[Incident], None]) -> None:
        """Hand each pending incident to ``write``, in the order in which they were added."""
        for incident in self._pending:
            write(incident)
        self._pending.clear()
