"""Initial weights: normal with one standard deviation, as OLMoE's; norms are one.

Drawn on the CPU, one parameter after the other, whatever the device and however many ranks: a seed gives the same bits
everywhere. A rank that keeps a shard of each parameter never holds more than one unsharded parameter.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moetrain.config import ModelSettings
from moetrain.models.transformer import RMSNorm, Transformer


def initial_weights(settings: ModelSettings, vocab_size: int) -> Iterator[tuple[str, Tensor]]:
    """Each parameter's name and unsharded initial value, float32 on the CPU, in the order of ``named_parameters()``.

    Drawn from torch's default CPU generator when the iterator gets there. Norms draw nothing, and a tied output layer
    is not a parameter of its own. The selection bias, a buffer, is not among them: it starts at zero.
    """
    with torch.device("meta"):
        model = Transformer(settings, vocab_size, torch.float32)
    for name, parameter in model.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, RMSNorm):
            yield name, torch.ones(parameter.shape)
            continue
        weight = torch.empty(parameter.shape)
        if module is model.model.embed_tokens:
            weight.normal_()  # discarded: `nn.Embedding` used to draw these first, and later draws must stay the same
        yield name, weight.normal_(0.0, settings.initializer_range)


@torch.no_grad()
def initialize_weights(model: Transformer) -> Transformer:
    """Give an unsharded model its initial weights, in place; returns the model."""
    for name, weight in initial_weights(model.settings, model.lm_head.out_features):
        model.get_parameter(name).copy_(weight)
    return model
