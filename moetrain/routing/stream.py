"""Streaming metrics: from the routing of the newest samples that each domain trained on, without extra forward passes.

A domain's window is the last ``size`` of its samples, each over its first panel tokens. It is part of a checkpoint.
Each rank keeps a window of its own rows. The newest samples of all ranks, those that a single rank would hold, are
gathered on the main rank when a value or a checkpoint needs them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from moetrain import grokking
from moetrain.distributed.mesh import ParallelLayout
from moetrain.distributed.newest import among_newest
from moetrain.grokking import Estimate
from moetrain.metrics import table
from moetrain.metrics.cell import STREAM, Cell
from moetrain.routing.recorder import ComingRouting, SampleRouting

_MOST_COMING = 64  # micro-batches whose routing may still be copied to the host; with more, training waits
_ONE_RANK = ParallelLayout()


@dataclass(frozen=True)
class StreamReading:
    """The streaming metrics of one domain, by the names of the table."""

    domain: str
    metrics: dict[str, Estimate]


@dataclass(frozen=True)
class StreamPoints:
    """The streaming metrics of all domains at a step."""

    step: int
    readings: list[StreamReading]


@dataclass(frozen=True)
class StreamSnapshot:
    """Everything that the streaming metrics of a step are computed from. It does not change afterwards."""

    windows: dict[str, SampleRouting]  # the full ones, per domain
    router_rows: np.ndarray  # [L, E, D]
    tau: float

    def readings(self) -> list[StreamReading]:
        """The streaming metrics of each domain that has a full window."""
        blocks = grokking.gram_blocks(self.router_rows)
        return [
            StreamReading(domain, stream_metrics(window.weights, blocks, self.tau))
            for domain, window in self.windows.items()
        ]


class StreamMonitor:
    """Keeps each domain's window and computes the metrics from it.

    Args:
        domains: names by number.
        size: samples of a window.
        tau: share of the routing weight that a pathway covers.
        layout: the ranks that train together.
    """

    def __init__(self, domains: Sequence[str], size: int, tau: float, layout: ParallelLayout = _ONE_RANK) -> None:
        self.domains = list(domains)
        self.size = size
        self.tau = tau
        self._layout = layout
        self._windows: dict[int, SampleRouting] = {}
        self._coming: deque[ComingRouting] = deque()
        self.keeps = False  # whether added samples are kept for `kept`
        self._kept: list[SampleRouting] = []
        self.not_finite = 0  # samples dropped because their routing was NaN or infinite

    def add(self, records: SampleRouting | ComingRouting) -> None:
        """Add the routing of samples that a step trained on, in the stream's order; once it has reached the host."""
        if isinstance(records, SampleRouting):
            self.settle()
            self._take_in(records)
        else:
            self._coming.append(records)
            self.settle(_MOST_COMING)

    def settle(self, coming: int = 0) -> None:
        """Add what has reached the host; waits until at most ``coming`` micro-batches are still being copied."""
        while self._coming and (len(self._coming) > coming or self._coming[0].copy.arrived):
            self._take_in(self._coming.popleft().wait())

    def _take_in(self, records: SampleRouting) -> None:
        finite_S = np.isfinite(records.even_SLE).all((1, 2)) & np.isfinite(records.odd_SLE).all((1, 2))
        if not finite_S.all():
            self.not_finite += int((~finite_S).sum())
            records = records.take(finite_S)
        if self.keeps:
            self._kept.append(records)
        for domain in np.unique(records.domain).tolist():
            arrived = records.take(records.domain == domain)
            held = self._windows.get(domain)
            joined = arrived if held is None else SampleRouting.join([held, arrived])
            self._windows[domain] = _newest(joined, self.size)

    def kept(self) -> list[SampleRouting]:
        """The samples added since the last call; empty unless ``keeps`` is set."""
        kept, self._kept = self._kept, []
        return kept

    def windows(self) -> dict[int, SampleRouting]:
        """The newest samples of each domain over all ranks, by number of the domain; on the main rank alone.

        All ranks must call; the others get none.
        """
        self.settle()
        gathered: dict[int, list[SampleRouting]] = {}
        for windows in self._layout.gather_objects(self._newest_of_all_ranks()) or ():
            for domain, window in windows.items():
                gathered.setdefault(domain, []).append(window)
        return {d: _newest(SampleRouting.join(parts), self.size) for d, parts in sorted(gathered.items())}

    def _newest_of_all_ranks(self) -> dict[int, SampleRouting]:
        """This rank's samples among the newest of each domain over all ranks."""
        if self._layout.world_size == 1:
            return self._windows
        none = np.zeros(0, np.int64)
        order_N = np.concatenate([none, *(window.order for window in self._windows.values())])
        domain_N = np.concatenate([none, *(window.domain for window in self._windows.values())])
        newest_N = among_newest(order_N, domain_N, len(self.domains), self.size, self._layout)
        return {d: window.take(newest_N[domain_N == d]) for d, window in self._windows.items()}

    def snapshot(self, router_rows: np.ndarray) -> StreamSnapshot:
        """The full windows over all ranks, on the main rank; the others must call too, and get none.

        Args:
            router_rows: a copy of the routers' current weights, [L, E, D].
        """
        windows = {self.domains[d]: window for d, window in self.windows().items() if len(window) == self.size}
        return StreamSnapshot(windows, router_rows, self.tau)

    def measure(self, router_rows: np.ndarray) -> list[StreamReading]:
        """The streaming metrics of each domain with a full window, computed at once; see `snapshot`."""
        return self.snapshot(router_rows).readings()

    def state(self) -> dict[str, torch.Tensor]:
        """The windows of all ranks as tensors, for the main rank's checkpoint. All ranks must call."""
        return {
            f"{domain}.{field.name}": torch.from_numpy(np.ascontiguousarray(getattr(window, field.name)))
            for domain, window in self.windows().items()
            for field in fields(window)
        }

    def load_state(self, state: Mapping[str, torch.Tensor], main_process: bool) -> None:
        """Restore windows, on the main rank only, so that all ranks together hold each sample once."""
        domains = sorted({int(key.partition(".")[0]) for key in state}) if main_process else []
        self._windows = {
            domain: SampleRouting(**{f.name: state[f"{domain}.{f.name}"].numpy() for f in fields(SampleRouting)})
            for domain in domains
        }


def stream_points(step: int, snapshot: StreamSnapshot) -> StreamPoints:
    """The streaming metrics of a snapshot taken after a step."""
    return StreamPoints(step, snapshot.readings())


def stream_metrics(weights_SLE: np.ndarray, blocks: tuple[np.ndarray, np.ndarray], tau: float) -> dict[str, Estimate]:
    """The metrics on the stream, by name, of one domain's samples [S, L, E]; a value may be NaN."""
    cell = Cell(STREAM, weights_SLE, blocks, tau)
    found = {metric.name: metric.value(cell) for metric in table.on_cell(STREAM)}
    return {name: estimate for name, estimate in found.items() if estimate is not None}


def _newest(records: SampleRouting, size: int) -> SampleRouting:
    return records.take(np.argsort(records.order, kind="stable")[-size:])
