"""Export a checkpoint to a transformers folder, with the same logits and the same token ids.

    python tools/export_hf.py runs/four_domains exported          # the run's newest checkpoint
    python tools/export_hf.py runs/four_domains/checkpoints/step_00001000 exported --dtype bfloat16

The folder holds a model card, README.md. Evaluate it with lm-evaluation-harness. Every training sample began with the
begin token; in tasks of rolling likelihood the harness puts one there itself:

    lm_eval --model hf --model_args pretrained=exported,add_bos_token=True --include_path my_tasks --tasks my_task
    lm_eval --model hf --model_args pretrained=exported,add_bos_token=False --include_path my_tasks --tasks my_text
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from common.command_line import make_parser, reports_errors
from common.model_card import model_card

from moetrain.atomic_io import new_folder, refuse_existing
from moetrain.checkpoint.manager import CheckpointError
from moetrain.checkpoint.restore import TrainedModel, open_model
from moetrain.config import SettingsError
from moetrain.data.tokenizer_export import write_tokenizer
from moetrain.loggers.terminal import Terminal
from moetrain.models.hf import SHARD_BYTES, OlmoeError, olmoe_config, write_weights
from moetrain.models.serving import serving_limits


def export(
    trained: TrainedModel, folder: Path, dtype: torch.dtype = torch.float32, shard_bytes: int = SHARD_BYTES
) -> list[str]:
    """Write a transformers folder atomically; returns notes on where transformers, vLLM and llama.cpp differ from us.

    Raises:
        OlmoeError: transformers cannot express a setting or the tokenizer.
        OSError: the folder exists, or cannot be written.
    """
    refuse_existing(folder)
    tokenizer, longest = trained.tokenizer, trained.settings.data.seq_len
    marks = {"bos_token_id": tokenizer.begin_id, "eos_token_id": tokenizer.end_id, "pad_token_id": tokenizer.end_id}
    rows = len(trained.model.lm_head.weight)
    config = olmoe_config(trained.settings.model, rows, longest, tokenizer.begin_id, tokenizer.end_id, dtype)
    with new_folder(folder) as partial:
        try:
            notes = write_tokenizer(tokenizer, partial, longest)
        except ValueError as error:
            raise OlmoeError(str(error)) from None
        write_weights(trained.model, partial, dtype, shard_bytes)
        for name, content in (("config.json", config), ("generation_config.json", marks)):
            (partial / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        (partial / "README.md").write_text(model_card(trained, config), encoding="utf-8")
    limits = serving_limits(config)
    return notes + [f"{program}: {'; '.join(reasons)}" for program, reasons in limits.items() if reasons]


@reports_errors(SettingsError, CheckpointError, OlmoeError, OSError)
def main(arguments: list[str] | None = None) -> int:
    """Export; returns the exit status: 0 done, 2 the checkpoint cannot be read, expressed or written."""
    parser = make_parser(__doc__)
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="RUN, or RUN/checkpoints/step_XXXXXXXX")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder to write; must not exist")
    dtypes = ("float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=dtypes, default="float32", help="of the weights (default float32)")
    size_help = "maximum size of a weight file (default 5)"
    parser.add_argument("--shard-size", type=float, default=SHARD_BYTES / 1e9, metavar="GB", help=size_help)
    options = parser.parse_args(arguments)
    terminal = Terminal()
    terminal.preparing(f"reading {options.checkpoint}", 0, None)
    trained = open_model(options.checkpoint)
    terminal.preparing(f"writing {options.folder}", 0, None)
    notes = export(trained, options.folder, getattr(torch, options.dtype), int(options.shard_size * 1e9))
    for note in notes:
        terminal.note(note)
    size = sum(path.stat().st_size for path in options.folder.iterdir())
    exported = f"exported step {trained.step:,} of {trained.run} to {options.folder}"
    terminal.note(f"{exported}: {size / 1e6:,.0f} MB, {options.dtype}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
