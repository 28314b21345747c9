"""All that is to be measured on one CUDA card, by one command: tests, backends, whole steps of OLMoE-1B-7B's shape.

Each part is a command of its own in a process of its own, so that one that fails, or takes all memory, ends nothing
else; what it printed and measured is kept beside the summary. Whole steps take as many layers as the card's memory is
planned to hold (see `benchmarks.memory`), which the summary names.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import torch
from rich.table import Table

from benchmarks.configs import KNOWN
from benchmarks.figures import new_figure, save
from benchmarks.memory import predict
from moetrain.config import Settings, SettingsError, load_settings

_ROOT = Path(__file__).parents[2]
_FREE = 0.93  # of a card's memory; the rest is the allocator's and the driver's


class Part(NamedTuple):
    """A benchmark, its options, and overrides of the configuration."""

    benchmark: str
    options: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()


def _steps(*overrides: str) -> Part:
    return Part("train", ("--turns", "4", "--warmup", "2"), overrides)


_GROUPED, _LARGE = "model.experts=grouped_mm", "train.micro_batch_rows=8"
PARTS = {
    "tests": Part("pytest"),
    "experts_16k": Part("experts", ("--tokens", "16384")),
    "experts_32k": Part("experts", ("--tokens", "32768")),
    "attention_16k": Part("attention", ("--tokens", "16384")),
    "train_16k": _steps(_GROUPED),
    "train_16k_compiled": _steps(_GROUPED, "train.compile=true"),
    "train_16k_megablocks": _steps("model.experts=megablocks"),
    "train_32k": _steps(_GROUPED, _LARGE),
    "train_32k_recomputed": _steps(_GROUPED, _LARGE, "train.activation_checkpointing=true"),
    "monitor": Part("monitor", ("--parts", "share", "panel", "costs")),
}
"""All but `monitor`, which has configurations of its own where none is given, are of the configuration's shape."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", type=Path, default=KNOWN["olmoe_shape"], help="(default %(default)s)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--output", type=Path, default=Path("card"), metavar="FOLDER", help="(default ./card)")
    parser.add_argument("--limit", type=float, default=600, help="seconds that a part may take (default 600)")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """What each part came to; a part that failed says why.

    Raises:
        SettingsError: there is no CUDA device here.
    """
    memory = card_memory()
    options.output.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"memory_bytes": memory, "parts": {}}
    for name in options.only:
        part, layers = PARTS[name], None
        if part.benchmark == "train":
            layers = layers_that_fit(load_settings(options.config, part.overrides), memory)
            part = part._replace(overrides=(*part.overrides, f"model.num_hidden_layers={layers}"))
        began = time.perf_counter()
        result = take_part(name, part, options.config, options.output, options.limit)
        result |= {"seconds": time.perf_counter() - began} | ({"layers": layers} if layers else {})
        found["parts"][name] = result
        print(f"{name}: {result['outcome']} ({result['seconds']:.0f} s)", flush=True)
    (options.output / "card.json").write_text(json.dumps(found, indent=1) + "\n")
    return found


def card_memory() -> int:
    """Bytes of this machine's card.

    Raises:
        SettingsError: there is none.
    """
    if not torch.cuda.is_available():
        raise SettingsError("no CUDA device here (torch.cuda.is_available() is false): run this on a machine with one")
    return torch.cuda.get_device_properties(0).total_memory


def layers_that_fit(settings: Settings, memory: int) -> int:
    """The most of the configuration's layers, at least one, with which a step is planned to fit ``memory`` bytes."""
    for layers in range(settings.model.num_hidden_layers, 1, -1):
        shallow = settings.model.model_copy(update={"num_hidden_layers": layers})
        planned = predict(settings.model_copy(update={"model": shallow}), settings.tokenizer.vocab_size)
        if planned.peak <= _FREE * memory:
            return layers
    return 1


def take_part(name: str, part: Part, config: Path, output: Path, limit: float) -> dict[str, Any]:
    """Run one part; what it printed goes to NAME.log, what it measured to NAME.json (NAME.xml for tests)."""
    if part.benchmark == "pytest":
        found = output / f"{name}.xml"
        command = ["-m", "pytest", str(_ROOT / "tests" / "gpu"), "-m", "gpu", "-q", f"--junitxml={found}"]
    else:
        found = output / f"{name}.json"
        shape = [] if part.benchmark == "monitor" and config == KNOWN["olmoe_shape"] else [str(config)]
        words = [part.benchmark, "--json", str(found), *part.options, "--", *shape, *part.overrides]
        command = [str(_ROOT / "tools" / "bench.py"), *words]
    found.unlink(missing_ok=True)
    log = output / f"{name}.log"
    with log.open("w") as printed:
        try:
            status = subprocess.run(
                [sys.executable, *command], stdout=printed, stderr=subprocess.STDOUT, timeout=limit, cwd=_ROOT
            ).returncode
        except subprocess.TimeoutExpired:
            return {"outcome": f"took longer than {limit:g} s"}
    if not found.exists():
        return {"outcome": f"failed with status {status}: {_last_line(log)}"}
    return summary_of_tests(found) if part.benchmark == "pytest" else {"outcome": "done"} | summary(found)


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it printed nothing"


def summary_of_tests(path: Path) -> dict[str, Any]:
    """How many tests passed, and the names of those that did not."""
    cases = list(ElementTree.parse(path).iter("testcase"))
    failed = [case.get("name") for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    passed = len(cases) - len(failed) - skipped
    return {"outcome": f"{passed} passed, {len(failed)} failed, {skipped} skipped", "failed": failed}


def summary(path: Path) -> dict[str, Any]:
    """Of a part's result, what its line in the table says; the rest stays in its file."""
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
    return {"shares": {name: row["wall"] for name, row in result["share"].items()}}


def tables(result: dict[str, Any]) -> Iterator[Table]:
    """A line for each part."""
    table = Table("part", "outcome", "what it says")
    for name, part in result["parts"].items():
        table.add_row(name, part["outcome"], _said(part))
    yield table


def _said(part: dict[str, Any]) -> str:
    if "tokens_per_second" in part:
        shares = (part["utilization"]["6n"], part["utilization"]["with_attention"], part["monitor_share"])
        used, attention, monitor = (f"{share:.1%}" for share in shares)
        return (
            f"{part['tokens_per_second']:,.0f} tokens/s with {part['layers']} layers, {used} of the matrix rate "
            f"({attention} with attention), {part['peak_bytes'] / 2**30:.1f} GiB, monitor {monitor}"
        )
    if "milliseconds" in part:
        ran = (f"{name} {time:.1f} ms" for name, time in sorted(part["milliseconds"].items(), key=lambda row: row[1]))
        return ", ".join([*ran, *(f"{name}: {reason}" for name, reason in part["left_out"].items())])
    if "shares" in part:
        shares = part["shares"].items()
        return ", ".join(f"{name}: {p['share']:.2%} ({p['low']:.2%} to {p['high']:.2%})" for name, p in shares)
    return ", ".join(part.get("failed", []))


def draw(result: dict[str, Any], path: Path) -> None:
    """Tokens a second of each way to train."""
    figure, (axis,) = new_figure(1, 1)
    rows = [(name, part["tokens_per_second"]) for name, part in result["parts"].items() if "tokens_per_second" in part]
    axis.barh([name for name, _ in rows], [rate for _, rate in rows], color="#3182bd")
    axis.set(xlabel="tokens a second")
    save(figure, path)
