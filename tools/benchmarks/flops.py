"""FLOPs of a training step, the machine's matmul rate, and the utilization that follows from both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.timing import Timing, clocked
from moetrain.models.transformer import Transformer
from moetrain.training.throughput import large_matmul


@dataclass(frozen=True)
class Flops:
    """FLOPs of forward and backward over some tokens."""

    parameters: float  # "6N": 6 per token and active parameter that takes part in a matmul
    attention: float  # matmuls with keys and values, which involve no parameter

    @property
    def both(self) -> float:
        return self.parameters + self.attention

    def utilization(self, seconds: float, matmul_rate: float) -> dict[str, float]:
        """The share of the matmul rate that a step of this length reaches, by both conventions."""
        return {"6n": self.parameters / seconds / matmul_rate, "with_attention": self.both / seconds / matmul_rate}


def step_flops(model: Transformer, tokens: int, spans_N2: torch.Tensor) -> Flops:
    """FLOPs of a step of ``tokens`` tokens in samples with the given (start, length).

    "6N" is the model's own count. Attention adds 12 * width * L per pair of tokens that attend to each other. That is
    half of the usual 12 * width * L * T per token, because attention is causal, and only within samples (after
    2204.02311, appendix B).
    """
    settings = model.settings
    lengths = spans_N2[:, 1].double()
    pairs = float((lengths * (lengths + 1) / 2).sum())
    width = settings.hidden_size
    return Flops(float(model.flops_per_token() * tokens), 12.0 * width * settings.num_hidden_layers * pairs)


class MatrixRate:
    """The rate of one large square matmul, measured a turn at a time so that it can be interleaved with others."""

    def __init__(self, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> None:
        multiply, self._operations = large_matmul(device, dtype)
        self._turn = clocked(lambda _: multiply(), device)
        self._turn(0)
        self.timing = Timing()

    def turn(self, products: int = 2) -> None:
        """Time ``products`` matmuls."""
        for product in range(products):
            self.timing.add(*self._turn(product))

    @property
    def flops(self) -> float:
        """FLOPs per second of the median matmul: 2 n^3 each."""
        return self._operations / self.timing.seconds


def format_utilization(result: dict[str, Any]) -> tuple[str, str, str]:
    """Cells of a table: matmul rate in GFLOP/s, utilization by "6N" and with attention."""
    shares = result["utilization"]
    return f"{result['matrix_flops'] / 1e9:,.0f}", f"{shares['6n']:.1%}", f"{shares['with_attention']:.1%}"
