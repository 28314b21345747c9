"""Correlation of probe accuracy with the router's metrics and the losses, per domain.

Each reading of the probes adds a row with the newest value of every predictor. Correlations begin at the reading at
which accuracy has left chance (METRICS, section 7).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from moetrain import grokking
from moetrain.grokking import Correlation
from moetrain.loggers.summary import PREDICTORS
from moetrain.metrics.latest import LatestMetrics
from moetrain.probes.history import ProbeHistory
from moetrain.probes.tasks import Task

Table = dict[tuple[grokking.correlation.Series, grokking.correlation.Method], Correlation]
"""Correlations of one predictor, per series (raw, differences, residuals) and method."""

NOT_ABOVE_CHANCE = "accuracy did not exceed chance by two standard errors in three readings in a row"
NO_TASK = "no task of this domain that is answered right or wrong"


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
            rows.append([latest.value(domain, metric) for metric in PREDICTORS.values()])

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
        tokens_T = np.array(self._history.times.tokens)
        rows_TP = np.array(self._rows[domain])
        columns = {predictor: rows_TP[:, number] for number, predictor in enumerate(PREDICTORS)}
        return correlate_from_chance(columns, accuracy_T, tokens_T, chance, items)

    def rank_correlations(self, domain: str) -> dict[str, float]:
        """Per predictor, Spearman's correlation of the raw series, where there is one."""
        found = {name: table["raw", "spearman"].value for name, table in self.correlations(domain).items()}
        return {name: value for name, value in found.items() if not math.isnan(value)}

    def as_dict(self, domain: str) -> dict[str, Any]:
        """A domain's table as ``summary.json`` holds it; without one, ``note`` says why."""
        accuracy_T, chance, items = self.accuracy(domain)
        if not items:
            return {"note": NO_TASK}
        found = self.correlations(domain)
        head = {"items": items, "chance": chance, "accuracy": [float(a) for a in accuracy_T]}
        return head | ({"predictors": as_json(found)} if found else {"note": NOT_ABOVE_CHANCE})

    def state(self) -> dict[str, torch.Tensor]:
        """All rows, for a checkpoint."""
        return {domain: torch.tensor(rows, dtype=torch.float64) for domain, rows in self._rows.items() if rows}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        for domain, rows in state.items():
            self._rows[domain] = rows.tolist()


def correlate_from_chance(
    predictors: Mapping[str, np.ndarray], accuracy_T: np.ndarray, tokens_T: np.ndarray, chance: float, items: int
) -> dict[str, Table]:
    """Per predictor [T], all correlations with accuracy from the reading at which it leaves chance; empty before.

    Args:
        tokens_T: trained on at each reading; a reading before the first step is left out.
        chance, items: accuracy by chance, and the number of items that accuracy is a mean over.
    """
    first = grokking.first_above_chance(accuracy_T, chance, items)
    if first is None:
        return {}
    first = max(first, int(np.argmax(tokens_T > 0)))
    return {
        name: grokking.correlate(values_T[first:], accuracy_T[first:], tokens_T[first:])
        for name, values_T in predictors.items()
    }


def as_json(tables: Mapping[str, Table]) -> dict[str, dict[str, dict[str, Any]]]:
    """Correlations per predictor and kind (such as ``raw spearman``), numbers that are not finite as null."""
    return {
        predictor: {f"{series} {method}": _one_as_json(each) for (series, method), each in table.items()}
        for predictor, table in tables.items()
    }


def _one_as_json(correlation: Correlation) -> dict[str, Any]:
    numbers = {name: getattr(correlation, name) for name in ("value", "low", "high", "p")}
    finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
    return finite | {"n": correlation.n, "note": correlation.note}
