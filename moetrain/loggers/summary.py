"""Results of a finished run: ``summary.json`` and the table printed at the end."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moetrain.atomic_io import write_file
from moetrain.grokking import Estimate


def as_metric(value: Estimate | float, n: int | None = None) -> dict[str, float | int | None]:
    """A metric as ``summary.json`` holds it: value, 95% interval and number of samples; null where unknown."""
    fields: dict[str, float | int | None]
    if isinstance(value, Estimate):
        fields = {"value": value.mean, "low": value.low, "high": value.high, "n": value.samples}
    else:
        fields = {"value": value, "low": None, "high": None, "n": n}
    return {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in fields.items()}


def write_summary(run: Path, summary: Mapping[str, Any]) -> None:
    """Write ``summary.json`` atomically: its presence says that the run is finished."""
    write_file(run / "summary.json", json.dumps(summary, indent=1, allow_nan=False))


def summary_rows(domains: Mapping[str, Mapping[str, Any]], columns: Mapping[str, str]) -> list[list[str]]:
    """Rows of the final table: per domain the metrics of ``columns``, with their intervals where they have one."""
    return [[name, *(_shown(domain["metrics"].get(metric)) for metric in columns)] for name, domain in domains.items()]


def _shown(metric: Mapping[str, Any] | None) -> str:
    if metric is None or metric["value"] is None:
        return "-"
    value = f"{metric['value']:.3f}"
    return value if metric["low"] is None else f"{value} ±{(metric['high'] - metric['low']) / 2:.3f}"
