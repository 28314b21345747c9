"""Benchmarks: training throughput, comparisons, monitoring overhead, and the resource plan of a larger run.

    python tools/bench.py train --json train.json       # our step: tokens/s, time per component, memory, utilization
    python tools/bench.py peers --json peers.json       # against transformers and against dense models
    python tools/bench.py monitor                       # overhead of recording, streaming metrics and panel
    python tools/bench.py monitor --parts costs distances --json costs.json --figure costs.png
    python tools/bench.py overhead --old CHECKOUT      # whole runs with and without the monitor, and of another commit
    python tools/bench.py growth --figure growth.png   # cost over layers, experts, top-k, length, domains, panel size
    python tools/bench.py saving                       # how long training waits for a checkpoint, two ways
    python tools/bench.py reading                      # how long training waits for data
    python tools/bench.py plan CONFIG.yaml --gpus 8 --tokens 100e9 --measured train.json
    python tools/bench.py card --output card            # all measurements that need a CUDA GPU, at OLMoE-1B-7B's shape

Every benchmark that trains takes a configuration and overrides, as training does. Compared implementations run
alternately on the same fresh data. Results are medians, and ratios of medians.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from benchmarks import backends, card, growth, monitor, overhead, peers, plan, reading, saving, steps
from benchmarks.machine import heading
from common.command_line import make_parser, reports_errors, write_json
from rich.console import Console

from moetrain.config import SettingsError
from moetrain.data.errors import DataError


class Benchmark(NamedTuple):
    """A module with `add_arguments`, `tables` and `draw`; the function that measures; what it measures."""

    module: ModuleType
    run: Callable[[argparse.Namespace], dict[str, Any]]
    summary: str


BENCHMARKS = {
    "train": Benchmark(steps, steps.run, "a training step: throughput, components, memory, utilization"),
    "peers": Benchmark(peers, peers.run, "a training step against transformers and dense models"),
    "experts": Benchmark(backends, backends.run_experts, "a layer's experts by backend"),
    "attention": Benchmark(backends, backends.run_attention, "a layer's attention by backend"),
    "monitor": Benchmark(monitor, monitor.run, "overhead of recording, streaming metrics and panel"),
    "overhead": Benchmark(overhead, overhead.run, "what watching costs a whole run: with, without, another checkout"),
    "growth": Benchmark(growth, growth.run, "how training and watching grow with model, data and panel"),
    "saving": Benchmark(saving, saving.run, "how long training waits for a checkpoint"),
    "reading": Benchmark(reading, reading.run, "how long training waits for data"),
    "plan": Benchmark(plan, plan.run, "resource plan of a larger run"),
    "card": Benchmark(card, card.run, "all measurements on one CUDA GPU"),
}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; each benchmark adds its own options."""
    parser = make_parser(__doc__, prog="bench.py")
    subparsers = parser.add_subparsers(dest="benchmark", required=True, metavar="|".join(BENCHMARKS))
    for name, benchmark in BENCHMARKS.items():
        subparser = subparsers.add_parser(name, help=benchmark.summary, description=benchmark.module.__doc__)
        benchmark.module.add_arguments(subparser)
        subparser.add_argument("--json", type=Path, metavar="FILE", help="write the result to this file")
        subparser.add_argument("--figure", type=Path, metavar="FILE", help="write a figure (.png, .svg, .pdf)")
    return parser.parse_args(arguments)


@reports_errors(SettingsError, DataError)
def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print tables, write results; exit status 0 done, 2 an invalid command or configuration."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(words)
    benchmark = BENCHMARKS[options.benchmark]
    found = benchmark.run(options)
    result = heading(benchmark.summary, words) | found  # after measuring, which sets the number of threads
    write_json(options.json, result)
    for table in benchmark.module.tables(result):
        Console().print(table)
    if options.figure:
        benchmark.module.draw(result, options.figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
