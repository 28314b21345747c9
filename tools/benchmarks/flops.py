"""Floating-point operations that training needs, by the two usual conventions."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moetrain.models.transformer import Transformer


@dataclass(frozen=True)
class Flops:
    """Operations of forward and backward over some tokens."""

    parameters: float  # 6 for each token and active parameter that takes part in products
    attention: float  # of the products with keys and values, which no parameter counts

    @property
    def both(self) -> float:
        return self.parameters + self.attention


def step_flops(model: Transformer, tokens: int, spans_N2: torch.Tensor) -> Flops:
    """Operations of a step of ``tokens`` tokens in samples of the given (start, length).

    "6N" is the model's own count. "With attention" adds 12 * width * L for each pair of tokens that see
    each other: half of what the usual 12 * width * L * T a token counts, for attention is causal, and only within
    samples (after 2204.02311, appendix B).
    """
    settings = model.settings
    lengths = spans_N2[:, 1].double()
    pairs = float((lengths * (lengths + 1) / 2).sum())
    width = settings.hidden_size
    return Flops(float(model.operations_a_token() * tokens), 12.0 * width * settings.num_hidden_layers * pairs)
