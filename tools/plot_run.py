"""Plot curves of a run with 95% intervals: panel metrics per domain from its Parquet files, probes from its events.

    python tools/plot_run.py runs/grokking_demo probes/accuracy memorized/gap_heldout kernel/effective_rank -o demo.png

A curve is a panel metric (its TensorBoard tag without the domain: pathway/cosine, loss/panel_seen, ...) per domain, or
probes/METRIC per task; --tasks takes a pattern of the tasks to show.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
from pathlib import Path

import numpy as np

from moetrain.config import Settings, SettingsError, load_settings
from moetrain.grokking import Estimate
from moetrain.loggers.terminal import Terminal
from moetrain.routing.panel_metrics import panel_metrics
from moetrain.routing.store import StoreError, read_readings

Series = dict[str, list[tuple[int, float, float, float]]]
"""The points (step, value, low, high) of each curve, by its name."""


def panel_series(run: Path, settings: Settings, steps: int, terminal: Terminal | None = None) -> dict[str, Series]:
    """Every panel metric of a run, by metric and domain."""
    domains = list(settings.data.domains)
    found: dict[str, Series] = {}
    readings = list(read_readings(run))
    for number, reading in enumerate(readings):
        (terminal or Terminal(speaks=False)).preparing("measuring readings", number, len(readings))
        measured = panel_metrics(reading, domains, settings.monitor.tau, steps, max_pairs=settings.panel.max_pairs)
        for tag, estimate in measured.items():
            metric, _, domain = tag.rpartition("/")
            found.setdefault(metric, {}).setdefault(domain, []).append((reading.step, *_numbers(estimate)))
    return found


def probe_series(run: Path, tasks: str) -> dict[str, Series]:
    """Every metric of the probes whose task matches a pattern, by metric and task."""
    found: dict[str, Series] = {}
    for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines():
        event = json.loads(line)
        if event["type"] == "probe" and fnmatch.fnmatch(event["task"], tasks):
            for metric, each in event["metrics"].items():
                point = [np.nan if each[name] is None else each[name] for name in ("value", "low", "high")]
                found.setdefault(f"probes/{metric}", {}).setdefault(event["task"], []).append((event["step"], *point))
    return found


def draw(series: dict[str, Series], wanted: list[str], title: str, output: Path) -> None:
    """One chart per wanted metric, curves with their intervals as bands."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(3, len(wanted))
    rows = -(-len(wanted) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(5.2 * columns, 3.4 * rows), squeeze=False, sharex=True)
    for axis in axes.flat[len(wanted) :]:
        axis.set_visible(False)
    for axis, metric in zip(axes.flat, wanted, strict=False):
        for name, points in series[metric].items():
            step, value, low, high = np.array(points).T
            (line,) = axis.plot(step, value, label=name, linewidth=1.5)
            axis.fill_between(step, low, high, color=line.get_color(), alpha=0.18, linewidth=0)
        axis.set_title(metric, fontsize=10)
        axis.grid(alpha=0.25)
        axis.legend(fontsize=7, frameon=False)
        axis.set_xlabel("step", fontsize=8)
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    figure.savefig(output, dpi=110)
    plt.close(figure)


def _numbers(estimate: Estimate) -> tuple[float, float, float]:
    return estimate.mean, estimate.low, estimate.high


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 done, 2 a run or metric that is not there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("metrics", nargs="+", metavar="METRIC")
    parser.add_argument("--tasks", default="*", metavar="PATTERN", help="tasks of probes/METRIC (default all)")
    parser.add_argument("--title", help="default: the run's name")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help=".png, .svg or .pdf")
    given = parser.parse_args(arguments)
    if given.output.suffix not in (".png", ".svg", ".pdf"):
        parser.error(f"--output {given.output}: end it in .png, .svg or .pdf")
    terminal = Terminal()
    try:
        settings = load_settings(given.run / "config.yaml")
        summary = given.run / "summary.json"
        steps = json.loads(summary.read_text())["steps"] if summary.exists() else settings.train.max_steps
        series = panel_series(given.run, settings, steps or 1, terminal) | probe_series(given.run, given.tasks)
        for metric in given.metrics:
            if metric not in series:
                of_tasks = (
                    f" of tasks like {given.tasks}" if metric.startswith("probes/") and given.tasks != "*" else ""
                )
                raise StoreError(f"{given.run}: no {metric}{of_tasks}: there are {', '.join(sorted(series)) or 'none'}")
    except (SettingsError, StoreError, OSError) as error:
        terminal.error(str(error))
        return 2
    draw(series, given.metrics, given.title or given.run.name, given.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
