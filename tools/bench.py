"""Measure how fast training is, beside others and in its parts, what watching costs, what a larger run would need.

    python tools/bench.py train --json train.json       # our step: tokens a second, parts, memory, utilization
    python tools/bench.py peers --json peers.json       # beside transformers and beside dense models
    python tools/bench.py monitor                       # recording, streaming metrics and panel, as shares and seconds
    python tools/bench.py monitor --parts costs distances --json costs.json --figure costs.png
    python tools/bench.py plan CONFIG.yaml --gpus 8 --tokens 100e9 --measured train.json
    python tools/bench.py card --output card            # all of it that needs a CUDA card, OLMoE-1B-7B's shape

Every benchmark that trains takes a configuration and overrides as a training run does. Sides that are compared take
turns on the same fresh data; what is printed and written are medians, and ratios of medians.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks import attention_backends, card, expert_backends, monitor, peers, plan, steps
from benchmarks.machine import heading
from rich.console import Console

from moetrain.config import SettingsError
from moetrain.data.documents import DataError

BENCHMARKS: dict[str, tuple[ModuleType, str]] = {
    "train": (steps, "a training step: tokens a second, parts, memory, utilization"),
    "peers": (peers, "a training step beside transformers' and beside dense models"),
    "experts": (expert_backends, "a layer's experts by backend"),
    "attention": (attention_backends, "a layer's attention by backend"),
    "monitor": (monitor, "what recording, streaming metrics and panel cost"),
    "plan": (plan, "what a larger run would need"),
    "card": (card, "all that is to be measured on one CUDA card"),
}
"""By name, a module with `add_arguments`, `run`, `tables` and `draw`, and what it measures."""


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line; every benchmark adds what it needs."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="bench.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    chosen = parser.add_subparsers(dest="benchmark", required=True, metavar="|".join(BENCHMARKS))
    for name, (module, summary) in BENCHMARKS.items():
        one = chosen.add_parser(name, help=summary, description=module.__doc__)
        module.add_arguments(one)
        one.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
        one.add_argument("--figure", type=Path, metavar="FILE", help="draw the result here (.png, .svg, .pdf)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print tables, write what was asked for; exit status 2 for a command or settings that cannot be used."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(words)
    module, summary = BENCHMARKS[options.benchmark]
    try:
        found = module.run(options)
        result: dict[str, Any] = {**heading(summary, words), **found}  # after it: a run sets the threads
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(result, indent=1) + "\n")
        for table in module.tables(result):
            Console().print(table)
        if options.figure:
            module.draw(result, options.figure)
    except (SettingsError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
