"""How much time readings of the panel and of the probes may take, and how many readings that leaves.

Targets: in runs of an hour or more the panel takes 1% and the probes 5% of the time; in shorter ones 5% each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moetrain.grokking.wording import decimals, exact_percent, percent


@dataclass(frozen=True)
class Readings:
    """How often the panel and the probes are read in a run, step 0 and the last step included."""

    panel: int
    probes: int


LEAST, MOST = 10, 100  # fewer readings are too few for a curve, more are more than anyone looks at
_LONG = 3600.0  # seconds of training that make a long run


@dataclass(frozen=True)
class Cost:
    """What one reading takes, and what all steps of the run take, in seconds."""

    what: Literal["panel", "probes"]
    reading: float
    training: float

    @property
    def target(self) -> float:
        """Share of the run's time that all readings together should stay within."""
        if self.training < _LONG:
            return 0.05
        return 0.01 if self.what == "panel" else 0.05

    @property
    def affordable(self) -> int:
        """The largest useful number of readings within the target."""
        seconds = self.training * self.target / (1 - self.target)
        return min(MOST, int(seconds / self.reading)) if self.reading else MOST

    def share(self, readings: int) -> float:
        """Share of the run's time that this many readings take."""
        total = self.reading * readings
        return total / (self.training + total)

    def line(self, readings: int) -> str:
        """The cost of this many readings in words, with a remedy where it exceeds the target."""
        share = self.share(readings)
        shown = percent(share, decimals(100 * share, 100 * self.target, least=1))
        text = f"{self.what}: {readings} readings of {self.reading:.1f} s, about {shown} of the run's time"
        if share <= self.target:
            return text
        fewer = self.affordable
        size = {"panel": "panel.samples", "probes": "probes.items"}[self.what]
        remedy = f"set {self.what}.readings={fewer}" if fewer >= LEAST else f"lower {size}, or train for longer"
        return f"{text}; the target is {exact_percent(self.target)}: {remedy}"
