"""Which backends compute attention and the experts: the one a setting names, or for ``auto`` the first that works.

On CUDA a kernel must first reproduce the reference, forward and backward, at the model's own shapes. This takes about a
second at the start of a run. A kernel that was built for another GPU or another torch, or that is wrong, is rejected
with the reason instead of being trained with.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from moetrain.config import ModelSettings, SettingsError
from moetrain.models import attention, experts
from moetrain.models.experts_grouped import ROW_BYTES, unaligned_width

# In the order in which ``auto`` tries them; the last is plain torch and works anywhere.
_EXPERTS = {"cuda": ("megablocks", "grouped_mm", "loop"), "cpu": ("grouped_mm", "loop")}
_ATTENTION = {"cuda": ("flash_attn", "varlen", "sdpa"), "cpu": ("batched",)}

_KERNELS = ("megablocks", "flash_attn", "varlen")  # CUDA and half precision only
_PLAIN = ("loop", "sdpa", "batched", "reference", "dense")  # ordinary torch operations, or nothing to choose: no check

_CHECKED_TOKENS = 384
# Largest difference from the reference, relative to its largest value. Rounding to bf16 gives about 0.01.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.04}


@dataclass(frozen=True)
class Backends:
    """The backends of a model, and one line on each about how it was chosen."""

    attention: attention.Backend
    experts: experts.Backend
    notes: tuple[str, ...] = ()


class UnusableError(ValueError):
    """A backend that does not run here, or whose results differ from the reference."""


@functools.cache
def choose_backends(settings: ModelSettings, device: torch.device, dtype: torch.dtype) -> Backends:
    """The backends of a model with these settings on a device, with matmuls in ``dtype``. Checked once per process.

    Raises:
        SettingsError: a backend that the settings name does not work here.
    """

    def check(name: str) -> None:
        check_backend(name, settings, device, dtype)

    mixer, mixer_note = choose("attention", settings.attention, _ATTENTION[device.type], check)
    routed, routed_note = choose("experts", settings.experts, _EXPERTS[device.type], check)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # memory of the checks
    return Backends(
        attention=cast(attention.Backend, mixer),
        experts=cast(experts.Backend, routed),
        notes=(mixer_note, routed_note),
    )


def choose(what: str, setting: str, candidates: Sequence[str], check: Callable[[str], None]) -> tuple[str, str]:
    """The backend of ``model.WHAT`` and a line about it: the one that the setting names, or the first that passes.

    Args:
        candidates: what ``auto`` tries, in order.
        check: raises for a backend that does not work here.

    Raises:
        SettingsError: the named backend does not pass.
    """
    if setting != "auto":
        if reason := _rejection(setting, check):
            raise SettingsError(f"model.{what}={setting}: {reason}: set model.{what}=auto, which takes what works")
        return setting, f"{what}: {setting}, as set"
    rejected = ""
    for name in candidates:
        reason = _rejection(name, check)
        if reason is None:
            return name, f"{what}: {name}{rejected}"
        rejected += f"; {name} not taken: {reason}"
    raise AssertionError(f"no backend of {what} works{rejected}")


def _rejection(name: str, check: Callable[[str], None]) -> str | None:
    """Why a backend does not work here, in one line, or None."""
    try:
        check(name)
    except UnusableError as error:
        return str(error)
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed"
    except Exception as error:  # whatever a kernel that was built elsewhere raises is the reason
        return " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return None


def check_backend(name: str, settings: ModelSettings, device: torch.device, dtype: torch.dtype) -> None:
    """Check that a backend runs on a device and, if it is a kernel, that it reproduces the reference.

    Raises:
        UnusableError: it does not run here, or its results are wrong. Errors of the backend itself are passed on.
    """
    if name in _KERNELS and device.type != "cuda":
        raise UnusableError("it needs a CUDA device")
    if name in _KERNELS and dtype == torch.float32:
        raise UnusableError("it computes in bf16, and train.precision gives fp32")
    if name == "grouped_mm" and (width := unaligned_width(settings, dtype)):
        multiple = ROW_BYTES // dtype.itemsize
        raise UnusableError(f"model.{width}={getattr(settings, width)} is no multiple of {multiple}, as it needs")
    if device.type == "cuda" and name not in _PLAIN:
        compare = compare_attention if name in _ATTENTION["cuda"] else compare_experts
        compare(name, settings, device, dtype)


@torch.inference_mode(False)
@torch.enable_grad()  # the first forward pass of a process may be one without gradients
def compare_experts(name: str, settings: ModelSettings, device: torch.device, dtype: torch.dtype) -> None:
    """Compare a backend of the experts with the loop in float32: output and all gradients, one expert without tokens.

    Raises:
        UnusableError: they differ.
    """
    size, width = settings.hidden_size, settings.intermediate_size
    count, top = settings.num_experts, settings.num_experts_per_tok
    draw = torch.Generator(device).manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=draw, device=device).to(dtype)

    scores = torch.rand(_CHECKED_TOKENS, count, generator=draw, device=device)
    if count > top:
        scores[:, count // 2] = -1.0
    index, weight = scores.topk(top).indices, torch.rand(_CHECKED_TOKENS, top, generator=draw, device=device)
    gate_up, down = normal(count, 2 * width, size) / size**0.5, normal(count, size, width) / width**0.5
    x, grad = normal(_CHECKED_TOKENS, size), normal(_CHECKED_TOKENS, size)

    def compute(backend: experts.Backend, dtype: torch.dtype) -> list[Tensor]:
        x_, gate_up_, down_ = (tensor.to(dtype).detach().requires_grad_() for tensor in (x, gate_up, down))
        weight_ = weight.detach().requires_grad_()
        out = experts.experts(x_, index, weight_, gate_up_, down_, backend)
        return [out.detach(), *torch.autograd.grad(out, [x_, gate_up_, down_, weight_], grad.to(dtype))]

    leaves = ("the input", "gate_up_proj", "down_proj", "the routing weights")
    _compare(leaves, compute(cast(experts.Backend, name), dtype), compute("loop", torch.float32), dtype)


@torch.inference_mode(False)
@torch.enable_grad()
def compare_attention(name: str, settings: ModelSettings, device: torch.device, dtype: torch.dtype) -> None:
    """Compare a backend of attention with the reference in float32: output and gradients, samples of uneven length.

    Raises:
        UnusableError: they differ.
    """
    lengths = torch.tensor([129, 1, 64, 3, 187])  # _CHECKED_TOKENS in all
    spans = torch.stack([lengths.cumsum(0) - lengths, lengths], 1)
    draw = torch.Generator(device).manual_seed(0)
    heads, groups = settings.num_attention_heads, settings.key_value_heads
    q, k, v, grad = (
        torch.randn(_CHECKED_TOKENS, count, settings.head_width, generator=draw, device=device).to(dtype)
        for count in (heads, groups, groups, heads)
    )

    def compute(backend: attention.Backend, dtype: torch.dtype) -> list[Tensor]:
        leaves = [tensor.to(dtype).detach().requires_grad_() for tensor in (q, k, v)]
        layout = attention.make_layout(spans, backend, device, longest=2 * _CHECKED_TOKENS)
        out = attention.attention(leaves[0], leaves[1], leaves[2], layout, backend)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]

    leaves = ("the queries", "the keys", "the values")
    _compare(leaves, compute(cast(attention.Backend, name), dtype), compute("reference", torch.float32), dtype)


def _compare(leaves: Sequence[str], found: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype) -> None:
    names = ("output", *(f"gradient of {leaf}" for leaf in leaves))
    for name, one, other in zip(names, found, expected, strict=True):
        error = float((one.float() - other).abs().max() / other.abs().max())
        if not error <= _TOLERANCE[dtype]:  # also NaN
            raise UnusableError(f"its {name} is off by {error:.2g} of the largest value")
