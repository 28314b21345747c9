"""Correlation of probe accuracy with the router's metrics and the losses, per domain, over the readings of a run.

Each reading of the probes adds a row with the newest value of every predictor. Correlations begin at the reading at
which accuracy has left chance (METRICS, section 7).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from moetrain.metrics import table
from moetrain.metrics.correlations import Table, as_summary, correlations
from moetrain.metrics.latest import LatestMetrics
from moetrain.probes.history import ProbeHistory
from moetrain.probes.tasks import Task


class ProbeCorrelations:
    """The predictors of each domain at each reading of the probes; T readings."""

    def __init__(self, domains: Sequence[str], history: ProbeHistory) -> None:
        self._history = history
        self._rows: dict[str, list[list[float]]] = {domain: [] for domain in domains}

    @property
    def domains(self) -> list[str]:
        return list(self._rows)

    def add(self, latest: LatestMetrics) -> None:
        """Take the newest value of every predictor as those of the newest reading of the probes."""
        for domain, rows in self._rows.items():
            rows.append([latest.value(domain, metric) for metric in table.predictors().values()])

    def tasks(self, domain: str) -> list[Task]:
        """A domain's tasks that are answered right or wrong, without tasks of trained facts: those measure memory."""
        return [
            task
            for task in self._history.tasks.values()
            if task.domain == domain and not task.trained and self._history.correct(task.name).size
        ]

    def accuracy(self, domain: str) -> tuple[np.ndarray, float, int]:
        """Accuracy over all items of a domain's `tasks` per reading [T], accuracy by chance, number of items."""
        tasks = self.tasks(domain)
        if not tasks:
            return np.zeros(0), math.nan, 0
        correct_IT = np.concatenate([self._history.correct(task.name) for task in tasks])
        chance = sum(task.chance * len(task.items) for task in tasks) / len(correct_IT)
        return correct_IT.mean(0), chance, len(correct_IT)

    def correlations(self, domain: str) -> dict[str, Table]:
        """Per predictor, all correlations with accuracy from where it leaves chance; empty before it has."""
        accuracy_T, chance, items = self.accuracy(domain)
        if not items:
            return {}
        rows_TP = np.array(self._rows[domain])
        columns = {name: rows_TP[:, number] for number, name in enumerate(table.predictors())}
        return correlations(accuracy_T, chance, items, np.array(self._history.times.tokens), columns)

    def rank_correlations(self, domain: str) -> dict[str, float]:
        """Per predictor, Spearman's correlation of the raw series, where there is one."""
        found = {name: each["raw", "spearman"].value for name, each in self.correlations(domain).items()}
        return {name: value for name, value in found.items() if not math.isnan(value)}

    def as_dict(self, domain: str) -> dict[str, Any]:
        """A domain's table as ``summary.json`` holds it; without one, ``note`` says why."""
        accuracy_T, chance, items = self.accuracy(domain)
        head = {"items": items, "chance": chance, "accuracy": [float(a) for a in accuracy_T]} if items else {}
        return head | as_summary(self.correlations(domain), items)

    def state(self) -> dict[str, torch.Tensor]:
        """All rows, for a checkpoint."""
        return {domain: torch.tensor(rows, dtype=torch.float64) for domain, rows in self._rows.items() if rows}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore what `state` returned; predictors and domains that did not exist then have no values."""
        readings = max((len(rows) for rows in state.values()), default=0)
        for domain in self._rows:
            rows = state.get(domain, torch.zeros(readings, 0))
            added = [math.nan] * (len(table.predictors()) - rows.shape[1])
            self._rows[domain] = [row + added for row in rows.tolist()]

    def reorder(self, saved: Sequence[str]) -> None:
        """Give restored rows, saved with columns of these predictors, the columns of today; new ones are NaN."""
        if list(saved) == list(table.predictors()):
            return
        places = [saved.index(name) if name in saved else -1 for name in table.predictors()]
        for domain, rows in self._rows.items():
            self._rows[domain] = [[row[place] if place >= 0 else math.nan for place in places] for row in rows]
