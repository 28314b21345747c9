"""Probe a checkpoint: how it does on benchmarks, with what it makes of each item.

    python tools/probe.py runs/four_domains bench/arc_easy.jsonl.gz hub:piqa --limit 200 --json probed.json

A task is a file or pattern of items (see the setting probes.tasks), hub:NAME, or hub:NAME=PATH for a local copy.
Nothing is looked for in the training text: tools/prepare_data.py --probes does that.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from moetrain.atomic_io import write_file
from moetrain.checkpoint.manager import CheckpointError
from moetrain.checkpoint.restore import TrainedModel, open_model
from moetrain.config import SettingsError
from moetrain.data.errors import DataError
from moetrain.distributed.mesh import ParallelLayout
from moetrain.loggers.terminal import Terminal
from moetrain.probes.scoring import TaskScore, prepare, score
from moetrain.probes.tasks import ENOUGH, read_entries, tasks_of

_BATCH_TOKENS = {"cpu": 4096, "cuda": 32_768}
_METRICS = {
    "accuracy": "accuracy",
    "accuracy_per_character": "by char",
    "soft": "soft",
    "bpb": "bits/byte",
    "exact_match": "exact",
}


def table_rows(scores: dict[str, TaskScore]) -> tuple[list[str], list[list[str]]]:
    """(columns, rows) of a table: each metric that some task has, with its 95% interval."""
    shown = {name: title for name, title in _METRICS.items() if any(name in each.metrics for each in scores.values())}
    rows = []
    for name, scored in scores.items():
        chance = "-" if scored.task.kind == "likelihood" else f"{scored.task.chance:.3f}"
        found = (scored.metrics.get(metric) for metric in shown)
        numbers = [f"{each.value:.3f}±{each.high - each.value:.3f}" if each is not None else "-" for each in found]
        rows.append([name, f"{len(scored.task.items):,}", chance, *numbers])
    return ["task", "items", "chance", *shown.values()], rows


def notes(scores: dict[str, TaskScore]) -> list[str]:
    """What has to be known about the numbers."""
    lines = []
    cut = {name: scored.cut for name, scored in scores.items() if scored.cut}
    if cut:
        counted = ", ".join(f"{number:,} of {name}" for name, number in cut.items())
        lines.append(f"longer than what the model was trained on, and cut from the left: {counted} items")
    if few := [name for name, scored in scores.items() if scored.too_few]:
        lines.append(f"too few items (under {ENOUGH}) to say much: {', '.join(few)}")
    return lines


def as_record(trained: TrainedModel, scores: dict[str, TaskScore]) -> dict[str, Any]:
    """What ``--json`` writes."""
    about = {
        "checkpoint": str(trained.checkpoint),
        "step": trained.step,
        "tokens_trained": trained.tokens_trained,
        "precision": str(trained.model.dtype).removeprefix("torch."),
    }
    return about | {"tasks": {name: scored.as_dict() for name, scored in scores.items()}}


def main(arguments: list[str] | None = None) -> int:
    """Probe and print; returns the exit status: 0 done, 2 a checkpoint, task or file that cannot be used."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="RUN, or RUN/checkpoints/step_XXXXXXXX")
    parser.add_argument("tasks", nargs="+", metavar="TASK_FILE", help="file or pattern of items, or hub:NAME[=PATH]")
    parser.add_argument(
        "--limit", type=count, metavar="N", help="items of a task, a choice by the run's seed (default all)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all numbers, and those of each item")
    parser.add_argument(
        "--generate", type=count, metavar="N", help="also generate short open answers of at most N tokens"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="what products run in (default: as the run was trained)"
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    parser.add_argument("--batch-tokens", type=count, metavar="N", help="tokens of a forward pass, about")
    options = parser.parse_args(arguments)
    terminal = Terminal()
    try:
        items = read_entries(options.tasks, ".", "TASK_FILE")
        device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        trained = open_model(options.checkpoint, device, getattr(torch, options.dtype) if options.dtype else None)
        tasks = tasks_of(items, options.limit, trained.settings.run.seed)
        terminal.preparing(f"encoding {sum(len(task.items) for task in tasks):,} items", 0, None)
        batch_tokens = options.batch_tokens or _BATCH_TOKENS[device.type]
        prepared = prepare(tasks, trained.tokenizer, trained.settings.data.seq_len, batch_tokens)
        began = time.monotonic()
        scores = score(
            trained.model,
            prepared,
            ParallelLayout(device=device),
            max_new_tokens=options.generate or 0,
            on_batch=lambda done, total: terminal.preparing("reading tokens", done, total),
        )
        seconds = time.monotonic() - began
        terminal.table(f"step {trained.step:,} of {trained.run}", *table_rows(scores))
        for line in [*notes(scores), f"{prepared.tokens:,} tokens in {seconds:,.1f} s"]:
            terminal.note(line)
        if options.json:
            write_file(options.json, json.dumps(as_record(trained, scores), indent=1, allow_nan=False) + "\n")
    except (SettingsError, DataError, CheckpointError, OSError) as error:
        terminal.error(str(error))
        return 2
    return 0


def count(text: str) -> int:
    """A number of the command line that is 1 or more."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("1 or more")
    return number


if __name__ == "__main__":
    sys.exit(main())
