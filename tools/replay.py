"""Read the same texts through a series of saved models, and compute from their routing all that a run would show.

A run's own checkpoints, over the panel it was watched with: readings and metrics are the live ones, to the bit on the
same hardware. (A run of N processes: add train.micro_batch_rows=ROWS, what one process read at a time.)

    python tools/replay.py runs/four_domains --output replays/four_domains

Models of transformers (folders, or revisions of the hub), over given documents by domain: the file holds data.domains
as for a run, and may hold panel, monitor, phase and probes; --unseen names documents that the models never met.

    python tools/replay.py allenai/OLMoE-1B-7B-0924@step5000-tokens20B allenai/OLMoE-1B-7B-0924@step10000-tokens41B \\
        --data documents.yaml --unseen held_out.yaml panel.tokens=256 --output replays/olmoe

The output has a run's form: routing/*.parquet, TensorBoard files, events.jsonl, summary.json.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from moetrain.checkpoint.manager import CheckpointError, list_checkpoints
from moetrain.checkpoint.restore import find_checkpoint
from moetrain.config import ModelSettings, Settings, SettingsError, TokenizerSettings, load_settings
from moetrain.data.errors import DataError
from moetrain.distributed.launch import start_ranks
from moetrain.loggers.summary import summary_rows
from moetrain.loggers.terminal import Terminal
from moetrain.models.hf import OlmoeError, find_olmoe, read_settings
from moetrain.replay import own_model, replay, texts_of_documents, texts_of_run, transformers_model
from moetrain.routing.store import StoreError

_COLUMNS = {
    "loss/panel_seen": "loss, seen",
    "loss/panel_heldout": "held out",
    "pathway/d_path": "D_path",
    "pathway/cosine": "cosine",
    "pathway/spread": "spread",
    "kernel/effective_rank": "rank",
    "kernel/left_out": "leave-one-out",
}


def main(arguments: list[str] | None = None) -> int:
    """Replay and print; returns the exit status: 0 done, 2 models, settings or data that cannot be used."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="RUN (its start and all its checkpoints), RUN/checkpoints/step_XXXXXXXX, a transformers folder, "
        "OWNER/NAME[@REVISION]; and section.key=value, laid over the settings in use",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="where it goes; not there yet")
    parser.add_argument("--data", type=Path, metavar="CONFIG.yaml", help="documents that the models trained on")
    parser.add_argument("--unseen", type=Path, metavar="CONFIG.yaml", help="documents that they never met")
    parser.add_argument(
        "--steps", type=int, nargs="+", metavar="N", help="steps of the transformers models, where no name says them"
    )
    options = parser.parse_intermixed_args(arguments)
    words = [word for word in options.models if "=" not in word]
    overrides = [word for word in options.models if "=" in word]
    terminal = Terminal()
    try:
        _replay(words, overrides, options, terminal)
    except (SettingsError, DataError, CheckpointError, OlmoeError, StoreError, OSError) as error:
        terminal.error(str(error))
        return 2
    return 0


def _replay(words: list[str], overrides: list[str], options: argparse.Namespace, terminal: Terminal) -> None:
    if options.output.exists():
        raise FileExistsError(f"--output {options.output} exists, and nothing is overwritten: give a new folder")
    checkpoints, run, whole = own_checkpoints(words)
    theirs = [word for word in words if not is_own(word)]
    if options.steps and len(options.steps) != len(theirs):
        raise SettingsError(f"--steps: {len(options.steps)} steps for {len(theirs)} transformers models: give one each")
    if run is not None and not theirs and options.data is None:
        if options.unseen:
            raise SettingsError("--unseen goes with --data: without it a run's own panel is read")
        settings = load_settings(run / "config.yaml", overrides)
        layout = start_ranks(settings)
        texts = texts_of_run(settings, layout, terminal, start=whole)
        models = [own_model(folder, texts.corpus.fingerprint) for folder in checkpoints]
    else:
        if options.data is None:
            raise SettingsError(
                f"{theirs[0]}: no run or checkpoint of ours; one of transformers needs --data CONFIG.yaml"
            )
        steps = options.steps or [None] * len(theirs)
        models = [transformers_model(name, step) for name, step in zip(theirs, steps, strict=True)]
        models += [own_model(folder) for folder in checkpoints]
        settings = for_models(load_settings(options.data, overrides), run, theirs)
        unseen = for_models(load_settings(options.unseen, overrides), run, theirs) if options.unseen else None
        layout = start_ranks(settings)
        texts = texts_of_documents(settings, unseen, max(model.step for model in models), terminal)
    summary = replay(models, texts, options.output, layout, terminal)
    rows = summary_rows(summary["domains"], _COLUMNS)
    terminal.table(f"step {max(map(int, summary['models']))}", ["domain", *_COLUMNS.values()], rows)
    terminal.note(f"{len(summary['models'])} readings of {len(texts.panel.panel)} samples: {options.output}")


def is_own(word: str) -> bool:
    """Whether a word names a run or a checkpoint of ours."""
    path = Path(word).expanduser()
    return (path / "checkpoints").is_dir() or (path / "manifest.json").is_file()


def own_checkpoints(words: list[str]) -> tuple[list[Path], Path | None, bool]:
    """The checkpoints that runs and checkpoints among the words name, their run, and whether it is named as a whole.

    Raises:
        CheckpointError: a run without a checkpoint.
        SettingsError: checkpoints of several runs.
    """
    found: dict[Path, Path] = {}
    whole = False
    for word in filter(is_own, words):
        folder, run = find_checkpoint(Path(word))
        entire = folder != Path(word).expanduser().resolve()
        found |= dict.fromkeys(list_checkpoints(run) if entire else [folder], run)
        whole |= entire
    runs = sorted(set(found.values()))
    if len(runs) > 1:
        raise SettingsError(f"{runs[0]} and {runs[1]}: two runs: replay one at a time")
    return list(found), runs[0] if runs else None, whole


def for_models(settings: Settings, run: Path | None, theirs: list[str]) -> Settings:
    """The settings with the architecture and the tokenizer that all models share.

    Raises:
        SettingsError: they differ in what makes readings comparable, or have no tokenizer.
    """
    folders = [*([run] if run else []), *(find_olmoe(name, weights=False) for name in theirs)]
    models = [load_settings(run / "config.yaml").model] if run else []
    models += [read_settings(folder)[0] for folder in folders[len(models) :]]
    files: list[Path] = []
    for folder, model in zip(folders, models, strict=True):
        file = next(filter(Path.is_file, (folder / "tokenizer.model", folder / "tokenizer.json")), None)
        if file is None:
            raise SettingsError(f"{folder}: neither tokenizer.json nor tokenizer.model is there: put it there")
        files.append(file)
        if file.read_bytes() != files[0].read_bytes():
            raise SettingsError(f"{folder}: another tokenizer than {files[0]}: replay one series at a time")
        if _shape(model) != _shape(models[0]):
            raise SettingsError(
                f"{folder}: {_shape(model)}, {folders[0]} {_shape(models[0])}: replay one series at a time"
            )
    return settings.model_copy(update={"tokenizer": TokenizerSettings(model=str(files[0])), "model": models[0]})


def _shape(model: ModelSettings) -> str:
    return (
        "no router" if model.experts == "dense" else f"{model.num_hidden_layers} layers of {model.num_experts} experts"
    )


if __name__ == "__main__":
    sys.exit(main())
