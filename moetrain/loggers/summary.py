"""Results of a finished run: ``summary.json``, and the table and the lines printed at the end."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moetrain.atomic_io import write_file
from moetrain.loggers.terminal import number

RESULT_COLUMNS = {
    "bits_per_byte": "bits/byte",
    "validation_loss": "held-out loss",
    "train_loss": "train loss",
    "stream/d_path": "D_path, stream",
    "stream/cosine": "cosine, stream",
}
"""Metrics of the table at the end of a run, with their titles; "stream": of the newest samples trained on."""


def write_summary(run: Path, summary: Mapping[str, Any]) -> None:
    """Write ``summary.json`` atomically: its presence says that the run is finished."""
    write_file(run / "summary.json", json.dumps(summary, indent=1, allow_nan=False))


def summary_rows(domains: Mapping[str, Mapping[str, Any]], columns: Mapping[str, str]) -> list[list[str]]:
    """Rows of the final table: per domain the metrics of ``columns``, with their intervals where they have one."""
    return [[name, *(_shown(domain["metrics"].get(metric)) for metric in columns)] for name, domain in domains.items()]


def _shown(metric: Mapping[str, Any] | None) -> str:
    if metric is None or metric["value"] is None:
        return "-"
    value = number(metric["value"])
    if metric["low"] is None:
        return value
    half = (metric["high"] - metric["low"]) / 2
    places = len(value.partition(".")[2]) if "e" not in value else None
    return f"{value} ±{half:.{places}f}" if places is not None else f"{value} ±{half:.1e}"


def closing_lines(summary: Mapping[str, Any], folder: Path) -> list[str]:
    """The last lines of a finished run: the verdict per domain by the newest reading, and the cost."""
    lines = [
        f"{domain} is {found['phase']}: {found['why']}"
        for domain, found in summary["domains"].items()
        if "why" in found
    ]
    tokens, text, measured = (summary[name] for name in ("tokens", "text_tokens", "measured_tokens"))
    # Of another trainer's rows it is not known which tokens are begin and end tokens.
    marked = f"{text:,} tokens of text and {tokens - text:,} begin and end tokens"
    counted, of = (marked, "of both ") if tokens > text else (f"{tokens:,} tokens", "")
    since = "" if measured == tokens else f" since it was resumed, {measured:,} tokens ago"
    return [
        *lines,
        f"{counted}; {summary['tokens_per_second']:,.0f} {of}per second of training, {summary['monitor_share']:.1%} "
        f"of the time spent on monitoring{since}; peak memory {summary['peak_memory_bytes'] / 2**30:.2f} GiB; run "
        f"folder: {folder}",
    ]
