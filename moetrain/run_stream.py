"""The stream that a run trains on and its number of steps, both of which may change while it trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moetrain.config import Settings
from moetrain.data.prefetch import BatchReader
from moetrain.data.stream import Stream, run_steps
from moetrain.routing.panel_monitor import PanelMonitor


@dataclass
class RunStream:
    """A run's stream, the steps that the run takes of it, and what was left out of it so far.

    Attributes:
        reader: reads this rank's micro-batches of the stream.
        panel: follows the stream's changes; None where the run has no panel.
        stops: after how many steps the repeats of which domains, by number, were left out.
        planned: ``steps`` before any was left out.
    """

    settings: Settings
    stream: Stream
    reader: BatchReader
    steps: int
    panel: PanelMonitor | None = None
    stops: list[tuple[int, list[int]]] = field(default_factory=list)
    planned: int = field(init=False)

    def __post_init__(self) -> None:
        self.planned = self.steps

    @property
    def begin(self) -> int:
        """The step of the checkpoint that the run went on from with more steps or other data; 0 where it did not."""
        earlier = self.settings.data.earlier
        return earlier[-1].steps if earlier else 0

    def to_stop(self, names: Sequence[str]) -> list[int]:
        """The numbers of those of some domains whose repeats are still in the stream."""
        numbers = [list(self.settings.data.domains).index(name) for name in names]
        stopped = {number for _, earlier in self.stops for number in earlier}
        return [number for number in numbers if number not in stopped]

    def stop_repeats(self, step: int, numbers: Sequence[int]) -> None:
        """Leave the repeats of some domains out of the stream after ``step`` steps, which may end the run earlier."""
        self.reader.discard()
        self.stops.append((step, list(numbers)))
        self.stream.stop_repeats(numbers, step)
        self.steps = max(step, run_steps(self.stream, self.settings))
        if self.panel is not None:
            self.panel.steps = self.steps
            self.panel.panel.follow(self.stream, self.steps)

    def record(self) -> dict[str, Any]:
        """The changes of the stream, for a checkpoint, as JSON."""
        return {"stops": self.stops, "planned_steps": self.planned}

    def load_record(self, record: Mapping[str, Any]) -> None:
        """Repeat the changes of the stream that `record` returned, on a stream that has not changed yet."""
        for step, numbers in record.get("stops", []):
            if step <= self.begin:
                self.stops.append((step, numbers))  # the stream was built with it
            else:
                self.stop_repeats(step, numbers)
