"""Attention kernels for CUDA that take samples of any length one after the other: torch's own, and flash-attn's.

Both are FlashAttention 2 and compute in bfloat16 or float16. flash-attn is imported when it is first used.

Shapes: N tokens, H query heads, G key and value heads, d width of a head, Q samples, those of length 0 included.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch

from moetrain.device_transfer import to_device


def sample_bounds(spans_N2: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Where each sample begins, and after the last one where it ends, int32 [Q + 1] on ``device``.

    Args:
        spans_N2: (start, length) of the samples, on the host, where they are counted without waiting for the device.

    Samples of length 0 at the end bring Q up to one of few numbers, so that what is compiled for a Q is used again.
    Kernels leave them at once, but each takes a look and, in backward, 128 rows of float32 queries: so as few as that.
    """
    starts = spans_N2[:, 0].sort().values
    end = spans_N2.sum(1).max()
    padding = _padded_count(len(starts)) + 1 - len(starts)
    return to_device(torch.cat([starts, end.expand(padding)]).to(torch.int32), device)


def _padded_count(count: int) -> int:
    """The next of four numbers to a doubling (and at first of multiples of 8): at most a quarter more from 32 on."""
    step = max(8, 2 ** (math.floor(math.log2(max(count, 1))) - 2))
    return -(-count // step) * step


def torch_varlen(
    q_NHd: torch.Tensor, k_NGd: torch.Tensor, v_NGd: torch.Tensor, bounds_Q: torch.Tensor, longest: int
) -> torch.Tensor:
    """torch's own kernel: causal attention within each sample, [N, H, d]."""
    from torch.nn.attention.varlen import varlen_attn

    arguments, groups = _varlen_arguments(varlen_attn)
    if q_NHd.shape[1] != k_NGd.shape[1]:
        if groups:
            arguments = {**arguments, "enable_gqa": True}
        else:
            repeat = q_NHd.shape[1] // k_NGd.shape[1]
            k_NGd, v_NGd = k_NGd.repeat_interleave(repeat, 1), v_NGd.repeat_interleave(repeat, 1)
    out = varlen_attn(q_NHd, k_NGd, v_NGd, bounds_Q, bounds_Q, longest, longest, **arguments)
    assert isinstance(out, torch.Tensor)  # more only where the softmax's sums are asked for
    return out


def _varlen_arguments(kernel: Any) -> tuple[dict[str, Any], bool]:
    """How this torch's kernel is told to be causal, and whether it takes fewer key than query heads.

    torch 2.10 has a flag ``is_causal``; later ones a window, which looks back without end and not ahead.
    """
    known = inspect.signature(kernel).parameters
    causal: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    return causal, "enable_gqa" in known


def flash_attn_varlen(
    q_NHd: torch.Tensor, k_NGd: torch.Tensor, v_NGd: torch.Tensor, bounds_Q: torch.Tensor, longest: int
) -> torch.Tensor:
    """flash-attn's kernel: causal attention within each sample, [N, H, d].

    Raises:
        ImportError: flash-attn is not installed, or not for this torch.
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
        # torch's kernel asks for itself; this one has to be told. Costs speed.
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
