"""The model of a checkpoint with its tokenizer and settings, for tools that do not train."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from moetrain.checkpoint.manager import load_checkpoint, newest_valid
from moetrain.checkpoint.manifest import MANIFEST, CheckpointError
from moetrain.config import Settings, load_settings
from moetrain.data.tokenizer import Tokenizer, load_from_folder
from moetrain.distributed.launch import compute_dtype
from moetrain.models.transformer import Transformer

_CONFIG = "config.yaml"


@dataclass(frozen=True)
class TrainedModel:
    """The model of a checkpoint, in evaluation mode, with what it was trained on."""

    model: Transformer
    tokenizer: Tokenizer
    settings: Settings
    step: int
    tokens_trained: int
    corpus: str  # fingerprint of the data it was trained on
    checkpoint: Path
    run: Path


def open_model(
    checkpoint: Path | str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    dense_experts: int | None = None,
) -> TrainedModel:
    """The model of a checkpoint.

    Args:
        checkpoint: RUN/checkpoints/step_XXXXXXXX, or RUN for its newest valid one.
        dtype: of matmuls; None: by the run's ``train.precision``, on this device.
        dense_experts: blocks of a dense model whose routing is recorded; None: as in the run.

    Raises:
        CheckpointError: there is no checkpoint, it is corrupt, or its run lacks a file, in one line.
        SettingsError: the run's config.yaml cannot be read.
    """
    device = torch.device(device)
    folder, run = find_checkpoint(Path(checkpoint))
    settings = load_settings(run / _CONFIG)
    if dense_experts is not None:
        model_settings = settings.model.model_copy(update={"dense_experts": dense_experts})
        settings = settings.model_copy(update={"model": model_settings})
    loaded = load_checkpoint(folder, owners=("model",))
    tokenizer = _open_tokenizer(run, settings)
    dtype = dtype or compute_dtype(settings, device)
    state = loaded.states["model"]
    # A model initialized from a transformers folder may have more embeddings than its tokenizer has ids.
    rows = len(state["model.embed_tokens.weight"])
    try:
        if rows < tokenizer.vocab_size:
            raise ValueError(f"it has {rows} embeddings, the tokenizer {tokenizer.vocab_size} ids")
        model = Transformer.from_state(settings.model, rows, dtype, state)
    except ValueError as error:
        raise CheckpointError(f"{folder}: its weights do not fit {run / _CONFIG}: {error}") from None
    tokens, corpus = loaded.record["tokens_trained"], loaded.record["corpus"]
    return TrainedModel(model.to(device), tokenizer, settings, loaded.step, tokens, corpus, folder, run)


def find_checkpoint(given: Path) -> tuple[Path, Path]:
    """The folder of a checkpoint, or of a run's newest valid one, and the run it belongs to.

    Raises:
        CheckpointError: there is none, or its run's config.yaml is missing.
    """
    given = given.expanduser()
    if not given.is_dir():
        raise CheckpointError(f"{given}: no such folder: give RUN or RUN/checkpoints/step_XXXXXXXX")
    folder = given.resolve()
    if not (folder / MANIFEST).is_file() and (folder / "checkpoints").is_dir():
        folder, _ = newest_valid(folder, owners=("model",))
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(f"{given}: no checkpoint here: give RUN or RUN/checkpoints/step_XXXXXXXX")
    # A superseded checkpoint is one level deeper, in checkpoints/superseded.
    for run in folder.parents[1:3]:
        if (run / _CONFIG).is_file():
            return folder, run
    raise CheckpointError(f"{given}: the run's {_CONFIG} is missing: put it into {folder.parents[1]}")


def _open_tokenizer(run: Path, settings: Settings) -> Tokenizer:
    try:
        return load_from_folder(run)
    except FileNotFoundError:
        remedy = settings.tokenizer.model or "tokenizer-*/tokenizer.model of data.cache_dir"
        raise CheckpointError(f"{run}: the run's tokenizer is missing: copy {remedy} there") from None
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{run}: the run's tokenizer cannot be used: {error}") from None
