"""Evaluate a series of saved models on the same texts and compute all metrics of a run from their routing.

Checkpoints of a run, on the run's panel: readings and metrics equal those of training, bit for bit on the same
hardware. (For a run of N ranks add train.micro_batch_rows=ROWS, the rows that one rank evaluated at a time.)

    python tools/replay.py runs/four_domains --output replays/four_domains

Models of transformers (folders, or revisions on the hub: allenai/OLMoE-1B-7B-0924, allenai/OLMoE-1B-7B-0125,
allenai/FlexOlmo-7x7B-1T, Qwen3-MoE, Mixtral, GPT-OSS, DeepSeek-V3 and all others of moetrain/integrations/families.py),
on given documents per domain: the file has data.domains as for a run, and may have panel, monitor, phase and probes.
--unseen gives documents that the models were not trained on.

    python tools/replay.py allenai/OLMoE-1B-7B-0924@step5000-tokens20B allenai/OLMoE-1B-7B-0924@step10000-tokens41B \\
        --data documents.yaml --unseen held_out.yaml panel.tokens=256 --output replays/olmoe

The output has the form of a run: routing/*.parquet, TensorBoard files, events.jsonl, summary.json.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from common.command_line import make_parser, reports_errors

from moetrain.checkpoint.manager import CheckpointError, list_checkpoints
from moetrain.checkpoint.restore import find_checkpoint
from moetrain.config import ModelSettings, Settings, SettingsError, TokenizerSettings, load_settings
from moetrain.data.errors import DataError
from moetrain.data.split import split_domains
from moetrain.distributed.launch import start_ranks
from moetrain.integrations.families import FamilyError
from moetrain.integrations.foreign_model import folder_settings
from moetrain.loggers.summary import summary_rows
from moetrain.loggers.terminal import Terminal
from moetrain.models.hf import OlmoeError, find_olmoe
from moetrain.replay import own_model, replay, texts_of_documents, texts_of_run, transformers_model
from moetrain.routing.store import StoreError

_COLUMNS = {
    "loss/panel_seen": "loss, seen",
    "loss/panel_heldout": "held-out",
    "pathway/d_path": "D_path",
    "pathway/cosine": "cosine",
    "pathway/spread": "spread",
    "kernel/effective_rank": "rank",
    "kernel/left_out": "leave-one-out",
}


@reports_errors(SettingsError, DataError, CheckpointError, OlmoeError, FamilyError, StoreError, OSError)
def main(arguments: list[str] | None = None) -> int:
    """Replay and print; returns the exit status: 0 done, 2 invalid models, settings or data."""
    parser = make_parser(__doc__)
    parser.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="RUN (initial model and all checkpoints), RUN/checkpoints/step_XXXXXXXX, a transformers folder, "
        "OWNER/NAME[@REVISION]; and section.key=value to override settings",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="output folder; must not exist")
    parser.add_argument("--data", type=Path, metavar="CONFIG.yaml", help="documents that the models were trained on")
    parser.add_argument("--unseen", type=Path, metavar="CONFIG.yaml", help="documents that they were not trained on")
    parser.add_argument(
        "--steps",
        type=int,
        nargs="+",
        metavar="N",
        help="steps of the transformers models, unless given by their names",
    )
    options = parser.parse_intermixed_args(arguments)
    words = [word for word in options.models if "=" not in word]
    overrides = [word for word in options.models if "=" in word]
    _replay(words, overrides, options, Terminal())
    return 0


def _replay(words: list[str], overrides: list[str], options: argparse.Namespace, terminal: Terminal) -> None:
    if options.output.exists():
        raise FileExistsError(f"--output {options.output} exists, and nothing is overwritten: give a new folder")
    checkpoints, run, entire_run = own_checkpoints(words)
    external = [word for word in words if not is_own(word)]
    if options.steps and len(options.steps) != len(external):
        raise SettingsError(
            f"--steps: {len(options.steps)} steps for {len(external)} transformers models: give one each"
        )
    if run is not None and not external and options.data is None:
        if options.unseen:
            raise SettingsError("--unseen needs --data: without it the run's own panel is used")
        settings = load_settings(run / "config.yaml", overrides)
        layout = start_ranks(settings)
        texts = texts_of_run(settings, layout, terminal, start=entire_run)
        models = [own_model(folder, texts.corpus.fingerprint) for folder in checkpoints]
    else:
        if options.data is None:
            raise SettingsError(f"{external[0]}: not a run or checkpoint; transformers models need --data CONFIG.yaml")
        steps = options.steps or [None] * len(external)
        models = [transformers_model(name, step) for name, step in zip(external, steps, strict=True)]
        models += [own_model(folder) for folder in checkpoints]
        settings = for_models(split_domains(load_settings(options.data, overrides)), run, external)
        unseen = None
        if options.unseen:
            unseen = for_models(split_domains(load_settings(options.unseen, overrides)), run, external)
        layout = start_ranks(settings)
        texts = texts_of_documents(settings, unseen, max(model.step for model in models), terminal)
    summary = replay(models, texts, options.output, layout, terminal)
    rows = summary_rows(summary["domains"], _COLUMNS)
    terminal.table(
        f"step {max(map(int, summary['models']))}, over samples of the panel", ["domain", *_COLUMNS.values()], rows
    )
    terminal.note(f"{len(summary['models'])} readings of {len(texts.panel.panel)} samples: {options.output}")


def is_own(word: str) -> bool:
    """Whether a word is the folder of a run or of a checkpoint."""
    path = Path(word).expanduser()
    return (path / "checkpoints").is_dir() or (path / "manifest.json").is_file()


def own_checkpoints(words: list[str]) -> tuple[list[Path], Path | None, bool]:
    """The checkpoints given by runs and checkpoints among the words, their run, and whether the entire run is given.

    Raises:
        CheckpointError: a run without a checkpoint.
        SettingsError: checkpoints of several runs.
    """
    found: dict[Path, Path] = {}
    entire_run = False
    for word in filter(is_own, words):
        folder, run = find_checkpoint(Path(word))
        entire = folder != Path(word).expanduser().resolve()
        found |= dict.fromkeys(list_checkpoints(run) if entire else [folder], run)
        entire_run |= entire
    runs = sorted(set(found.values()))
    if len(runs) > 1:
        raise SettingsError(f"{runs[0]} and {runs[1]}: two runs: replay one at a time")
    return list(found), runs[0] if runs else None, entire_run


def for_models(settings: Settings, run: Path | None, external: list[str]) -> Settings:
    """The settings with the architecture and tokenizer of all models.

    Raises:
        SettingsError: the models differ in shape or tokenizer, or have no tokenizer.
    """
    folders = [*([run] if run else []), *(find_olmoe(name, weights=False) for name in external)]
    models = [load_settings(run / "config.yaml").model] if run else []
    models += [folder_settings(folder) for folder in folders[len(models) :]]
    files: list[Path] = []
    for folder, model in zip(folders, models, strict=True):
        file = next(filter(Path.is_file, (folder / "tokenizer.model", folder / "tokenizer.json")), None)
        if file is None:
            raise SettingsError(f"{folder}: no tokenizer.json and no tokenizer.model: put one there")
        files.append(file)
        if file.read_bytes() != files[0].read_bytes():
            raise SettingsError(f"{folder}: another tokenizer than {files[0]}: replay one series at a time")
        if _shape(model) != _shape(models[0]):
            raise SettingsError(
                f"{folder}: {_shape(model)}, {folders[0]} {_shape(models[0])}: replay one series at a time"
            )
    model = models[0]
    if model.experts == "dense":
        blocks = settings.model.dense_experts or model.dense_experts
        if not blocks or model.dense_width % blocks:
            units = f"its {model.dense_width} hidden units"
            raise SettingsError(f"{folders[0]}: a dense model: set model.dense_experts to a divisor of {units}")
        model = model.model_copy(update={"dense_experts": blocks})
    return settings.model_copy(update={"tokenizer": TokenizerSettings(model=str(files[0])), "model": model})


def _shape(model: ModelSettings) -> str:
    experts = f"{model.dense_width} hidden units, dense" if model.experts == "dense" else f"{model.num_experts} experts"
    return f"{model.num_hidden_layers} layers of {experts}"


if __name__ == "__main__":
    sys.exit(main())
