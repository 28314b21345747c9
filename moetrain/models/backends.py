"""Which backends compute experts and attention: what the settings name, or for ``auto`` the first that works.

On CUDA a kernel must first give what the plain reference gives, forward and backward, at the model's own widths. That
takes about a second at the start of a run, and a kernel that is built for another card or another torch, or is simply
wrong, is refused with the reason instead of being trained with.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch

from moetrain.config import ModelSettings, SettingsError
from moetrain.models import attention, experts

# In the order in which they are tried.
_EXPERTS = {"cuda": ("megablocks", "grouped_mm", "loop"), "cpu": ("grouped_mm",)}
_ATTENTION = {"cuda": ("flash_attn", "varlen", "sdpa"), "cpu": ("batched",)}

_FOREIGN = ("megablocks", "flash_attn", "varlen")  # CUDA and half precision only
_PLAIN = ("loop", "sdpa", "batched", "reference", "dense")  # torch's everyday operations, or not a choice

_CHECKED_TOKENS = 384
# Largest difference from the reference, as a share of its largest value. Rounding to bf16 leaves about 0.01.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.04}


@dataclass(frozen=True)
class Backends:
    """The backends of a model, and a line on each about how it was chosen."""

    attention: attention.Backend
    experts: experts.Backend
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Shape:
    """What decides whether a kernel takes a model."""

    hidden_size: int
    heads: int
    groups: int
    num_experts: int
    num_experts_per_tok: int
    intermediate_size: int

    @property
    def head_width(self) -> int:
        return self.hidden_size // self.heads


def choose_backends(settings: ModelSettings, device: torch.device, dtype: torch.dtype) -> Backends:
    """The backends that a model of these settings computes with on a device, in ``dtype``; found out once a process.

    Raises:
        SettingsError: a backend that is named by the settings does not work here.
    """
    shape = Shape(
        settings.hidden_size,
        settings.num_attention_heads,
        settings.key_value_heads,
        settings.num_experts,
        settings.num_experts_per_tok,
        settings.intermediate_size,
    )
    return _choose(settings.attention, settings.experts, shape, device.type, dtype)


@functools.cache
def _choose(
    attention_setting: str, experts_setting: str, shape: Shape, device_type: str, dtype: torch.dtype
) -> Backends:
    device = torch.device(device_type)

    def checked_attention(name: str) -> None:
        check_attention(name, shape, device, dtype)

    def checked_experts(name: str) -> None:
        check_experts(name, shape, device, dtype)

    mixing, mixing_note = choose("attention", attention_setting, _ATTENTION[device_type], checked_attention)
    routed, routed_note = choose("experts", experts_setting, _EXPERTS[device_type], checked_experts)
    if device_type == "cuda":
        torch.cuda.empty_cache()  # what the checks held
    return Backends(cast(attention.Backend, mixing), cast(experts.Backend, routed), (mixing_note, routed_note))


@functools.cache
def call_uncompiled() -> None:
    """Have torch.compile call, not trace, those backends whose shapes follow the data or that it does not know.

    Done when something is compiled: to mark them beforehand would load the compiler, over a second, for nothing.
    """
    for module, names in (
        (attention, ("_batched", "_sdpa_by_document", "reference_attention")),
        (experts, ("_loop", "_grouped_apart", "tiled_experts", "megablocks_experts")),
    ):
        for name in names:
            setattr(module, name, torch.compiler.disable(getattr(module, name)))


def choose(what: str, setting: str, candidates: Sequence[str], check: Callable[[str], None]) -> tuple[str, str]:
    """The backend of ``model.WHAT`` and a line about it: the one named by the setting, or the first that passes.

    Args:
        candidates: what ``auto`` tries, in order; the last is plain torch and passes anywhere.
        check: raises for a backend that does not work here.

    Raises:
        SettingsError: the named backend does not pass.
    """
    if setting != "auto":
        if reason := _refusal(setting, check):
            raise SettingsError(f"model.{what}={setting}: {reason}: set model.{what}=auto, which takes what works")
        return setting, f"{what}: {setting}, as set"
    refused: list[tuple[str, str]] = []
    for name in candidates:
        reason = _refusal(name, check)
        if reason is None:
            return name, f"{what}: {name}" + "".join(f"; {other} not taken: {why}" for other, why in refused)
        refused.append((name, reason))
    raise AssertionError(f"no backend of {what} works: {refused}")


def _refusal(name: str, check: Callable[[str], None]) -> str | None:
    """Why a backend does not work here, in one line, or None."""
    try:
        check(name)
    except UnusableError as error:
        return str(error)
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed"
    except Exception as error:  # anything that a package built elsewhere may raise; it becomes the reason
        return " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return None


class UnusableError(ValueError):
    """A backend that cannot be used here, or gives something else than the reference."""


def _require(name: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there is something to check; raises where a backend cannot work."""
    if name in _FOREIGN and device.type != "cuda":
        raise UnusableError("it needs a CUDA device")
    if name in _FOREIGN and dtype == torch.float32:
        raise UnusableError("it computes in bf16, and train.precision gives fp32")
    return name in _FOREIGN or (device.type == "cuda" and name not in _PLAIN)


def check_experts(name: str, shape: Shape, device: torch.device, dtype: torch.dtype) -> None:
    """Compare a backend of the experts with the loop, forward and all gradients, with one expert left without tokens.

    Raises:
        UnusableError: it cannot be used here or is wrong; or whatever error it comes with itself.
    """
    if _require(name, device, dtype):
        compare_experts(cast(experts.Backend, name), shape, device, dtype)


@torch.inference_mode(False)
@torch.enable_grad()  # also where the first to ask reads without gradients
def compare_experts(name: experts.Backend, shape: Shape, device: torch.device, dtype: torch.dtype) -> None:
    """Raise `UnusableError` where a backend differs from the loop in float32."""
    size, width, count, top = shape.hidden_size, shape.intermediate_size, shape.num_experts, shape.num_experts_per_tok
    draw = torch.Generator(device).manual_seed(0)

    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=draw, device=device).to(dtype)

    scores = torch.rand(_CHECKED_TOKENS, count, generator=draw, device=device)
    if count > top:
        scores[:, count // 2] = -1.0
    index, weight = scores.topk(top).indices, torch.rand(_CHECKED_TOKENS, top, generator=draw, device=device)
    gate_up, down = normal(count, 2 * width, size) / size**0.5, normal(count, size, width) / width**0.5
    x, grad = normal(_CHECKED_TOKENS, size), normal(_CHECKED_TOKENS, size)

    def through(backend: experts.Backend, compute: torch.dtype) -> list[torch.Tensor]:
        leaves = [tensor.to(compute).detach().requires_grad_() for tensor in (x, gate_up, down)]
        chosen = weight.detach().requires_grad_()
        out = experts.experts(leaves[0], index, chosen, leaves[1], leaves[2], backend)
        return [out.detach(), *torch.autograd.grad(out, [*leaves, chosen], grad.to(compute))]

    leaves = ("the input", "gate_up_proj", "down_proj", "the routing weights")
    names = ("output", *(f"gradient of {leaf}" for leaf in leaves))
    _compare(names, through(name, dtype), through("loop", torch.float32), _TOLERANCE[dtype])


def check_attention(name: str, shape: Shape, device: torch.device, dtype: torch.dtype) -> None:
    """Compare a backend of attention with its definition, forward and all gradients, on samples of uneven length.

    Raises:
        UnusableError: it cannot be used here or is wrong; or whatever error it comes with itself.
    """
    if _require(name, device, dtype):
        compare_attention(cast(attention.Backend, name), shape, device, dtype)


@torch.inference_mode(False)
@torch.enable_grad()
def compare_attention(name: attention.Backend, shape: Shape, device: torch.device, dtype: torch.dtype) -> None:
    """Raise `UnusableError` where a backend differs from the definition in float32."""
    lengths = torch.tensor([129, 1, 64, 3, 187])  # _CHECKED_TOKENS in all
    spans = torch.stack([lengths.cumsum(0) - lengths, lengths], 1)
    draw = torch.Generator(device).manual_seed(0)
    q, k, v, grad = (
        torch.randn(_CHECKED_TOKENS, heads, shape.head_width, generator=draw, device=device).to(dtype)
        for heads in (shape.heads, shape.groups, shape.groups, shape.heads)
    )

    def through(backend: attention.Backend, compute: torch.dtype) -> list[torch.Tensor]:
        leaves = [tensor.to(compute).detach().requires_grad_() for tensor in (q, k, v)]
        layout = attention.make_layout(spans, backend, device, longest=2 * _CHECKED_TOKENS)
        out = attention.attention(leaves[0], leaves[1], leaves[2], layout, backend)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(compute))]

    names = ("output", "gradient of the queries", "gradient of the keys", "gradient of the values")
    _compare(names, through(name, dtype), through("reference", torch.float32), _TOLERANCE[dtype])


def _compare(
    names: Sequence[str], mine: Sequence[torch.Tensor], exact: Sequence[torch.Tensor], tolerance: float
) -> None:
    for name, one, other in zip(names, mine, exact, strict=True):
        error = float((one.float() - other).abs().max() / other.abs().max())
        if not error <= tolerance:  # NaN is no match
            raise UnusableError(f"its {name} is off by {error:.2g} of the largest value")
