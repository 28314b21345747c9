"""Export a checkpoint as a folder that transformers loads: the same logits, the same token ids.

    python tools/export_hf.py runs/four_domains exported          # the run's newest checkpoint
    python tools/export_hf.py runs/four_domains/checkpoints/step_00001000 exported --dtype bfloat16

Evaluate it with lm-evaluation-harness (add_bos_token: each sample in training began with the mark):

    lm_eval --model hf --model_args pretrained=exported,add_bos_token=True --include_path my_tasks --tasks my_task
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch

from moetrain.checkpoint.manager import CheckpointError
from moetrain.checkpoint.restore import TrainedModel, open_model
from moetrain.config import SettingsError
from moetrain.data.tokenizer_export import write_tokenizer
from moetrain.loggers.terminal import Terminal
from moetrain.models.hf import SHARD_BYTES, OlmoeError, olmoe_config, write_weights


def export(
    trained: TrainedModel, folder: Path, dtype: torch.dtype = torch.float32, shard_bytes: int = SHARD_BYTES
) -> list[str]:
    """Write a model's folder, whole or not at all; returns notes on what it does otherwise than we do.

    Raises:
        OlmoeError: transformers' OLMoE cannot express a setting, by name; or the tokenizer cannot be expressed.
        OSError: the folder is there already, or cannot be written.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists, and nothing is overwritten: give a new folder")
    tokenizer, longest = trained.tokenizer, trained.settings.data.seq_len
    marks = {"bos_token_id": tokenizer.begin_id, "eos_token_id": tokenizer.end_id, "pad_token_id": tokenizer.end_id}
    rows = len(trained.model.lm_head.weight)
    config = olmoe_config(trained.settings.model, rows, longest, tokenizer.begin_id, tokenizer.end_id, dtype)
    beside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        try:
            notes = write_tokenizer(tokenizer, beside, longest)
        except ValueError as error:
            raise OlmoeError(str(error)) from None
        write_weights(trained.model, beside, dtype, shard_bytes)
        for name, content in (("config.json", config), ("generation_config.json", marks)):
            (beside / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        beside.rename(folder)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return notes


def main(arguments: list[str] | None = None) -> int:
    """Export and say what was written; returns the exit status: 0 done, 2 not to be read, expressed or written."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="RUN, or RUN/checkpoints/step_XXXXXXXX")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder to write, which is not there yet")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="type of the weights on disk"
    )
    parser.add_argument(
        "--shard-size", type=float, default=SHARD_BYTES / 1e9, metavar="GB", help="size of a weight file (default 5)"
    )
    options = parser.parse_args(arguments)
    terminal = Terminal()
    try:
        terminal.preparing(f"reading {options.checkpoint}", 0, None)
        trained = open_model(options.checkpoint)
        terminal.preparing(f"writing {options.folder}", 0, None)
        notes = export(trained, options.folder, getattr(torch, options.dtype), int(options.shard_size * 1e9))
    except (SettingsError, CheckpointError, OlmoeError, OSError) as error:
        terminal.error(str(error))
        return 2
    for note in notes:
        terminal.note(note)
    size = sum(path.stat().st_size for path in options.folder.iterdir())
    terminal.note(f"step {trained.step:,} of {trained.run} as {options.folder}: {size / 1e9:.2f} GB, {options.dtype}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
