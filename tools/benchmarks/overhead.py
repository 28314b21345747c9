"""What watching costs a whole run: runs with the monitor, without it, and of another checkout, in turns.

Each run is a process of its own, from its command to its summary, without the report page. ``on`` is the configuration
as it is; ``off`` is without monitor and probes; ``old`` is the same file of another checkout. The data are prepared
before the first turn. ``start`` is the time from a run's command to its first line of a step, with the data prepared.

With ``--together``, ``on`` and ``off`` run at the same time, each on one core with one thread, and exchange cores at
every turn. What slows the machine then slows both. Compared are their steps per second while both train.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from common import QUICKSTART, ROOT
from rich.table import Table

from benchmarks.timing import ratio, share_with_interval, take_clocked_turns
from moetrain.config import SettingsError

OFF = ("monitor.enabled=false", "probes.builtin=false", "probes.tasks=[]")
CHECKOUT_FILE = "moetrain/train.py"
FIRST_STEP = "step 1/"
NUMBERS = ("monitor_share", "tokens_per_second", "steps", "tokens")
COMPARED = ("memorized/share", "memorized/gap", "memorized/gap_heldout")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config", nargs="*", metavar="CONFIG.yaml | section.key=value", help="configuration (default quickstart)"
    )
    parser.add_argument("--turns", type=int, default=2, help="turns, each with one run of every side (default 2)")
    parser.add_argument("--starts", type=int, default=3, help="starts of each side that are timed (default 3)")
    parser.add_argument("--old", type=Path, metavar="FOLDER", help="a checkout of another commit to compare with")
    parser.add_argument(
        "--together", action="store_true", help="run both sides of a turn at the same time, on a core each (Linux)"
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Wall seconds of each side, ratios, and what each side's runs found.

    Raises:
        SettingsError: a run failed, or ``--old`` is no checkout; it names the command.
    """
    overrides = [word for word in options.config if "=" in word]
    paths = [Path(word) for word in options.config if "=" not in word] or [QUICKSTART]
    if len(paths) > 1:
        raise SettingsError(f"{paths[1]}: overhead takes one configuration")
    path = paths[0].resolve()
    if options.together:
        return _together(path, overrides, options.turns)
    roots = {"on": ROOT, "off": ROOT}
    if options.old is not None:
        if not (options.old / CHECKOUT_FILE).is_file():
            raise SettingsError(f"--old {options.old}: no checkout of moetrain: {CHECKOUT_FILE} is missing")
        roots["old"] = options.old.resolve()
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in roots}
    with tempfile.TemporaryDirectory() as folder:
        sides = {
            side: _side(root, path, [*overrides, *(OFF if side == "off" else ())], Path(folder) / side, found[side])
            for side, root in roots.items()
        }
        for side, root in roots.items():
            _call(root, path, [*overrides, "--check"], Path(folder) / side)  # prepares the data
        starts = {
            side: [_start(root, path, overrides, Path(folder) / side) for _ in range(options.starts)]
            for side, root in roots.items()
            if side != "off"
        }
        timings = take_clocked_turns(sides, options.turns, warmup=0)
    result = {
        "configuration": path.stem,
        "overrides": overrides,
        "sides": {
            side: timing.summary() | {"wall": timing.wall, "runs": found[side]} for side, timing in timings.items()
        },
        "overhead": share_with_interval(timings["on"].wall, timings["off"].wall),
        "seconds_to_first_step": starts,
        "by_the_clock": [each["monitor_share"] for each in found["on"]],
    }
    if "old" in timings:
        result["against_old"] = ratio(timings["on"].wall, timings["old"].wall)
    return result


def _side(
    root: Path, config: Path, overrides: list[str], folder: Path, found: list[dict[str, Any]]
) -> Callable[[int], tuple[float, float]]:
    """A function of the turn that trains one run, appends what it found, and returns its wall and CPU seconds."""

    def turn(number: int) -> tuple[float, float]:
        before, start = os.times(), time.perf_counter()
        _call(root, config, [*overrides, f"run.name=turn{number}"], folder)
        wall, after = time.perf_counter() - start, os.times()
        found.append(_numbers(json.loads((folder / "runs" / f"turn{number}" / "summary.json").read_text())))
        cpu = after.children_user - before.children_user + after.children_system - before.children_system
        return wall, cpu

    return turn


def _together(config: Path, overrides: list[str], turns: int) -> dict[str, Any]:
    """Steps per second of ``on`` over those of ``off``, of runs at the same time.

    Raises:
        SettingsError: a run failed, or fewer than two cores may be used.
    """
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        raise SettingsError("overhead --together: needs two cores; without --together one is enough")
    sides: dict[str, dict[str, Any]] = {side: {"seconds_per_step": [], "runs": []} for side in ("on", "off")}
    with tempfile.TemporaryDirectory() as place:
        folders = {side: Path(place) / side for side in sides}
        for folder in folders.values():
            _call(ROOT, config, [*overrides, "--check"], folder)
        for number in range(turns):
            name = f"run.name=turn{number}"
            words = [*overrides, "train.threads=1", "train.log_every=5", "train.resume=never", name]
            with ThreadPoolExecutor(max_workers=2) as pool:
                lines = {
                    side: pool.submit(
                        _step_times,
                        _command(ROOT, config, [*words, *(OFF if side == "off" else ())], folders[side]),
                        folders[side],
                        core,
                    )
                    for side, core in zip(sides, cores if number % 2 == 0 else cores[::-1], strict=True)
                }
                times = {side: line.result() for side, line in lines.items()}
            begin, end = max(each[0][1] for each in times.values()), min(each[-1][1] for each in times.values())
            if end <= begin:
                raise SettingsError("overhead --together: one side ended before the other began: take a longer run")
            for side, found in sides.items():
                found["seconds_per_step"].append((end - begin) / _steps_between(times[side], begin, end))
                summary = json.loads((folders[side] / "runs" / f"turn{number}" / "summary.json").read_text())
                found["runs"].append(_numbers(summary))
    on, off = (sides[side]["seconds_per_step"] for side in ("on", "off"))
    return {
        "configuration": config.stem,
        "overrides": overrides,
        "together": True,
        "sides": sides,
        "overhead": share_with_interval(on, off),
        "by_the_clock": [each["monitor_share"] for each in sides["on"]["runs"]],
    }


def _step_times(command: list[str], folder: Path, core: int) -> list[tuple[int, float]]:
    """(step, time of its line in seconds) of a run on one core."""
    begin_of_line = "step "
    with subprocess.Popen(command, **_PIPES, **_place(ROOT, folder)) as process:
        os.sched_setaffinity(process.pid, {core})
        assert process.stdout is not None
        lines = [(line, time.perf_counter()) for line in process.stdout]
    steps = [(int(line.split("/")[0][len(begin_of_line) :]), at) for line, at in lines if _STEP_LINE.match(line)]
    if process.returncode or len(steps) < 2:
        raise SettingsError(f"{' '.join(command)}: status {process.returncode}, {len(steps)} lines of steps")
    return steps


_STEP_LINE = re.compile(r"step \d+/")


def _steps_between(times: list[tuple[int, float]], begin: float, end: float) -> float:
    """Steps done between two times, interpolated between lines."""
    steps, seconds = zip(*times, strict=True)
    first, last = np.interp([begin, end], seconds, steps)
    return float(last - first)


def _start(root: Path, config: Path, overrides: list[str], folder: Path) -> float:
    """Seconds from the command of a run of one step to the line that the terminal prints of it."""
    words = [*overrides, "train.max_steps=1", "train.log_every=1", "run.name=start", "train.resume=never"]
    begin = time.perf_counter()
    command = _command(root, config, words, folder)
    with subprocess.Popen(command, **_PIPES, **_place(root, folder)) as process:
        assert process.stdout is not None
        seconds = [time.perf_counter() - begin for line in process.stdout if line.startswith(FIRST_STEP)]
    if process.returncode or not seconds:
        raise SettingsError(f"{' '.join(command)}: status {process.returncode}, no line of step 1")
    return seconds[0]


_PIPES: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}


def _call(root: Path, config: Path, words: list[str], folder: Path) -> None:
    """Run a checkout's training to its end.

    Raises:
        SettingsError: it failed; with the command and its last line.
    """
    folder.mkdir(exist_ok=True)
    command = _command(root, config, words, folder)
    done = subprocess.run(command, **_PIPES, **_place(root, folder))
    if done.returncode:
        last = done.stdout.strip().splitlines()[-1:]
        raise SettingsError(f"{' '.join(command)}: status {done.returncode}: {' '.join(last)}")


def _command(root: Path, config: Path, words: list[str], folder: Path) -> list[str]:
    """Training with a checkout's own file of the configuration's name, or with the given file; without the report."""
    own = root / "configs" / config.name
    file = own if config.is_relative_to(ROOT) and own.is_file() else config
    place = (f"run.output_dir={folder / 'runs'}", "run.report=false")
    return [sys.executable, str(root / CHECKOUT_FILE), str(file), *words, *place]


def _place(root: Path, folder: Path) -> dict[str, Any]:
    return {"cwd": folder, "env": os.environ | {"PYTHONPATH": str(root)}}


def _numbers(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What a run's summary says of its speed and of each domain."""
    seconds = {name: round(value, 3) for name, value in summary["seconds"].items()}
    domains = {
        name: {
            "phase": domain.get("phase"),
            **{tag: domain["metrics"][tag] for tag in COMPARED if tag in domain["metrics"]},
        }
        for name, domain in summary["domains"].items()
    }
    return {name: summary[name] for name in NUMBERS} | {"seconds": seconds, "domains": domains}


def tables(result: dict[str, Any]) -> Iterator[Table]:
    """Seconds by side, and the verdicts of each side's last run."""
    if result.get("together"):
        yield _table_of_steps(result)
        return
    share = result["overhead"]
    title = (
        f"{result['configuration']}: with over without {share['share']:.1%} ({share['low']:.1%} to {share['high']:.1%})"
    )
    if "against_old" in result:
        title += f"; over the old checkout {result['against_old']['ratio']:.2f}"
    table = Table("side", "runs", "wall, s (median)", "CPU, s", "training", "panel", "probes", "monitor", title=title)
    for side, found in result["sides"].items():
        last = found["runs"][-1]
        parts = [f"{last['seconds'].get(name, 0.0):.1f}" for name in ("train", "panel", "probes")]
        shown = [str(found["turns"]), f"{found['seconds']:.1f}", f"{found['cpu_seconds']:.1f}", *parts]
        table.add_row(side, *shown, f"{last['monitor_share']:.1%}")
    yield table
    started = Table("side", "seconds from the command to step 1")
    for side, seconds in result["seconds_to_first_step"].items():
        started.add_row(side, ", ".join(f"{value:.1f}" for value in seconds))
    yield started
    verdicts = Table("domain", *result["sides"], title="phase and memorized share at the end, last run of each side")
    for domain in result["sides"]["on"]["runs"][-1]["domains"]:
        verdicts.add_row(domain, *(_verdict(side["runs"][-1]["domains"][domain]) for side in result["sides"].values()))
    yield verdicts


def _table_of_steps(result: Mapping[str, Any]) -> Table:
    share, clock = result["overhead"], result["by_the_clock"]
    title = (
        f"{result['configuration']}: seconds per step while both train, with over without "
        f"{share['share']:.1%} ({share['low']:.1%} to {share['high']:.1%}); by the clock {max(clock):.1%}"
    )
    table = Table("side", "ms per step, by turn", title=title)
    for side, found in result["sides"].items():
        table.add_row(side, ", ".join(f"{1000 * value:.1f}" for value in found["seconds_per_step"]))
    return table


def _verdict(domain: Mapping[str, Any]) -> str:
    share = domain.get("memorized/share")
    if share is None:
        return str(domain["phase"] or "-")
    return f"{domain['phase']}, {share['value']:.3f} ({share['low']:.3f} to {share['high']:.3f})"


def draw(result: dict[str, Any], path: Path) -> None:
    """Nothing to draw.

    Raises:
        SettingsError: always.
    """
    raise SettingsError(f"{path}: overhead has no figure: leave --figure out")
