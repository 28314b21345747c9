"""Train for a while and see whether memory, threads or open files grow.

    python tools/soak.py --minutes 20 --json tools/results/soak.json

A small model trains with everything on: streaming metrics, panel, probes, routing of each sample on disk, validation,
checkpoints. Every few seconds its memory, threads and open files are read off; after the first quarter, in which caches
fill, none of them may have a slope. At the end it is told to stop, and has to end as it should.

It trains in float32: in bf16 oneDNN keeps what it compiles for a number of an expert's rows that it has not met before,
about half a MiB each and up to 1,024 of them, which grows for hours and is no leak (`train.precision=bf16` shows it).
"""

from __future__ import annotations

import argparse
import json
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
from rich.console import Console
from rich.table import Table
from scipy.stats import theilslopes

from moetrain.checkpoint.manager import list_checkpoints
from moetrain.distributed.signals import STOPPED_BY_SIGNAL

_TRAIN = Path(__file__).parent.parent / "moetrain" / "train.py"
_QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
# Many small steps, more of them than the time is enough for, and each part of the run often.
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
_TOLERANCE = 0.01  # of the median, an hour: below it a slope is none
_TOGETHER = 60.0  # seconds; what is read within them is of the same few checkpoints and evaluations


@dataclass(frozen=True)
class Sample:
    """What a process holds at one moment."""

    seconds: float
    processor: float  # seconds that it has taken
    memory: int  # resident bytes
    threads: int
    files: int


@dataclass(frozen=True)
class Trend:
    """How one quantity moved after the first quarter: by the hour, with a 95% interval (Theil and Sen)."""

    first: float
    last: float
    slope: float
    low: float
    high: float
    grows: bool


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0, help="of training (default 20)")
    parser.add_argument("--every", type=float, default=5.0, help="seconds between readings (default 5)")
    parser.add_argument("--json", type=Path, help="file for the result")
    parser.add_argument("settings", nargs="*", help="section.key=value over the soak's own")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        samples, status, said = soak(Path(folder), options.minutes * 60, options.every, options.settings)
        steps = _steps(Path(folder) / "soak")
    if status != STOPPED_BY_SIGNAL:
        print(f"error: the run ended with status {status}, not {STOPPED_BY_SIGNAL}:\n{said}", file=sys.stderr)
        return 2
    trends = {name: trend(samples, name) for name in ("memory", "threads", "files")}
    Console().print(_table(trends))
    print(f"{steps:,} steps, {samples[-1].processor:,.0f} s of processor time")
    if options.json:
        options.json.write_text(json.dumps(_result(options.minutes, steps, samples, trends), indent=1) + "\n")
    return int(any(found.grows for found in trends.values()))


def soak(folder: Path, seconds: float, every: float, settings: list[str]) -> tuple[list[Sample], int, str]:
    """Train for a time: what was read off, the exit status once the run was told to stop, and the end of its output."""
    command = [sys.executable, str(_TRAIN), str(_QUICKSTART), *_SETTINGS, f"run.output_dir={folder}", *settings]
    log = folder / "log"
    with open(log, "w") as output, subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT) as process:
        while process.poll() is None and not any(folder.glob("soak/events.jsonl")):
            time.sleep(0.1)
        begin, samples = time.monotonic(), list[Sample]()
        while process.poll() is None and time.monotonic() - begin < seconds:
            samples.append(_sample(process.pid, time.monotonic() - begin))
            time.sleep(every)
        process.send_signal(signal.SIGTERM)
        status = process.wait(timeout=1200)
    return samples, status, log.read_text()[-3000:]


def trend(samples: list[Sample], name: str) -> Trend:
    """How a quantity moved, by its median in each minute; it grows where its slope's whole interval is above none."""
    later = samples[len(samples) // 4 :]
    minutes: dict[int, list[float]] = {}
    for sample in later:
        minutes.setdefault(int(sample.seconds // _TOGETHER), []).append(float(getattr(sample, name)))
    values = np.array([median(together) for together in minutes.values()])
    slope, _, low, high = theilslopes(values, np.array(list(minutes)) * _TOGETHER / 3600)
    floor = _TOLERANCE * float(np.median(values))
    return Trend(values[0], values[-1], float(slope), float(low), float(high), bool(low > floor))


def _steps(run: Path) -> int:
    """The newest step that a run saved."""
    return max((int(path.name.removeprefix("step_")) for path in list_checkpoints(run)), default=0)


def _sample(pid: int, seconds: float) -> Sample:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    told = dict(line.split(":", 1) for line in lines)
    files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    processor = (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
    return Sample(seconds, processor, int(told["VmRSS"].split()[0]) * 1024, int(told["Threads"]), files)


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
    table = Table("", "after a quarter", "at the end", "slope an hour", "95% interval", "grows")
    for name, found in trends.items():
        unit = 2**20 if name == "memory" else 1
        numbers = [f"{value / unit:,.1f}" for value in (found.first, found.last, found.slope)]
        interval = f"{found.low / unit:,.1f} to {found.high / unit:,.1f}"
        table.add_row(name + (", MiB" if unit > 1 else ""), *numbers, interval, "yes" if found.grows else "no")
    return table


if __name__ == "__main__":
    sys.exit(main())
