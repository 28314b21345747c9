"""What the probes say about the metrics: accuracy of a domain's tasks against what the router and the losses say.

Rows are taken at the readings of the probes, each with the newest value that every predictor has by then. Correlations
begin where the accuracy has left chance (METRICS, section 7).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from moetrain.metrics import table
from moetrain.metrics.correlations import Table, as_summary, correlations
from moetrain.probes.history import ProbeHistory
from moetrain.probes.tasks import Task


class Relations:
    """Keeps, by domain, the predictors at each reading of the probes; T readings."""

    def __init__(self, domains: Sequence[str], history: ProbeHistory) -> None:
        self._history = history
        self._rows: dict[str, list[list[float]]] = {domain: [] for domain in domains}

    def add(self, domains: Mapping[str, Mapping[str, Any]]) -> None:
        """Take in the newest values by domain, in the form of ``summary.json``, at the newest reading of the probes."""
        for domain, rows in self._rows.items():
            metrics = domains[domain]["metrics"]
            values = (metrics.get(metric, {}).get("value") for metric in table.predictors().values())
            rows.append([math.nan if value is None else float(value) for value in values])

    def tasks(self, domain: str) -> list[Task]:
        """A domain's tasks that are answered right or wrong, but for those that ask for trained facts.

        Those say what is memorized.
        """
        return [
            task
            for task in self._history.tasks.values()
            if task.domain == domain and not task.trained and self._history.correct(task.name).size
        ]

    def accuracy(self, domain: str) -> tuple[np.ndarray, float, int]:
        """Accuracy over all items of a domain's `tasks` by reading [T], what chance gives, and the number of items."""
        tasks = self.tasks(domain)
        if not tasks:
            return np.zeros(0), math.nan, 0
        correct_IT = np.concatenate([self._history.correct(task.name) for task in tasks])
        chance = sum(task.chance * len(task.items) for task in tasks) / len(correct_IT)
        return correct_IT.mean(0), chance, len(correct_IT)

    def correlations(self, domain: str) -> dict[str, Table]:
        """All correlations with accuracy by predictor, from where accuracy exceeds chance; none before."""
        accuracy_T, chance, items = self.accuracy(domain)
        if not items:
            return {}
        rows_TP = np.array(self._rows[domain])
        columns = {name: rows_TP[:, number] for number, name in enumerate(table.predictors())}
        return correlations(accuracy_T, chance, items, np.array(self._history.times.tokens), columns)

    def as_dict(self, domain: str) -> dict[str, Any]:
        """A domain's table as ``summary.json`` holds it, or a note that says why there is none."""
        accuracy_T, chance, items = self.accuracy(domain)
        head = {"items": items, "chance": chance, "accuracy": [float(a) for a in accuracy_T]} if items else {}
        return head | as_summary(self.correlations(domain), items)

    def state(self) -> dict[str, torch.Tensor]:
        """All rows, for a checkpoint."""
        return {domain: torch.tensor(rows, dtype=torch.float64) for domain, rows in self._rows.items() if rows}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        for domain, rows in state.items():
            self._rows[domain] = rows.tolist()
