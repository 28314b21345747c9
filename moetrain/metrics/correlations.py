"""Correlation of probe accuracy with each predictor, from the reading at which accuracy exceeds chance on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from moetrain import grokking
from moetrain.grokking import Correlation
from moetrain.grokking.correlation import Method, Series

Table = dict[tuple[Series, Method], Correlation]

NO_TASKS = "no task of this domain that is answered right or wrong"
NOT_ABOVE_CHANCE = "accuracy did not exceed chance by two standard errors in three readings in a row"


def correlations(
    accuracy_T: np.ndarray, chance: float, items: int, tokens_T: np.ndarray, predictors: Mapping[str, np.ndarray]
) -> dict[str, Table]:
    """All correlations with accuracy, by predictor; empty until accuracy has exceeded chance.

    Args:
        accuracy_T: accuracy over a domain's probe items at each reading.
        chance: accuracy of guessing.
        items: number of items.
        tokens_T: tokens trained on; the reading before step 1 has none and does not count.
        predictors: values at each reading [T], by name.
    """
    first = grokking.first_above_chance(accuracy_T, chance, items) if items else None
    if first is None:
        return {}
    first = max(first, int(np.argmax(tokens_T > 0)))
    return {
        name: grokking.correlate(values_T[first:], accuracy_T[first:], tokens_T[first:])
        for name, values_T in predictors.items()
    }


def as_summary(found: Mapping[str, Table], items: int) -> dict[str, Any]:
    """The correlations of a domain as ``summary.json`` holds them, or a note that says why there are none."""
    if not items:
        return {"note": NO_TASKS}
    if not found:
        return {"note": NOT_ABOVE_CHANCE}
    return {
        "predictors": {
            name: {f"{series} {method}": _as_json(each) for (series, method), each in table.items()}
            for name, table in found.items()
        }
    }


def _as_json(correlation: Correlation) -> dict[str, Any]:
    numbers = {name: getattr(correlation, name) for name in ("value", "low", "high", "p")}
    shown = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
    return shown | {"n": correlation.n, "note": correlation.note}
