"""Fine-tune a checkpoint on instructions with LoRA, and probe it before and after, on the same items.

    python tools/instruct_probe.py runs/four_domains bench/arc_easy.jsonl.gz bench/gsm8k.jsonl.gz \\
        --instructions alpaca.jsonl.gz --json instructed.json --output adapters

Instructions are JSON Lines, plain or gzipped: instruction, input and output; or messages; or prompt and answer. The
loss is taken over responses alone. Tasks are given as to tools/probe.py; items that stand in the instructions are left
out. The defaults are the paper's rank, projections, dropout, learning rate and epochs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from probe import as_record, count, notes, table_rows

from moetrain.atomic_io import write_file
from moetrain.checkpoint.manager import CheckpointError
from moetrain.checkpoint.restore import TrainedModel, open_model
from moetrain.config import SettingsError
from moetrain.data.contamination import clean, contaminated
from moetrain.data.errors import DataError
from moetrain.data.instructions import Example, read_instructions
from moetrain.data.sources.files import named_files
from moetrain.distributed.mesh import ParallelLayout
from moetrain.loggers.terminal import Terminal
from moetrain.probes.fine_tuning import (
    FineTuned,
    FineTuningError,
    LoraSettings,
    add_adapters,
    check_adaptable,
    encode_examples,
    fine_tune,
    refuse_folder,
    save_adapters,
)
from moetrain.probes.scoring import Measured, TaskScore, prepare, score
from moetrain.probes.tasks import Task, read_entries, tasks_of

_BATCH_TOKENS = {"cpu": 4096, "cuda": 16_384}  # half of what reading alone takes: training keeps what layers compute


@dataclass(frozen=True)
class Instructed:
    """Scores by task before and after a fine-tuning, and what it did."""

    before: dict[str, TaskScore]
    after: dict[str, TaskScore]
    tuned: FineTuned
    examples: int
    cut: int  # examples that were longer than the model's context
    adapted: Any  # peft's model; the adapters are in the trained model itself as well

    @property
    def change(self) -> dict[str, Measured]:
        """By task whose answers can be right: the accuracy gained, with the error of the items' paired differences."""
        return {
            name: Measured.of(after.correct.astype(float) - before.correct)
            for (name, after), before in zip(self.after.items(), self.before.values(), strict=True)
            if after.correct is not None and before.correct is not None
        }


def instruct_probe(
    trained: TrainedModel,
    examples: Sequence[Example],
    tasks: Sequence[Task],
    settings: LoraSettings,
    batch_tokens: int,
    max_new_tokens: int = 0,
    terminal: Terminal | None = None,
) -> Instructed:
    """Probe, fine-tune and probe again; ``trained`` carries the adapters afterwards.

    Args:
        batch_tokens: tokens of one forward pass, about.
        max_new_tokens: of a generated answer; 0 generates none.
        terminal: where progress is shown.

    Raises:
        FineTuningError: peft is not installed, no such module, or the loss is no number any more.
    """
    check_adaptable(trained.model, settings)  # before anything takes time
    terminal = terminal or Terminal(speaks=False)
    model, device = trained.model, trained.model.lm_head.weight.device
    context_tokens, padding = trained.settings.data.seq_len, trained.tokenizer.end_id
    terminal.preparing(f"encoding {sum(len(t.items) for t in tasks):,} items, {len(examples):,} examples", 0, None)
    prepared = prepare(tasks, trained.tokenizer, context_tokens, batch_tokens)
    encoded = encode_examples(examples, trained.tokenizer, context_tokens)

    def scores(when: str) -> dict[str, TaskScore]:
        return score(
            model,
            prepared,
            ParallelLayout(device=device),
            max_new_tokens=max_new_tokens,
            on_batch=lambda done, total: terminal.preparing(f"probing {when} fine-tuning", done, total),
        )

    before = scores("before")
    adapted = add_adapters(model, settings)
    terminal.start_training(0, settings.steps(len(encoded)))
    try:
        tuned = fine_tune(model, encoded, settings, padding, batch_tokens, _shown(terminal))
    finally:
        terminal.end_training()
    cut = sum(each.cut for each in encoded)
    return Instructed(before, scores("after"), tuned, len(encoded), cut, adapted)


def _shown(terminal: Terminal) -> Callable[[int, float, int], None]:
    began, read = time.monotonic(), 0

    def show(step: int, loss: float, tokens: int) -> None:
        nonlocal read
        read += tokens
        terminal.training(step, loss, read / (time.monotonic() - began), {})

    return show


def as_instructed_record(trained: TrainedModel, found: Instructed, settings: LoraSettings) -> dict[str, Any]:
    """What ``--json`` writes: the probe's record of the tuned model, and under ``before`` its tasks before that."""
    tuned = found.tuned
    fine_tuning = asdict(settings) | {
        "examples": found.examples,
        "cut": found.cut,
        "response_tokens": tuned.response_tokens,
        "parameters": tuned.parameters,
        "steps": len(tuned.losses),
        "loss_by_epoch": tuned.losses_by_epoch,
        "losses": tuned.losses,
    }
    change = {
        name: {"accuracy": gained.value, "accuracy_error": gained.error if gained.n > 1 else None, "n": gained.n}
        for name, gained in found.change.items()
    }
    before = {name: scored.as_dict() for name, scored in found.before.items()}
    return as_record(trained, found.after) | {"before": before, "change": change, "fine_tuning": fine_tuning}


def show(terminal: Terminal, trained: TrainedModel, found: Instructed) -> None:
    """Print the scores, each task's before fine-tuning above those after it, and what has to be known of them."""
    (columns, before), (_, after) = table_rows(found.before), table_rows(found.after)
    tuned_rows = [["  fine-tuned", *numbers] for _, *numbers in after]
    rows = [row for pair in zip(before, tuned_rows, strict=True) for row in pair]
    terminal.table(f"step {trained.step:,} of {trained.run}", columns, rows)
    for name, gained in found.change.items():
        change = f"{gained.value:+.3f}±{gained.high - gained.value:.3f}"
        terminal.note(f"accuracy of {name} changed by {change}, on the same items")
    if found.cut:
        terminal.note(f"longer than what the model was trained on, and cut from the left: {found.cut:,} examples")
    for line in notes(found.after):
        terminal.note(line)
    tuned = found.tuned
    losses = ", ".join(f"{loss:.3f}" for loss in tuned.losses_by_epoch)
    terminal.note(f"{len(tuned.losses):,} steps trained {tuned.parameters:,} parameters; loss by epoch: {losses}")


def main(arguments: list[str] | None = None) -> int:
    """Fine-tune, probe and print; returns the exit status: 0 done, 2 what cannot be used, or a loss that diverged."""
    options = _parser().parse_args(arguments)
    terminal = Terminal()
    try:
        if options.output:
            refuse_folder(options.output)
        items = read_entries(options.tasks, ".", "TASK_FILE")
        files = [path for pattern in options.instructions for path in named_files(pattern, "--instructions")]
        examples = read_instructions(files)
        report = contaminated(items, (example.text for example in examples))
        if options.contaminated == "exclude":
            items = clean(items, report)
        if not items:
            raise DataError("every item stands in the instructions: give other tasks, or --contaminated keep")
        device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        trained = open_model(options.checkpoint, device, getattr(torch, options.dtype) if options.dtype else None)
        seed = trained.settings.run.seed
        settings = LoraSettings(
            rank=options.rank,
            alpha=2.0 * options.rank if options.alpha is None else options.alpha,
            dropout=options.dropout,
            modules=tuple(options.modules),
            learning_rate=options.learning_rate,
            epochs=options.epochs,
            batch_size=options.batch_size,
            seed=seed if options.seed is None else options.seed,
        )
        tasks = tasks_of(items, options.limit, seed)
        batch_tokens = options.batch_tokens or _BATCH_TOKENS[device.type]
        found = instruct_probe(trained, examples, tasks, settings, batch_tokens, options.generate or 0, terminal)
        show(terminal, trained, found)
        counts = {name: counted.contaminated for name, counted in report.tasks.items() if counted.contaminated}
        if counts:
            what = "left out" if options.contaminated == "exclude" else "kept all the same"
            named = ", ".join(f"{number:,} of {name}" for name, number in counts.items())
            terminal.note(f"items that stand in the instructions, {what}: {named}")
        if options.output:
            save_adapters(found.adapted, options.output)
        if options.json:
            record = as_instructed_record(trained, found, settings)
            record["instructions"] = [str(path) for path in files]
            record["contaminated"] = counts
            write_file(options.json, json.dumps(record, indent=1, allow_nan=False) + "\n")
    except (SettingsError, DataError, CheckpointError, FineTuningError, OSError) as error:
        terminal.error(str(error))
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="RUN, or RUN/checkpoints/step_XXXXXXXX")
    parser.add_argument("tasks", nargs="+", metavar="TASK_FILE", help="file or pattern of items, or hub:NAME[=PATH]")
    parser.add_argument(
        "--instructions", nargs="+", required=True, metavar="FILE", help="file or pattern of what to learn"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers, and those of each item")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="write the adapters, in peft's form")

    default = LoraSettings()
    tuning = parser.add_argument_group("fine-tuning")
    tuning.add_argument("--rank", type=int, default=default.rank, metavar="N", help="of an adapter (default 32)")
    tuning.add_argument("--alpha", type=float, metavar="A", help="scales adapters by A / rank (default twice the rank)")
    tuning.add_argument(
        "--modules", nargs="+", default=default.modules, metavar="NAME", help="that adapters stand beside (q, k, v)"
    )
    tuning.add_argument("--dropout", type=float, default=default.dropout, metavar="P", help="in adapters (default 0.1)")
    tuning.add_argument(
        "--learning-rate", type=float, default=default.learning_rate, metavar="R", help="at its start (default 5e-5)"
    )
    tuning.add_argument("--epochs", type=int, default=default.epochs, metavar="N", help="of the examples (default 3)")
    tuning.add_argument(
        "--batch-size", type=int, default=default.batch_size, metavar="N", help="examples of a step (default 8)"
    )
    tuning.add_argument("--seed", type=int, metavar="N", help="of adapters, dropout and order (default: the run's)")

    probing = parser.add_argument_group("probing")
    probing.add_argument("--limit", type=count, metavar="N", help="items of a task, chosen by the run's seed (all)")
    probing.add_argument("--generate", type=count, metavar="N", help="also generate answers of at most N tokens")
    probing.add_argument(
        "--contaminated",
        choices=("exclude", "keep"),
        default="exclude",
        help="what becomes of items that stand in the instructions",
    )
    probing.add_argument("--dtype", choices=("float32", "bfloat16"), help="of products (default: as in training)")
    probing.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    probing.add_argument("--batch-tokens", type=count, metavar="N", help="tokens of a forward pass, about")
    return parser


if __name__ == "__main__":
    sys.exit(main())
