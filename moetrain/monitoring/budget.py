"""What readings of the panel and of the probes may cost, and how many of them that leaves.

The aims: of runs of an hour or more the panel takes 1% and the probes 5%; of shorter ones 15% each.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from moetrain.atomic_io import write_file
from moetrain.config import Settings
from moetrain.distributed.sharding import unsharded_copy
from moetrain.monitoring.build import Run
from moetrain.monitoring.watch import ask, stored_blocks
from moetrain.routing.panel import read_panel
from moetrain.routing.panel_metrics import panel_metrics
from moetrain.routing.store import to_stored
from moetrain.training.step import forward_backward

LEAST, MOST = 10, 100  # fewer readings are too few for a curve, more are more than anyone looks at
_LONG = 3600.0  # seconds of training from which on a run is long


@dataclass(frozen=True)
class Cost:
    """What a reading of ``panel`` or ``probes`` takes in a run, seconds."""

    what: str
    reading: float
    training: float  # all steps of the run

    @property
    def aim(self) -> float:
        """Share of the run's time that all readings together should keep within."""
        if self.training < _LONG:
            return 0.15
        return 0.01 if self.what == "panel" else 0.05

    @property
    def affordable(self) -> int:
        """Readings that keep within the aim, as many as make sense."""
        seconds = self.training * self.aim / (1 - self.aim)
        return min(MOST, int(seconds / self.reading)) if self.reading else MOST

    def share(self, readings: int) -> float:
        """Share of the run's time that so many readings take."""
        total = self.reading * readings
        return total / (self.training + total)

    def line(self, readings: int) -> str:
        """What the readings will cost, and what to set where that is more than it should be."""
        share = self.share(readings)
        text = f"{self.what}: {readings} readings of {self.reading:.1f} s, about {share:.1%} of the run's time"
        if share <= self.aim:
            return text
        fewer = self.affordable
        remedy = f"{self.what}.readings={fewer}" if fewer >= LEAST else f"a smaller {self.what}, or a longer run"
        return f"{text}; {self.aim:.0%} is the aim: set {remedy}"


def measure_costs(run: Run, step: float | None = None) -> list[Cost]:
    """What a reading of the panel, and of the probes, costs beside the run's steps; training is left as it was.

    Args:
        step: seconds of a step, where they are known; else they are measured, without an update.
    """
    training = run.steps * (_step_seconds(run) if step is None else step)
    costs = []
    if run.panel is not None:
        with run.clock.measure("panel trial"):
            with unsharded_copy(run.model) as model:
                reading = read_panel(model, run.panel.panel, 0, run.layout)
            stored = to_stored(run.panel.panel, reading, run.panel.domains, stored_blocks(run))
            panel_metrics(stored, run.panel.domains, run.panel.tau, run.steps)
        costs.append(Cost("panel", run.clock.taken("panel trial"), training))
    if run.probes is not None:
        with run.clock.measure("probes trial"):
            ask(run, run.probes)
        costs.append(Cost("probes", run.clock.taken("probes trial"), training))
    return costs


def _step_seconds(run: Run) -> float:
    """Seconds of a forward and backward pass over a step's rows, measured twice: the first warms up."""
    for _ in range(2):
        run.clock.taken("step trial")
        with run.clock.measure("step trial"):
            forward_backward(
                run.layout, run.model, run.stream, 0, run.balancing, run.settings, lambda batch, output: None
            )
        run.optimizer.zero_grad(set_to_none=True)
    return run.clock.taken("step trial")


def keep_within_budget(run: Run, folder: Path, continued: bool) -> None:
    """With ``monitor.budget: auto``, set the numbers of readings: measured, or as the run that goes on has them.

    The numbers stand in the run's config.yaml from then on, so that it goes on with them.
    """
    if run.settings.monitor.budget != "auto":
        return
    place = folder / "config.yaml"
    if continued:
        theirs = yaml.safe_load(place.read_text(encoding="utf-8"))
        chosen = {what: theirs[what]["readings"] for what in ("panel", "probes")}
    else:
        costs = run.layout.all_gather_objects(measure_costs(run))[0]
        chosen = {cost.what: max(LEAST, cost.affordable) for cost in costs}
        for cost in costs:
            run.terminal.note(f"monitor.budget: {cost.line(chosen[cost.what])}")
    run.settings = with_readings(run.settings, chosen)
    if not continued and run.layout.is_main:
        write_file(place, run.settings.to_yaml())


def with_readings(settings: Settings, readings: dict[str, int]) -> Settings:
    """The settings with other numbers of readings, by section."""
    sections = {what: getattr(settings, what).model_copy(update={"readings": n}) for what, n in readings.items()}
    return settings.model_copy(update=sections)
