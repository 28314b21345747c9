"""The model before its first step: with random weights, or those of a transformers folder."""

from __future__ import annotations

from pathlib import Path

import torch

from moetrain.config import ModelSettings, Settings, SettingsError
from moetrain.data.tokenizer import Tokenizer, load_tokenizer
from moetrain.distributed.mesh import ParallelLayout
from moetrain.distributed.sharding import materialize, parallelize
from moetrain.models.hf import OlmoeError, find_olmoe, olmoe_weights, read_settings
from moetrain.models.initialization import initial_weights
from moetrain.models.router import record_weights
from moetrain.models.transformer import Transformer

# Settings that the weights depend on.
_MUST_AGREE = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "key_value_heads",
    "head_width",
    "qk_norm",
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
_ONE_RANK = ParallelLayout()


def initial_model(
    settings: Settings, tokenizer: Tokenizer, dtype: torch.dtype, layout: ParallelLayout = _ONE_RANK
) -> Transformer:
    """The model that a run starts from, on the layout's device; each rank has the part that its layout gives it.

    Random weights are drawn from torch's default generator. A rank never holds more than its shard and one unsharded
    parameter.

    Args:
        tokenizer: the run's.
        dtype: of the matmuls.

    Raises:
        SettingsError: `model.initialize_from` names no such model, or one of another shape or with another tokenizer.
    """
    vocab_size, folder = settings.tokenizer.rows(tokenizer.vocab_size), None
    try:
        if settings.model.initialize_from is not None:
            folder = find_olmoe(settings.model.initialize_from)
            folder_settings, vocab_size = read_settings(folder)
            _check(settings.model, folder_settings, folder)
            _check_tokenizer(settings, tokenizer, vocab_size, folder)
        with torch.device("meta"):
            model = Transformer(settings.model, vocab_size, dtype, settings.train.activation_checkpointing)
        record_weights(model, settings.monitor.weights)
        parallelize(model, layout)
        weights = olmoe_weights(folder, settings.model) if folder else initial_weights(settings.model, vocab_size)
        materialize(model, layout.device, weights)
    except OlmoeError as error:
        raise SettingsError(f"{_KEY}: {error}") from None
    return model


def _check(settings: ModelSettings, found: ModelSettings, folder: Path) -> None:
    if settings.experts == "dense":
        raise SettingsError(f"{_KEY}: {folder} has routed experts, the dense twin none: set model.experts=auto")
    different = {name: getattr(found, name) for name in _MUST_AGREE if getattr(settings, name) != getattr(found, name)}
    if different:
        names = {"key_value_heads": "num_key_value_heads", "head_width": "head_dim"}
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
