"""The model before its first step: random weights, or those of a transformers folder to go on from."""

from __future__ import annotations

from pathlib import Path

import torch

from moetrain.config import ModelSettings, Settings, SettingsError
from moetrain.data.tokenizer import Tokenizer, load_tokenizer
from moetrain.models.hf import OlmoeError, find_olmoe, read_olmoe, read_settings
from moetrain.models.initialization import initialize_weights
from moetrain.models.transformer import Transformer

# What makes the same weights another model.
_MUST_AGREE = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "key_value_heads",
    "intermediate_size",
    "num_experts",
    "num_experts_per_tok",
    "num_shared_experts",
    "norm_topk_prob",
    "rms_norm_eps",
    "rope_theta",
    "tie_word_embeddings",
)
_KEY = "model.initialize_from"


def initial_model(settings: Settings, tokenizer: Tokenizer, dtype: torch.dtype) -> Transformer:
    """The model that a run starts from; random weights are drawn from torch's generator as it is.

    Args:
        tokenizer: the run's.
        dtype: what products run in.

    Raises:
        SettingsError: `model.initialize_from` names no such model, or one of other sizes or with another tokenizer.
    """
    source, recompute = settings.model.initialize_from, settings.train.activation_checkpointing
    if source is None:
        return initialize_weights(Transformer(settings.model, tokenizer.vocab_size, dtype, recompute))
    try:
        folder = find_olmoe(source)
        theirs, vocab_size = read_settings(folder)
        _check(settings.model, theirs, folder)
        _check_tokenizer(settings, tokenizer, vocab_size, folder)
        model = read_olmoe(folder, dtype, settings.model).train()
    except OlmoeError as error:
        raise SettingsError(f"{_KEY}: {error}") from None
    model.recompute = recompute
    return model


def _check(ours: ModelSettings, theirs: ModelSettings, folder: Path) -> None:
    if ours.experts == "dense":
        raise SettingsError(f"{_KEY}: {folder} has routed experts, the dense twin none: set model.experts=auto")
    different = {name: getattr(theirs, name) for name in _MUST_AGREE if getattr(ours, name) != getattr(theirs, name)}
    if different:
        names = {"key_value_heads": "num_key_value_heads"}
        remedy = " ".join(f"model.{names.get(name, name)}={str(value).lower()}" for name, value in different.items())
        raise SettingsError(f"{_KEY}: {folder} is a model of other settings: set {remedy}")


def _check_tokenizer(settings: Settings, tokenizer: Tokenizer, vocab_size: int, folder: Path) -> None:
    file = folder / "tokenizer.json"
    if settings.tokenizer.model is None:
        raise SettingsError(f"{_KEY}: its ids mean what its own tokenizer says: set tokenizer.model={file}")
    if tokenizer.vocab_size > vocab_size:
        raise SettingsError(
            f"{_KEY}: tokenizer.model has {tokenizer.vocab_size} ids, {folder} embeddings for {vocab_size}: "
            f"set tokenizer.model={file}"
        )
    if file.is_file() and load_tokenizer(file).model != tokenizer.model:
        raise SettingsError(f"{_KEY}: tokenizer.model is not the tokenizer of {folder}: set tokenizer.model={file}")
