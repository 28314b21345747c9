"""Results of a finished run: ``summary.json`` and the table printed at the end."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moetrain.atomic_io import write_file

RESULT_COLUMNS = {
    "bits_per_byte": "bits/byte",
    "validation_loss": "held-out loss",
    "train_loss": "train loss",
    "stream/d_path": "D_path",
    "stream/cosine": "cosine",
}
"""Metrics of the table at the end of a run, with their titles."""


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
