"""Soak test: train for some time and check that memory, threads and open files do not grow.

    python tools/soak.py --minutes 20 --json tools/results/soak.json

A small model trains with all features enabled: streaming metrics, panel, probes, routing of every sample on disk,
validation, checkpoints. Its memory, threads and open files are sampled every few seconds. After the first quarter, in
which caches fill, none of them may have a positive slope. At the end the run gets SIGTERM and must stop cleanly.

It trains in float32. In bf16, oneDNN caches a compiled matmul per row count of an expert, about half a MiB each and up
to 1,024 of them. That grows for hours but is not a leak (`train.precision=bf16` shows it).
"""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from common import CODE_AND_MATH, TRAIN
from common.command_line import make_parser, write_json
from rich.console import Console
from rich.table import Table
from scipy.stats import theilslopes

from moetrain.checkpoint.manager import list_checkpoints
from moetrain.distributed.signals import STOPPED_BY_SIGNAL

# Many small steps, more than fit the time, with frequent monitoring, validation and checkpoints.
_SETTINGS = (
    "run.name=soak",
    "data.domains.code.repeats=32",
    "data.domains.math.repeats=32",
    "data.seq_len=128",
    "model.hidden_size=64",
    "model.num_hidden_layers=3",
    "model.num_experts=8",
    "model.intermediate_size=32",
    "train.precision=fp32",
    "train.micro_batch_rows=2",
    "train.eval_every=500",
    "train.eval_tokens=4096",
    "train.checkpoint_every=250",
    "train.keep_every=5000",
    "monitor.every=20",
    "monitor.store_top=2",
    "panel.tokens=32",
    "panel.readings=500",
    "probes.readings=100",
)
_TOLERANCE = 0.01  # of the median per hour: a smaller slope is not growth
_WINDOW = 60.0  # seconds: samples within are correlated, because they see the same few checkpoints and evaluations


@dataclass(frozen=True)
class Sample:
    """The resources of a process at one moment."""

    seconds: float
    processor: float  # CPU seconds so far
    memory: int  # resident bytes
    threads: int
    files: int


@dataclass(frozen=True)
class Trend:
    """The trend of one quantity after the first quarter: slope per hour with a 95% interval (Theil and Sen)."""

    first: float
    last: float
    slope: float
    low: float
    high: float
    grows: bool


def main(arguments: list[str] | None = None) -> int:
    """Train, measure and print; returns the exit status: 0 no growth, 1 growth, 2 the run failed."""
    parser = make_parser(__doc__)
    parser.add_argument("--minutes", type=float, default=20.0, help="of training (default 20)")
    parser.add_argument("--every", type=float, default=5.0, help="seconds between samples (default 5)")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("settings", nargs="*", help="override settings: section.key=value")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        samples, status, output = soak(Path(folder), options.minutes * 60, options.every, options.settings)
        checkpoints = list_checkpoints(Path(folder) / "soak")
    if status != STOPPED_BY_SIGNAL:
        print(f"error: the run ended with status {status}, not {STOPPED_BY_SIGNAL}:\n{output}", file=sys.stderr)
        return 2
    steps = max((int(path.name.removeprefix("step_")) for path in checkpoints), default=0)
    trends = {name: trend(samples, name) for name in ("memory", "threads", "files")}
    Console().print(_table(trends))
    print(f"{steps:,} steps, {samples[-1].processor:,.0f} s of CPU time")
    write_json(options.json, _result(options.minutes, steps, samples, trends))
    return int(any(found.grows for found in trends.values()))


def soak(folder: Path, seconds: float, every: float, settings: list[str]) -> tuple[list[Sample], int, str]:
    """Train for a time, then send SIGTERM; returns the samples, the exit status, and the end of the output."""
    command = [sys.executable, str(TRAIN), str(CODE_AND_MATH), *_SETTINGS, f"run.output_dir={folder}", *settings]
    log = folder / "log"
    with open(log, "w") as output, subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT) as process:
        while process.poll() is None and not any(folder.glob("soak/events.jsonl")):
            time.sleep(0.1)
        start, samples = time.monotonic(), list[Sample]()
        while process.poll() is None and time.monotonic() - start < seconds:
            samples.append(_sample(process.pid, time.monotonic() - start))
            time.sleep(every)
        process.send_signal(signal.SIGTERM)
        status = process.wait(timeout=1200)
    return samples, status, log.read_text()[-3000:]


def trend(samples: list[Sample], name: str) -> Trend:
    """The trend of a quantity's medians per minute; it grows where the interval of its slope is above the tolerance."""
    later = samples[len(samples) // 4 :]
    minutes: dict[int, list[float]] = {}
    for sample in later:
        minutes.setdefault(int(sample.seconds // _WINDOW), []).append(float(getattr(sample, name)))
    values = np.array([median(within) for within in minutes.values()])
    slope, _, low, high = theilslopes(values, np.array(list(minutes)) * _WINDOW / 3600)
    floor = _TOLERANCE * float(np.median(values))
    return Trend(values[0], values[-1], float(slope), float(low), float(high), bool(low > floor))


def _sample(pid: int, seconds: float) -> Sample:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    status = dict(line.split(":", 1) for line in lines)
    files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    processor = (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
    return Sample(seconds, processor, int(status["VmRSS"].split()[0]) * 1024, int(status["Threads"]), files)


def _result(minutes: float, steps: int, samples: list[Sample], trends: dict[str, Trend]) -> dict[str, Any]:
    return {
        "minutes": minutes,
        "steps": steps,
        "processor_seconds": samples[-1].processor,
        "machine": platform.machine(),
        "date": time.strftime("%Y-%m-%d"),
        "trends": {name: asdict(found) for name, found in trends.items()},
        "samples": [asdict(sample) for sample in samples[:: max(1, len(samples) // 60)]],
    }


def _table(trends: dict[str, Trend]) -> Table:
    table = Table("", "after a quarter", "at the end", "slope/hour", "95% interval", "grows")
    for name, found in trends.items():
        unit = 2**20 if name == "memory" else 1
        numbers = [f"{value / unit:,.1f}" for value in (found.first, found.last, found.slope)]
        interval = f"{found.low / unit:,.1f} to {found.high / unit:,.1f}"
        table.add_row(name + (", MiB" if unit > 1 else ""), *numbers, interval, "yes" if found.grows else "no")
    return table


if __name__ == "__main__":
    sys.exit(main())
