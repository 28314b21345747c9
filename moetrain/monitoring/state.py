"""What the monitor knows of a run so far; part of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from moetrain.config import Settings
from moetrain.data.corpus import Corpus
from moetrain.data.stream import Stream
from moetrain.distributed.mesh import ParallelLayout
from moetrain.grokking import PhaseThresholds
from moetrain.metrics import table
from moetrain.metrics.latest import LatestMetrics
from moetrain.monitoring.exposures import ExposureLosses
from moetrain.monitoring.probe_correlations import ProbeCorrelations
from moetrain.monitoring.repeats import RepeatMonitor
from moetrain.probes.probe_monitor import ProbeMonitor
from moetrain.probes.tasks import Task
from moetrain.routing.panel import Panel, draw_panel
from moetrain.routing.panel_monitor import PanelMonitor
from moetrain.routing.stream import StreamMonitor

Tensors = Mapping[str, torch.Tensor]


@dataclass
class MonitorState:
    """The newest samples of the stream, all readings of panel and probes, and the newest value of each metric.

    Attributes:
        stream: one window of samples per domain; each rank holds the samples of its own rows.
        exposures: the losses of the newest samples by earlier exposures, likewise; None in a replay.
        panel: None without a router, with ``monitor.enabled=false``, or where no sample is long enough.
        probes: None without any task.
        repeats: None in a replay, without a panel, and where no domain is repeated.
        latest: kept up to date on the main rank alone.
    """

    stream: StreamMonitor
    exposures: ExposureLosses | None
    panel: PanelMonitor | None
    probes: ProbeMonitor | None
    correlations: ProbeCorrelations | None
    repeats: RepeatMonitor | None
    latest: LatestMetrics

    @classmethod
    def build(
        cls,
        settings: Settings,
        panel: PanelMonitor | None,
        probes: ProbeMonitor | None,
        layout: ParallelLayout,
        stream: Stream | None = None,
    ) -> MonitorState:
        """The state before the first reading; ``stream`` is what a run trains on, None in a replay."""
        domains, monitor = list(settings.data.domains), settings.monitor
        repeats = RepeatMonitor(panel.panel, stream, domains) if panel is not None and stream is not None else None
        return cls(
            stream=StreamMonitor(domains, monitor.window, monitor.tau, layout),
            exposures=ExposureLosses(stream, domains, monitor.exposure_window, layout) if stream is not None else None,
            panel=panel,
            probes=probes,
            correlations=ProbeCorrelations(domains, probes.history) if probes is not None else None,
            repeats=repeats if repeats is not None and repeats.repeated else None,
            latest=LatestMetrics(domains),
        )

    @property
    def tasks(self) -> list[Task]:
        """The tasks of the probes."""
        return self.probes.prepared.tasks if self.probes is not None else []

    def tensors(self) -> dict[str, Tensors]:
        """Tensors per part, for a checkpoint; all ranks must call."""
        return {
            "monitor": self.stream.state(),
            "exposures": self.exposures.state() if self.exposures is not None else {},
            "panel": self.panel.state() if self.panel is not None else {},
            "probes": self.probes.history.state() if self.probes is not None else {},
            "repeats": self.repeats.state() if self.repeats is not None else {},
            "relations": self.correlations.state() if self.correlations is not None else {},
        }

    def load_tensors(self, tensors: Mapping[str, Tensors], is_main: bool, extended: bool = False) -> None:
        """Restore what `tensors` returned.

        Args:
            extended: of a run that this one goes on from, maybe with more data, whose tasks may have other items: then
                the readings of the probes begin anew.
        """
        self.stream.load_state(tensors.get("monitor", {}), is_main)
        if self.exposures is not None:
            self.exposures.load_state(tensors.get("exposures", {}))
        if self.panel is not None:
            self.panel.load_state(tensors.get("panel", {}))
        if self.repeats is not None:
            self.repeats.load_state(tensors.get("repeats", {}))
        probes = tensors.get("probes", {})
        if extended and self.probes is not None and self.probes.history.changed_tasks(probes):
            return
        if self.probes is not None:
            self.probes.history.load_state(probes)
        if self.correlations is not None:
            self.correlations.load_state(tensors.get("relations", {}))

    def record(self) -> dict[str, Any]:
        """The rest, as JSON."""
        predictors = list(table.predictors())  # the columns of the correlations' rows
        return {**self.latest.record(), "not_finite": self.stream.not_finite, "predictors": predictors}

    def load_record(self, record: Mapping[str, Any], is_main: bool) -> None:
        """Restore what `record` returned."""
        self.latest.load_record(record)
        if self.correlations is not None and "predictors" in record:
            self.correlations.reorder(record["predictors"])
        self.stream.not_finite = record["not_finite"] if is_main else 0


def build_panel_monitor(
    corpus: Corpus, stream: Stream, settings: Settings, steps: int, rows: int
) -> PanelMonitor | None:
    """Draw the panel of a run of ``steps`` steps, read ``rows`` rows per pass; None where there is nothing to read."""
    if not settings.watches_routing:
        return None
    panel = draw_panel(corpus, stream, settings, steps, rows)
    if not len(panel):
        return None  # no sample has panel.tokens tokens; the data table says so
    return panel_monitor(panel, settings, steps)


def panel_monitor(panel: Panel, settings: Settings, steps: int) -> PanelMonitor:
    """What turns readings of this panel into metrics and phases."""
    eps = {name: domain.eps for name, domain in settings.data.domains.items()}
    thresholds = PhaseThresholds(**settings.phase.model_dump())
    domains, tau, chosen = list(settings.data.domains), settings.monitor.tau, settings.panel
    return PanelMonitor(panel, domains, tau, steps, eps, thresholds, chosen.delta, chosen.max_pairs)
