"""Variable-length attention kernels for CUDA: torch's own and flash-attn's.

Both are FlashAttention 2 and compute in bfloat16 or float16. flash-attn is imported when first used.

Shapes: N tokens, H query heads, G key and value heads, d head width, Q samples, including those of length 0.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor

from moetrain.device_transfer import to_device


def sample_bounds(spans_N2: Tensor, device: torch.device) -> Tensor:
    """The start of each sample and the end of the last one (``cu_seqlens``), int32 [Q + 1] on ``device``.

    Samples of length 0 at the end pad Q to one of few values, so that code compiled for one Q is reused. The kernels
    skip them, but each costs a thread block and, in backward, 128 rows of float32 queries: so there are few of them.

    Args:
        spans_N2: (start, length) of the samples, on the host: no synchronization.
    """
    starts = spans_N2[:, 0].sort().values
    end = spans_N2.sum(1).max()
    padding = _padded_count(len(starts)) + 1 - len(starts)
    return to_device(torch.cat([starts, end.expand(padding)]).to(torch.int32), device)


def _padded_count(count: int) -> int:
    """The next of four values per octave (multiples of 8 at first): at most a quarter more from 32 on."""
    step = max(8, 2 ** (math.floor(math.log2(max(count, 1))) - 2))
    return -(-count // step) * step


def torch_varlen(q_NHd: Tensor, k_NGd: Tensor, v_NGd: Tensor, bounds_Q: Tensor, longest: int) -> Tensor:
    """torch's kernel: causal attention within each sample, [N, H, d]."""
    from torch.nn.attention.varlen import varlen_attn

    arguments, groups = _varlen_arguments(varlen_attn)
    if q_NHd.shape[1] != k_NGd.shape[1]:
        if groups:
            arguments = {**arguments, "enable_gqa": True}
        else:
            repeat = q_NHd.shape[1] // k_NGd.shape[1]
            k_NGd, v_NGd = k_NGd.repeat_interleave(repeat, 1), v_NGd.repeat_interleave(repeat, 1)
    out = varlen_attn(q_NHd, k_NGd, v_NGd, bounds_Q, bounds_Q, longest, longest, **arguments)
    assert isinstance(out, Tensor)  # a tuple only with return_aux
    return out


def _varlen_arguments(kernel: Any) -> tuple[dict[str, Any], bool]:
    """The arguments that make the installed torch's kernel causal, and whether it supports grouped-query attention.

    torch 2.10 has a flag ``is_causal``, later versions a window: unlimited to the left, 0 to the right.
    """
    parameters = inspect.signature(kernel).parameters
    causal: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in parameters else {"is_causal": True}
    return causal, "enable_gqa" in parameters


def flash_attn_varlen(q_NHd: Tensor, k_NGd: Tensor, v_NGd: Tensor, bounds_Q: Tensor, longest: int) -> Tensor:
    """flash-attn's kernel: causal attention within each sample, [N, H, d].

    Raises:
        ImportError: flash-attn is not installed, or was built for another torch.
    """
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        q_NHd,
        k_NGd,
        v_NGd,
        cu_seqlens_q=bounds_Q,
        cu_seqlens_k=bounds_Q,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        causal=True,
        # Slower. torch's kernel reads this flag itself; flash-attn takes it as an argument.
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
