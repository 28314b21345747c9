"""Probe a checkpoint: score it on benchmarks.

    python tools/probe.py runs/four_domains bench/arc_easy.jsonl.gz hub:piqa --limit 200 --json probed.json

A task is a file or pattern of items (see the setting probes.tasks), hub:NAME, or hub:NAME=PATH for a local copy.
Contamination by the training text is not checked: tools/prepare_data.py --probes does that.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common.command_line import make_parser, reports_errors

from moetrain.atomic_io import write_file
from moetrain.checkpoint.manager import CheckpointError
from moetrain.checkpoint.restore import TrainedModel, open_model
from moetrain.config import SettingsError
from moetrain.data.errors import DataError
from moetrain.distributed.mesh import ParallelLayout
from moetrain.loggers.terminal import Terminal
from moetrain.probes.scoring import PreparedTasks, TaskScore, prepare, score
from moetrain.probes.tasks import ENOUGH, read_entries, tasks_of

_BATCH_TOKENS = {"cpu": 4096, "cuda": 32_768}
_METRICS = {
    "accuracy": "accuracy",
    "accuracy_per_character": "by char",
    "soft": "soft",
    "bpb": "bits/byte",
    "exact_match": "exact",
}


def count(text: str) -> int:
    """A command-line number of 1 or more."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("1 or more")
    return number


def probing_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser of the checkpoint, the tasks and the options of probing."""
    parser = make_parser(description)
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="RUN, or RUN/checkpoints/step_XXXXXXXX")
    parser.add_argument("tasks", nargs="+", metavar="TASK_FILE", help="file or pattern of items, or hub:NAME[=PATH]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all numbers, and those of each item")
    probing = parser.add_argument_group("probing")
    probing.add_argument("--limit", type=count, metavar="N", help="items per task, chosen by the run's seed (all)")
    probing.add_argument("--generate", type=count, metavar="N", help="also generate open answers of at most N tokens")
    probing.add_argument("--dtype", choices=("float32", "bfloat16"), help="of matmuls (default: as in training)")
    probing.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda if available)")
    probing.add_argument("--batch-tokens", type=count, metavar="N", help="approximate tokens of a forward pass")
    return parser


def open_checkpoint(options: argparse.Namespace) -> TrainedModel:
    """The model that the options of `probing_parser` name. Raises as `open_model`."""
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return open_model(options.checkpoint, device, getattr(torch, options.dtype) if options.dtype else None)


def score_tasks(
    trained: TrainedModel, prepared: PreparedTasks, max_new_tokens: int, terminal: Terminal, progress: str
) -> dict[str, TaskScore]:
    """`score` on one rank, with its progress shown under the text `progress`."""
    return score(
        trained.model,
        prepared,
        ParallelLayout(device=trained.model.lm_head.weight.device),
        max_new_tokens,
        on_batch=lambda done, total: terminal.preparing(progress, done, total),
    )


def table_rows(scores: dict[str, TaskScore]) -> tuple[list[str], list[list[str]]]:
    """(columns, rows) of a table: each metric that a task has, with its 95% interval."""
    shown = {name: title for name, title in _METRICS.items() if any(name in each.metrics for each in scores.values())}
    rows = []
    for name, scored in scores.items():
        chance = "-" if scored.task.kind == "likelihood" else f"{scored.task.chance:.3f}"
        found = (scored.metrics.get(metric) for metric in shown)
        numbers = [f"{each.value:.3f}±{each.high - each.value:.3f}" if each is not None else "-" for each in found]
        rows.append([name, f"{len(scored.task.items):,}", chance, *numbers])
    return ["task", "items", "chance", *shown.values()], rows


def notes(scores: dict[str, TaskScore]) -> list[str]:
    """Warnings about the numbers."""
    lines = []
    if cut := [f"{scored.cut:,} of {name}" for name, scored in scores.items() if scored.cut]:
        lines.append(f"longer than the model's context and cut from the left: {', '.join(cut)} items")
    if few := [name for name, scored in scores.items() if scored.too_few]:
        lines.append(f"too few items (under {ENOUGH}) for precise numbers: {', '.join(few)}")
    return lines


def as_record(trained: TrainedModel, scores: dict[str, TaskScore]) -> dict[str, Any]:
    """The content of the ``--json`` file."""
    return {
        "checkpoint": str(trained.checkpoint),
        "step": trained.step,
        "tokens_trained": trained.tokens_trained,
        "precision": str(trained.model.dtype).removeprefix("torch."),
        "tasks": {name: scored.as_dict() for name, scored in scores.items()},
    }


def write_record(path: Path, record: dict[str, Any]) -> None:
    write_file(path, json.dumps(record, indent=1, allow_nan=False) + "\n")


@reports_errors(SettingsError, DataError, CheckpointError, OSError)
def main(arguments: list[str] | None = None) -> int:
    """Probe and print. Returns the exit status: 0, or 2 for a checkpoint, task or file that cannot be used."""
    options = probing_parser(__doc__).parse_args(arguments)
    terminal = Terminal()
    items = read_entries(options.tasks, ".", "TASK_FILE")
    trained = open_checkpoint(options)
    tasks = tasks_of(items, options.limit, trained.settings.run.seed)
    terminal.preparing(f"encoding {sum(len(task.items) for task in tasks):,} items", 0, None)
    batch_tokens = options.batch_tokens or _BATCH_TOKENS[trained.model.lm_head.weight.device.type]
    prepared = prepare(tasks, trained.tokenizer, trained.settings.data.seq_len, batch_tokens)
    began = time.monotonic()
    scores = score_tasks(trained, prepared, options.generate or 0, terminal, "reading tokens")
    seconds = time.monotonic() - began
    terminal.table(f"step {trained.step:,} of {trained.run}", *table_rows(scores))
    for line in [*notes(scores), f"{prepared.tokens:,} tokens in {seconds:,.1f} s"]:
        terminal.note(line)
    if options.json:
        write_record(options.json, as_record(trained, scores))
    return 0


if __name__ == "__main__":
    sys.exit(main())
