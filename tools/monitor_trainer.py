"""Example: `MonitorCallback` in transformers' Trainer, on two domains of Python code of known truth.

    python tools/monitor_trainer.py qwen3_moe --output watched

``fresh`` are pieces of the standard library, each trained on once; ``repeated`` other pieces, each trained on 48 times.
The tokens are bytes. Prints the verdicts and the cost; ``report.html`` and TensorBoard files are in the output folder.
"""

from __future__ import annotations

import random
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from common.command_line import make_parser, reports_errors

from moetrain.integrations.rows import MonitorError

LENGTH, OFFSET = 128, 3  # bytes of a row; ids below are special
REPEATS, REPEATED, FRESH, HELDOUT = 48, 100, 5000, 100
_SHAPE: dict[str, Any] = {
    "vocab_size": 256 + OFFSET,
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": LENGTH,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


def pieces(seed: int) -> Iterator[list[int]]:
    """Ids of pieces of the standard library's source, in random order, none twice."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-z]*.py"))
    files += sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-z]*/[a-z]*.py"))
    cut = (file.read_bytes() for file in files if "site-packages" not in file.parts)
    found = {text[start : start + LENGTH] for text in cut for start in range(0, len(text) - LENGTH, LENGTH)}
    shuffled = sorted(found)
    random.Random(seed).shuffle(shuffled)
    for piece in shuffled:
        yield [OFFSET + byte for byte in piece]


def data_sets(seed: int) -> tuple[Any, Any]:
    """The rows to train on, and rows of both domains to hold out."""
    from datasets import Dataset

    source = pieces(seed)

    def take(domain: str, count: int, repeats: int = 1) -> list[dict[str, Any]]:
        rows = [{"input_ids": next(source), "source": domain} for _ in range(count)]
        return [row for row in rows for _ in range(repeats)]

    train = take("repeated", REPEATED, REPEATS) + take("fresh", FRESH)
    return Dataset.from_list(train), Dataset.from_list(take("repeated", HELDOUT) + take("fresh", HELDOUT))


def random_model(family: str) -> Any:
    """A small random model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    width = {"intermediate_size": 64} if family == "olmoe" else {"moe_intermediate_size": 64, "head_dim": 24}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **_SHAPE, **width))


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch of rows of equal length."""
    ids = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def train(family: str, steps: int, output: Path, watched: bool) -> float:
    """Train with or without the monitor; returns the seconds that it took."""
    from transformers import Trainer, TrainingArguments

    from moetrain.integrations.transformers import MonitorCallback

    rows, heldout = data_sets(seed=0)
    arguments = TrainingArguments(
        str(output / "trained"),
        max_steps=steps,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=64,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=min(50, steps // 4),
        weight_decay=0.1,
        logging_steps=20,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    callbacks = [MonitorCallback("source", rows, heldout, output / "monitor")] if watched else []
    trainer = Trainer(random_model(family), arguments, data_collator=collate, train_dataset=rows, callbacks=callbacks)
    begin = time.perf_counter()
    trainer.train()
    return time.perf_counter() - begin


@reports_errors(MonitorError, OSError)
def main(arguments: Sequence[str] | None = None) -> int:
    """Train and print the time; returns the exit status: 0 done, 2 what cannot be watched."""
    parser = make_parser(__doc__)
    parser.add_argument("family", choices=["olmoe", "qwen3_moe"], help="architecture of the small random model")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="folder of the results")
    parser.add_argument("--steps", type=int, default=306, help="training steps (default 306, all of the data once)")
    parser.add_argument("--without", action="store_true", help="train without the monitor, to compare the time")
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error("--steps must be 1 or more")
    seconds = train(options.family, options.steps, options.output, not options.without)
    print(f"{options.steps} steps in {seconds:.1f} s {'without' if options.without else 'with'} the monitor")
    return 0


if __name__ == "__main__":
    sys.exit(main())
