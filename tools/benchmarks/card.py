"""All measurements on one CUDA GPU by one command: tests, backends, training steps of OLMoE-1B-7B's shape.

Each part is a command in a subprocess, so that a failure or an out-of-memory does not end the others; its output and
result are kept next to the summary, which is written after each part. Training steps use as many layers as the plan
fits into the GPU's memory (see `benchmarks.memory`); the summary names the number. One part shards the compiled model
over a mesh of one rank, so that FSDP2, torch.compile and CUDA meet on a single GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from xml.etree import ElementTree

import torch
from common import ROOT
from common.command_line import write_json
from common.figures import draw_bars
from rich.table import Table

from benchmarks.configs import KNOWN
from benchmarks.memory import predict
from benchmarks.timing import format_share
from moetrain.config import Settings, SettingsError, load_settings

_USABLE = 0.93  # of the GPU's memory; the allocator and the driver take the rest


class Part(NamedTuple):
    """A benchmark, its options, and overrides of the configuration."""

    benchmark: str
    options: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()


def _steps(*overrides: str, more: tuple[str, ...] = ()) -> Part:
    return Part("train", ("--turns", "4", "--warmup", "2", *more), overrides)


_MESH_OF_ONE = "--mesh-of-one"
_GROUPED, _LARGE = "model.experts=grouped_mm", "train.micro_batch_rows=8"
PARTS = {
    "tests": Part("pytest"),
    "experts_16k": Part("experts", ("--tokens", "16384")),
    "experts_32k": Part("experts", ("--tokens", "32768")),
    "attention_16k": Part("attention", ("--tokens", "16384")),
    "train_16k": _steps(_GROUPED),
    "train_16k_compiled": _steps(_GROUPED, "train.compile=true"),
    "train_16k_sharded_compiled": _steps(_GROUPED, "train.compile=true", more=(_MESH_OF_ONE,)),
    "train_16k_megablocks": _steps("model.experts=megablocks"),
    "train_16k_muon": _steps(_GROUPED, "optim.name=muon"),
    "train_32k": _steps(_GROUPED, _LARGE),
    "train_32k_recomputed": _steps(_GROUPED, _LARGE, "train.activation_checkpointing=true"),
    "saving": Part("saving", ("--turns", "3"), ("model.num_hidden_layers=2",)),  # 8.4 GB
    "monitor": Part("monitor", ("--parts", "share", "panel", "costs")),
}
"""All parts use the given configuration's shape; without one, `monitor` uses its own configurations."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", type=Path, default=KNOWN["olmoe_shape"], help="(default %(default)s)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--output", type=Path, default=Path("card"), metavar="FOLDER", help="(default ./card)")
    parser.add_argument("--limit", type=float, default=600, help="time limit of a part in seconds (default 600)")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The outcome of each part; a part that failed gives the reason.

    Raises:
        SettingsError: there is no CUDA device.
    """
    memory = card_memory()
    options.output.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"memory_bytes": memory, "parts": {}}
    for name in options.only:
        start = time.perf_counter()
        try:
            part, planned = fit(PARTS[name], options.config, memory)
            result = run_part(name, part, options.config, options.output, options.limit) | planned
        except (SettingsError, ValueError) as error:  # settings that this part cannot have
            result = {"outcome": f"not run: {error}"}
        found["parts"][name] = result | {"seconds": time.perf_counter() - start}
        print(f"{name}: {result['outcome']} ({found['parts'][name]['seconds']:.0f} s)", flush=True)
        write_json(options.output / "card.json", found)
    return found


def fit(part: Part, config: Path, memory: int) -> tuple[Part, dict[str, int]]:
    """A part with as many layers as fit ``memory``, and their number where it trains.

    Raises:
        SettingsError, ValueError: the configuration is not one that this part can train.
    """
    if part.benchmark != "train":
        return part, {}
    layers = layers_that_fit(load_settings(config, part.overrides), memory, _MESH_OF_ONE in part.options)
    return part._replace(overrides=(*part.overrides, f"model.num_hidden_layers={layers}")), {"layers": layers}


def card_memory() -> int:
    """Bytes of this machine's GPU.

    Raises:
        SettingsError: there is none.
    """
    if not torch.cuda.is_available():
        raise SettingsError("no CUDA device here (torch.cuda.is_available() is false): run this on a machine with one")
    return torch.cuda.get_device_properties(0).total_memory


def layers_that_fit(settings: Settings, memory: int, sharded: bool = False) -> int:
    """The most layers, at least one and at most the configuration's, with which a step is planned to fit ``memory``."""
    for layers in range(settings.model.num_hidden_layers, 1, -1):
        shallow = settings.model.model_copy(update={"num_hidden_layers": layers})
        planned = predict(
            settings.model_copy(update={"model": shallow}), settings.tokenizer.vocab_size, shards=1 if sharded else None
        )
        if planned.peak <= _USABLE * memory:
            return layers
    return 1


def run_part(name: str, part: Part, config: Path, output: Path, limit: float) -> dict[str, Any]:
    """Run one part; its output goes to NAME.log, its result to NAME.json (NAME.xml for tests)."""
    if part.benchmark == "pytest":
        found = output / f"{name}.xml"
        command = ["-m", "pytest", str(ROOT / "tests" / "gpu"), "-m", "gpu", "-n", "0", "-q", f"--junitxml={found}"]
    else:
        found = output / f"{name}.json"
        shape = [] if part.benchmark == "monitor" and config == KNOWN["olmoe_shape"] else [str(config)]
        words = [part.benchmark, "--json", str(found), *part.options, "--", *shape, *part.overrides]
        command = [str(ROOT / "tools" / "bench.py"), *words]
    found.unlink(missing_ok=True)
    log = output / f"{name}.log"
    status = _run([sys.executable, *command], log, limit)
    ended = f"took longer than {limit:g} s" if status is None else f"failed with status {status}: {_last_line(log)}"
    if not found.exists():
        return {"outcome": ended}
    if part.benchmark == "pytest":
        return summary_of_tests(found)
    return {"outcome": "done" if status == 0 else f"measured, then {ended}"} | summary(found)


def _run(command: list[str], log: Path, limit: float) -> int | None:
    """The exit status of a command; None where it took too long and was ended with all processes that it started."""
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True)
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it printed nothing"


def summary_of_tests(path: Path) -> dict[str, Any]:
    """How many tests passed, and the names of those that failed."""
    cases = list(ElementTree.parse(path).iter("testcase"))
    failed = [case.get("name") for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    passed = len(cases) - len(failed) - skipped
    return {"outcome": f"{passed} passed, {len(failed)} failed, {skipped} skipped", "failed": failed}


def summary(path: Path) -> dict[str, Any]:
    """The entries of a part's result that the table shows."""
    result = json.loads(path.read_text())
    if "tokens_per_second" in result:
        return {
            "tokens_per_second": result["tokens_per_second"],
            "utilization": result["utilization"],
            "peak_bytes": result["memory_bytes"]["peak"],
            "monitor_share": result["parts_seconds"]["monitor"] / sum(result["parts_seconds"].values()),
        }
    if "backends" in result:
        milliseconds = {name: row["seconds"] * 1e3 for name, row in result["backends"].items()}
        return {"milliseconds": milliseconds, "left_out": result["left_out"]}
    if "pause_ratio" in result:
        return {"pause_seconds": {name: median(side["pause"]) for name, side in result["sides"].items()}}
    return {"shares": {name: row["wall"] for name, row in result["share"].items()}}


def tables(result: dict[str, Any]) -> Iterator[Table]:
    """One row per part."""
    table = Table("part", "outcome", "result")
    for name, part in result["parts"].items():
        table.add_row(name, part["outcome"], _describe(part))
    yield table


def _describe(part: dict[str, Any]) -> str:
    if "tokens_per_second" in part:
        shares = (part["utilization"]["6n"], part["utilization"]["with_attention"], part["monitor_share"])
        used, attention, monitor = (f"{share:.1%}" for share in shares)
        return (
            f"{part['tokens_per_second']:,.0f} tokens/s with {part['layers']} layers, {used} of the matmul rate "
            f"({attention} with attention), {part['peak_bytes'] / 2**30:.1f} GiB, monitor {monitor}"
        )
    if "milliseconds" in part:
        ran = (f"{name} {time:.1f} ms" for name, time in sorted(part["milliseconds"].items(), key=lambda row: row[1]))
        return ", ".join([*ran, *(f"{name}: {reason}" for name, reason in part["left_out"].items())])
    if "pause_seconds" in part:
        return ", ".join(f"{name}: training waits {seconds:.2f} s" for name, seconds in part["pause_seconds"].items())
    if "shares" in part:
        return ", ".join(f"{name}: {format_share(share)}" for name, share in part["shares"].items())
    return ", ".join(part.get("failed", []))


def draw(result: dict[str, Any], path: Path) -> None:
    """Throughput of each training part."""
    parts = result["parts"].items()
    rates = {name: part["tokens_per_second"] for name, part in parts if "tokens_per_second" in part}
    draw_bars(path, rates, "tokens per second")
