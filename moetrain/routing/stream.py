"""Streaming metrics: the routing of the newest samples each domain trained on, with no forward pass of its own.

A domain's window is the last ``size`` of its samples, each over its first panel tokens (METRICS, section 2). It is part
of a checkpoint. With several processes each keeps a window of the rows it read; the newest of all of them together are
the same samples that one process would hold.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from moetrain import grokking
from moetrain.grokking import Estimate
from moetrain.routing.recorder import ComingRouting, SampleRouting

_MOST_COMING = 64  # micro-batches whose routing may be on its way; with more, the training waits

Gather = Callable[[Any], list[Any]]
"""Each process's value on each process; one process: ``lambda value: [value]``."""


@dataclass(frozen=True)
class StreamReading:
    """The streaming metrics of one domain, by name; each with interval and number of samples."""

    domain: str
    metrics: dict[str, Estimate]


@dataclass(frozen=True)
class StreamPoints:
    """The streaming metrics of all domains at a step."""

    step: int
    readings: list[StreamReading]


@dataclass(frozen=True)
class StreamSnapshot:
    """All that the streaming metrics of a moment are made of; it does not change any more."""

    windows: dict[str, SampleRouting]  # by domain, those that are full
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
    """Keeps each domain's window and reads the metrics off it."""

    def __init__(self, domains: Sequence[str], size: int, tau: float, gather: Gather = lambda value: [value]) -> None:
        self.domains = list(domains)
        self.size = size
        self.tau = tau
        self._gather = gather
        self._windows: dict[int, SampleRouting] = {}
        self._coming: deque[ComingRouting] = deque()
        self.keeps = False  # whether what is taken in is kept until it is asked for
        self._kept: list[SampleRouting] = []
        self.not_finite = 0  # samples left out because their routing was NaN or infinite

    def add(self, records: SampleRouting | ComingRouting) -> None:
        """Take in the routing of samples that a step trained on, in the stream's order; what is still coming, later."""
        if isinstance(records, SampleRouting):
            self.settle()
            self._take_in(records)
        else:
            self._coming.append(records)
            self.settle(_MOST_COMING)

    def settle(self, coming: int = 0) -> None:
        """Take in what has arrived, and wait until at most ``coming`` micro-batches are on their way."""
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
        """What was taken in since this was last asked, with ``keeps``."""
        kept, self._kept = self._kept, []
        return kept

    def windows(self) -> dict[int, SampleRouting]:
        """The newest samples of each domain over all processes, by number of the domain."""
        self.settle()
        gathered: dict[int, list[SampleRouting]] = {}
        for windows in self._gather(self._windows):
            for domain, window in windows.items():
                gathered.setdefault(domain, []).append(window)
        return {d: _newest(SampleRouting.join(parts), self.size) for d, parts in sorted(gathered.items())}

    def snapshot(self, router_rows: np.ndarray) -> StreamSnapshot:
        """What the metrics are made of now, over all processes: every process has to call it.

        Args:
            router_rows: a copy of the routers' weights now, [L, E, D].
        """
        windows = {self.domains[d]: window for d, window in self.windows().items() if len(window) == self.size}
        return StreamSnapshot(windows, router_rows, self.tau)

    def measure(self, router_rows: np.ndarray) -> list[StreamReading]:
        """The streaming metrics of each domain that has a full window, computed on the spot; see `snapshot`."""
        return self.snapshot(router_rows).readings()

    def state(self) -> dict[str, torch.Tensor]:
        """The windows of all processes as tensors, for a checkpoint; every process has to call it."""
        return {
            f"{domain}.{field.name}": torch.from_numpy(np.ascontiguousarray(getattr(window, field.name)))
            for domain, window in self.windows().items()
            for field in fields(window)
        }

    def load_state(self, state: Mapping[str, torch.Tensor], main_process: bool) -> None:
        """Put windows back: on the main process alone, so that together the processes hold each sample once."""
        domains = sorted({int(key.partition(".")[0]) for key in state}) if main_process else []
        self._windows = {
            domain: SampleRouting(*(state[f"{domain}.{field.name}"].numpy() for field in fields(SampleRouting)))
            for domain in domains
        }


def stream_points(step: int, snapshot: StreamSnapshot) -> StreamPoints:
    """What a snapshot comes to, with its step."""
    return StreamPoints(step, snapshot.readings())


def stream_metrics(weights_SLE: np.ndarray, blocks: tuple[np.ndarray, np.ndarray], tau: float) -> dict[str, Estimate]:
    """D_path in edits and normalised, cosine, inconsistency and spread of one domain's samples [S, L, E]."""
    edits, share = grokking.d_path_both(weights_SLE, tau)
    consistency = grokking.group_consistency(weights_SLE, blocks)
    erratic = consistency.inconsistency
    return {
        "d_path": edits,
        "d_path_norm": share,
        "cosine": consistency.cosine,
        "inconsistency": Estimate(erratic.median, erratic.low, erratic.high, erratic.samples, 0),
        "spread": Estimate(grokking.spread(weights_SLE), math.nan, math.nan, len(weights_SLE), 0),
    }


def _newest(records: SampleRouting, size: int) -> SampleRouting:
    return records.take(np.argsort(records.order, kind="stable")[-size:])
