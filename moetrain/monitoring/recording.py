"""The routing of the samples of each step, into the stream's windows and, where asked for, onto disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moetrain.config import Settings
from moetrain.data.batch import Batch
from moetrain.data.stream import Stream
from moetrain.distributed.mesh import ParallelLayout
from moetrain.models.transformer import Output
from moetrain.monitoring.state import MonitorState
from moetrain.routing.recorder import start_record
from moetrain.routing.sample_store import SampleStore
from moetrain.training.incidents import Incident, IncidentLog


class StreamRecorder:
    """Takes the routing of this rank's micro-batches off the device without waiting for it.

    Args:
        stream: the training stream.
        state: where the newest samples are kept.
        incidents: where samples left out and failed writes are noted.
    """

    def __init__(
        self,
        settings: Settings,
        stream: Stream,
        state: MonitorState,
        layout: ParallelLayout,
        incidents: IncidentLog,
    ) -> None:
        self._settings, self._stream, self._incidents = settings, stream, incidents
        self._windows, self._exposures = state.stream, state.exposures
        self._layout = layout
        self._store: SampleStore | None = None

    def open_store(self, folder: Path) -> None:
        """From now on write the routing of every training sample, with ``monitor.store_top``."""
        settings = self._settings
        if not (settings.watches_routing and settings.monitor.store_top):
            return
        top = min(settings.monitor.store_top, settings.model.recorded_experts)
        slots_per_step = settings.train.batch_rows * self._stream.most_samples
        domains = list(settings.data.domains)
        self._store = SampleStore(folder, self._layout.rank, top, self._stream.samples, domains, slots_per_step)
        self._windows.keeps = True

    def record(self, step: int, outputs: Sequence[tuple[Batch, Output]]) -> None:
        """Record this rank's micro-batches of a step (1 the first)."""
        before = self._windows.not_finite
        rows, slots = self._settings.train.batch_rows, self._stream.most_samples
        row = (step - 1) * rows + self._layout.row_range(rows)[0]
        for batch, output in outputs:
            if self._exposures is not None:
                self._exposures.add(batch, output, first_order=row * slots)
            if output.routing is not None:
                self._windows.add(start_record(output.routing, batch, first_order=row * slots))
            row += len(batch.samples_BS)
        self.write(step)
        if dropped := self._windows.not_finite - before:
            problem = f"the routing of {dropped} samples was not finite: they are left out of the streaming metrics"
            self._incidents.add(Incident(step, "not_finite", problem))

    def write(self, step: int, flush: bool = False) -> None:
        """Write samples to disk once a file is full; with ``flush``, down to the last sample."""
        if self._store is None:
            return
        if flush:
            self._windows.settle()
        for records in self._windows.kept():
            self._store.add(records)
        try:
            self._store.write(flush)
        except OSError as error:
            problem = f"routing of training samples was not stored ({error}): it is tried again"
            self._incidents.add(Incident(step, "storage", problem))
