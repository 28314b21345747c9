"""What a finished run came to: ``summary.json`` and the table printed at the end."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moetrain.atomic_io import write_file

PREDICTORS = {
    "d_path": "pathway/d_path",
    "consistency": "pathway/consistency",
    "cosine": "pathway/cosine",
    "sharing": "pathway/sharing",
    "spread": "pathway/spread",
    "layer_cka": "pathway/layer_cka",
    "d_eff": "kernel/d_eff",
    "left_out": "kernel/left_out",
    "effective_rank": "kernel/effective_rank",
    "train_loss": "train_loss",
    "train_loss_average": "train_loss_average",
    "validation_loss": "validation_loss",
}
"""What the accuracy of probes is correlated with, and the metric of ``summary.json`` that it is the newest value of."""


def write_summary(run: Path, summary: Mapping[str, Any]) -> None:
    """Write ``summary.json`` whole or not at all: its presence says that the run is finished."""
    write_file(run / "summary.json", json.dumps(summary, indent=1, allow_nan=False))


RESULT_COLUMNS = {
    "bits_per_byte": "bits/byte",
    "validation_loss": "held-out loss",
    "train_loss": "train loss",
    "stream/d_path": "D_path",
    "stream/cosine": "cosine",
}
"""Metrics of the table at the end of a run, and their titles."""


def summary_rows(domains: Mapping[str, Mapping[str, Any]], columns: Mapping[str, str]) -> list[list[str]]:
    """One row per domain: the values of the metrics in ``columns``, with intervals where they have one."""
    return [[name, *(_shown(domain["metrics"].get(metric)) for metric in columns)] for name, domain in domains.items()]


def _shown(metric: Mapping[str, Any] | None) -> str:
    if metric is None or metric["value"] is None:
        return "-"
    value = f"{metric['value']:.3f}"
    return value if metric["low"] is None else f"{value} ±{(metric['high'] - metric['low']) / 2:.3f}"
