"""Fine-tune a checkpoint on instructions with LoRA, and probe it before and after on the same items.

    python tools/instruct_probe.py runs/four_domains bench/arc_easy.jsonl.gz bench/gsm8k.jsonl.gz \\
        --instructions alpaca.jsonl.gz --json instructed.json --output adapters

Instructions are JSON Lines, plain or gzipped: instruction, input and output; or messages; or prompt and answer. The
loss is taken over responses alone. Tasks are given as to tools/probe.py; items that occur in the instructions are
excluded. The defaults are the paper's rank, projections, dropout, learning rate and epochs.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.command_line import reports_errors
from probe import as_record, notes, open_checkpoint, probing_parser, score_tasks, table_rows, write_record

from moetrain.atomic_io import refuse_existing
from moetrain.checkpoint.manager import CheckpointError
from moetrain.checkpoint.restore import TrainedModel
from moetrain.config import SettingsError
from moetrain.data.contamination import clean, contaminated
from moetrain.data.errors import DataError
from moetrain.data.instructions import Example, read_instructions
from moetrain.data.sources.files import named_files
from moetrain.loggers.terminal import Terminal
from moetrain.probes.fine_tuning import (
    FineTuned,
    FineTuningError,
    LoraSettings,
    add_adapters,
    check_adaptable,
    encode_examples,
    fine_tune,
    save_adapters,
)
from moetrain.probes.scoring import Measured, TaskScore, prepare
from moetrain.probes.tasks import Task, read_entries, tasks_of

_BATCH_TOKENS = {"cpu": 4096, "cuda": 16_384}  # half of probe.py's: training stores activations


@dataclass(frozen=True)
class Instructed:
    """Scores by task before and after fine-tuning, and its result."""

    before: dict[str, TaskScore]
    after: dict[str, TaskScore]
    tuned: FineTuned
    examples: int
    cut: int  # examples longer than the model's context
    adapted: Any  # peft's wrapper; the adapters are in the trained model itself as well

    @property
    def change(self) -> dict[str, Measured]:
        """Accuracy gained by task, for tasks that have one, with the standard error of the paired differences."""
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
    """Probe, fine-tune and probe again; ``trained`` has the adapters afterwards.

    Args:
        batch_tokens: approximate tokens of one forward pass.
        max_new_tokens: of a generated answer; 0 generates none.
        terminal: where progress is shown.

    Raises:
        FineTuningError: peft is not installed, a module does not exist, or the loss is not finite.
    """
    check_adaptable(trained.model, settings)  # before anything that takes time
    terminal = terminal or Terminal(speaks=False)
    context_tokens, padding = trained.settings.data.seq_len, trained.tokenizer.end_id
    terminal.preparing(f"encoding {sum(len(t.items) for t in tasks):,} items, {len(examples):,} examples", 0, None)
    prepared = prepare(tasks, trained.tokenizer, context_tokens, batch_tokens)
    encoded = encode_examples(examples, trained.tokenizer, context_tokens)
    before = score_tasks(trained, prepared, max_new_tokens, terminal, "probing before fine-tuning")
    adapted = add_adapters(trained.model, settings)
    terminal.start_training(0, settings.steps(len(encoded)))
    try:
        tuned = fine_tune(trained.model, encoded, settings, padding, batch_tokens, _show_step(terminal))
    finally:
        terminal.end_training()
    after = score_tasks(trained, prepared, max_new_tokens, terminal, "probing after fine-tuning")
    return Instructed(before, after, tuned, len(encoded), sum(each.cut for each in encoded), adapted)


def _show_step(terminal: Terminal) -> Callable[[int, float, int], None]:
    began, total = time.monotonic(), 0

    def show(step: int, loss: float, tokens: int) -> None:
        nonlocal total
        total += tokens
        terminal.training(step, loss, total / (time.monotonic() - began), {})

    return show


def as_instructed_record(trained: TrainedModel, found: Instructed, settings: LoraSettings) -> dict[str, Any]:
    """The content of the ``--json`` file: probe.py's record of the tuned model, and ``before`` with earlier scores."""
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
    """Print the scores, for each task before and after fine-tuning, and notes about them."""
    (columns, before), (_, after) = table_rows(found.before), table_rows(found.after)
    tuned_rows = [["  fine-tuned", *numbers] for _, *numbers in after]
    rows = [row for pair in zip(before, tuned_rows, strict=True) for row in pair]
    terminal.table(f"step {trained.step:,} of {trained.run}", columns, rows)
    for name, gained in found.change.items():
        change = f"{gained.value:+.3f}±{gained.high - gained.value:.3f}"
        terminal.note(f"accuracy of {name} changed by {change}, on the same items")
    if found.cut:
        terminal.note(f"longer than the model's context and cut from the left: {found.cut:,} examples")
    for line in notes(found.after):
        terminal.note(line)
    tuned = found.tuned
    losses = ", ".join(f"{loss:.3f}" for loss in tuned.losses_by_epoch)
    terminal.note(f"{len(tuned.losses):,} steps trained {tuned.parameters:,} parameters; loss by epoch: {losses}")


@reports_errors(SettingsError, DataError, CheckpointError, FineTuningError, OSError)
def main(arguments: list[str] | None = None) -> int:
    """Fine-tune, probe and print. Returns the exit status: 0, or 2 for unusable input or a loss that diverged."""
    options = _parser().parse_args(arguments)
    terminal = Terminal()
    if options.output:
        refuse_existing(options.output)
    items = read_entries(options.tasks, ".", "TASK_FILE")
    files = [path for pattern in options.instructions for path in named_files(pattern, "--instructions")]
    examples = read_instructions(files)
    report = contaminated(items, (example.text for example in examples))
    if options.contaminated == "exclude":
        items = clean(items, report)
    if not items:
        raise DataError("every item occurs in the instructions: give other tasks, or --contaminated keep")
    trained = open_checkpoint(options)
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
    batch_tokens = options.batch_tokens or _BATCH_TOKENS[trained.model.lm_head.weight.device.type]
    found = instruct_probe(trained, examples, tasks, settings, batch_tokens, options.generate or 0, terminal)
    show(terminal, trained, found)
    counts = {name: counted.contaminated for name, counted in report.tasks.items() if counted.contaminated}
    if counts:
        what = "excluded" if options.contaminated == "exclude" else "kept"
        named = ", ".join(f"{number:,} of {name}" for name, number in counts.items())
        terminal.note(f"items that occur in the instructions, {what}: {named}")
    if options.output:
        save_adapters(found.adapted, options.output)
    if options.json:
        inputs = {"instructions": [str(path) for path in files], "contaminated": counts}
        write_record(options.json, as_instructed_record(trained, found, settings) | inputs)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = probing_parser(__doc__)
    parser.add_argument("--instructions", nargs="+", required=True, metavar="FILE", help="files to fine-tune on")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="write the adapters, in peft's format")
    parser.add_argument(
        "--contaminated",
        choices=("exclude", "keep"),
        default="exclude",
        help="what happens to items that occur in the instructions (default exclude)",
    )
    tuning, default = parser.add_argument_group("fine-tuning"), LoraSettings()
    add = tuning.add_argument
    add("--rank", type=int, default=default.rank, metavar="N", help="of an adapter (default 32)")
    add("--alpha", type=float, metavar="A", help="adapters are scaled by A / rank (default twice the rank)")
    add("--modules", nargs="+", default=default.modules, metavar="NAME", help="modules with adapters (default q, k, v)")
    add("--dropout", type=float, default=default.dropout, metavar="P", help="in adapters (default 0.1)")
    add("--learning-rate", type=float, default=default.learning_rate, metavar="R", help="at the start (default 5e-5)")
    add("--epochs", type=int, default=default.epochs, metavar="N", help="over the examples (default 3)")
    add("--batch-size", type=int, default=default.batch_size, metavar="N", help="examples per step (default 8)")
    add("--seed", type=int, metavar="N", help="of adapters, dropout and order (default: the run's)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
