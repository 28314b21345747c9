"""Causal attention within samples: tokens of a packed row never attend to another sample.

One function with several backends, chosen by name. Each takes q, k, v of flattened rows and the `Layout` of their
samples. The tests compare each with `reference_attention`, forward and backward.

Shapes: N tokens (all rows of a micro-batch, flattened), H query heads, G key and value heads, d head width. In batched
matmuls: Z samples times heads, T tokens per sample.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain.models.attention_varlen import flash_attn_varlen, sample_bounds, torch_varlen
from moetrain.models.compilation import uncompiled

Backend = Literal["flash_attn", "varlen", "sdpa", "batched", "reference"]

# On CPU torch's fused kernel is slow on short samples: 8 samples of 512 tokens take 2.5 times as long as the blocked
# matmuls below, 64 samples of 64 tokens 5 times (forward and backward). The matmuls keep the attention probabilities
# for backward. For longer samples these would fill memory, so they use the kernel.
_LONGEST_BLOCKED = 1024
_BLOCK = 128  # queries per block
_LENGTH_MULTIPLE = 16  # padded lengths are multiples of this, so that shapes, and with them kernels, repeat


@dataclass(frozen=True)
class Group:
    """Samples of similar length as one padded batch, [count, length]."""

    tokens: Tensor  # int64, the token at each position (an arbitrary one at padding)
    inside: Tensor  # bool, False at padding


class HeadOrder(NamedTuple):
    """The permutation between rows [N * heads] (a token's heads adjacent) and padded groups. All int64."""

    gather: Tensor  # [padded], the row at each position of the groups (an arbitrary one at padding)
    scatter: Tensor  # [N * heads], the position of each row
    padding: Tensor  # the positions that are padding


@dataclass(frozen=True)
class Layout:
    """Where the samples of a micro-batch lie, in the form that a backend needs."""

    spans_N2: Tensor  # (start, length) of each sample, on the host
    groups: tuple[Group, ...] = ()  # for batched
    bounds: Tensor | None = None  # for varlen and flash_attn: `moetrain.models.attention_varlen.sample_bounds`
    longest: int = 0  # likewise: no sample is longer
    _by_head: dict[int, HeadOrder] = field(default_factory=dict)

    def by_head(self, heads: int) -> HeadOrder:
        """The order of the groups' rows, each group as [count, heads, length]. Built once for all layers."""
        if heads not in self._by_head:
            head = torch.arange(heads, device=self.groups[0].tokens.device)[:, None]
            gather = torch.cat([(group.tokens[:, None] * heads + head).flatten() for group in self.groups])
            inside = torch.cat([group.inside[:, None].expand(-1, heads, -1).flatten() for group in self.groups])
            position = torch.arange(len(gather), device=gather.device)
            scatter = torch.empty_like(gather[inside])
            scatter[gather[inside]] = position[inside]
            self._by_head[heads] = HeadOrder(gather=gather, scatter=scatter, padding=position[~inside])
        return self._by_head[heads]


def make_layout(spans_N2: Tensor, backend: Backend, device: torch.device, longest: int | None = None) -> Layout:
    """The layout for a backend.

    Args:
        spans_N2: (start, length) of each sample, on the host; together they cover every token once.
        longest: a length that no sample exceeds, by default that of the longest one. The same value in every layout
            lets compiled code be reused.
    """
    if backend in ("varlen", "flash_attn"):
        longest = longest or int(spans_N2[:, 1].max())
        return Layout(spans_N2, bounds=sample_bounds(spans_N2, device), longest=longest)
    if backend != "batched":
        return Layout(spans_N2)
    by_length: dict[int, list[list[int]]] = {}
    for span in spans_N2.tolist():
        by_length.setdefault(_padded_length(span[1]), []).append(span)
    groups = []
    for padded_length, spans in sorted(by_length.items()):
        offsets = torch.arange(padded_length)
        starts, lengths = torch.tensor(spans).T[:, :, None]
        inside = offsets < lengths
        tokens = torch.where(inside, starts + offsets, starts)
        groups.append(Group(tokens=tokens.to(device), inside=inside.to(device)))
    return Layout(spans_N2, groups=tuple(groups))


def _padded_length(length: int) -> int:
    """One of few distinct lengths, at most a quarter longer (or one `_LENGTH_MULTIPLE`)."""
    step = max(_LENGTH_MULTIPLE, 2 ** max(0, math.floor(math.log2(length)) - 2))
    return -(-length // step) * step


def attention(q_NHd: Tensor, k_NGd: Tensor, v_NGd: Tensor, layout: Layout, backend: Backend) -> Tensor:
    """Attention output [N, H, d] in q's dtype; each sample attends causally within itself only."""
    if backend == "reference":
        return reference_attention(q_NHd, k_NGd, v_NGd, layout.spans_N2)
    if backend == "sdpa":
        return _sdpa_per_sample(q_NHd, k_NGd, v_NGd, layout.spans_N2)
    if backend in ("varlen", "flash_attn"):
        assert layout.bounds is not None
        kernel = torch_varlen if backend == "varlen" else flash_attn_varlen
        return kernel(q_NHd, k_NGd, v_NGd, layout.bounds, layout.longest)
    return _batched(q_NHd, k_NGd, v_NGd, layout)


@uncompiled
def reference_attention(q_NHd: Tensor, k_NGd: Tensor, v_NGd: Tensor, spans_N2: Tensor) -> Tensor:
    """The definition, with a mask over all pairs of tokens: the reference that every backend is compared with."""
    sample_N = torch.empty(len(q_NHd), dtype=torch.int64)
    for sample, (start, length) in enumerate(spans_N2.tolist()):
        sample_N[start : start + length] = sample
    sample_N = sample_N.to(q_NHd.device)
    repeat = q_NHd.shape[1] // k_NGd.shape[1]
    k_NHd, v_NHd = k_NGd.repeat_interleave(repeat, 1), v_NGd.repeat_interleave(repeat, 1)
    scores_HNN = torch.einsum("nhd,mhd->hnm", q_NHd, k_NHd).float() / math.sqrt(q_NHd.shape[-1])
    visible_NN = (sample_N[:, None] == sample_N[None, :]).tril()
    probs_HNN = scores_HNN.masked_fill(~visible_NN, -torch.inf).softmax(-1)
    return torch.einsum("hnm,mhd->nhd", probs_HNN.to(v_NHd.dtype), v_NHd)


@uncompiled
def _sdpa_per_sample(q_NHd: Tensor, k_NGd: Tensor, v_NGd: Tensor, spans_N2: Tensor) -> Tensor:
    lengths = spans_N2[spans_N2[:, 0].argsort(), 1].tolist()
    samples = zip(q_NHd.split(lengths), k_NGd.split(lengths), v_NGd.split(lengths), strict=True)
    return torch.cat([_sdpa(*(x[None].transpose(1, 2) for x in qkv)).transpose(1, 2)[0] for qkv in samples])


def _sdpa(q_BHTd: Tensor, k_BGTd: Tensor, v_BGTd: Tensor) -> Tensor:
    grouped = q_BHTd.shape[1] != k_BGTd.shape[1]
    return F.scaled_dot_product_attention(q_BHTd, k_BGTd, v_BGTd, is_causal=True, enable_gqa=grouped)


@uncompiled
def _batched(q_NHd: Tensor, k_NGd: Tensor, v_NGd: Tensor, layout: Layout) -> Tensor:
    # Padding is at the end of each sample, where the causal mask hides it from every real token.
    padded = [_to_groups(x, layout) for x in (q_NHd, k_NGd, v_NGd)]
    outputs = []
    for group, q, k, v in zip(layout.groups, *padded, strict=True):
        count, length = group.tokens.shape
        if length > _LONGEST_BLOCKED:
            heads = (x.view(count, -1, length, x.shape[-1]) for x in (q, k, v))
            outputs.append(_sdpa(*heads).reshape(-1, q.shape[-1]))
        else:
            outputs.append(_blocked_attention(q, k, v).flatten(0, 1))
    order = layout.by_head(q_NHd.shape[1])
    return _FromGroups.apply(torch.cat(outputs), order).view_as(q_NHd)


def _to_groups(x_NHd: Tensor, layout: Layout) -> list[Tensor]:
    """Each group as [samples times heads, length, d], in one copy."""
    heads, width = x_NHd.shape[1:]
    padded = _ToGroups.apply(x_NHd.reshape(-1, width), layout.by_head(heads))
    groups = padded.split([group.tokens.numel() * heads for group in layout.groups])
    lengths = (group.tokens.shape[1] for group in layout.groups)
    return [group.view(-1, length, width) for group, length in zip(groups, lengths, strict=True)]


def _blocked_attention(q_YTd: Tensor, k_ZTd: Tensor, v_ZTd: Tensor) -> Tensor:
    repeat = len(q_YTd) // len(k_ZTd)
    if repeat > 1:
        k_ZTd, v_ZTd = k_ZTd.repeat_interleave(repeat, 0), v_ZTd.repeat_interleave(repeat, 0)
    return _BlockedAttention.apply(q_YTd * q_YTd.shape[-1] ** -0.5, k_ZTd, v_ZTd)


class _BlockedAttention(torch.autograd.Function):
    """Causal attention as batched matmuls: each block of queries with the keys up to the block's end.

    Nearly half of the scores of a full [T, T] matmul are never computed.
    """

    @staticmethod
    def forward(ctx: Any, q_ZTd: Tensor, k_ZTd: Tensor, v_ZTd: Tensor) -> Tensor:
        probs, out_ZTd = [], torch.empty_like(q_ZTd)
        mask = q_ZTd.new_full((_BLOCK, _BLOCK), -torch.inf).triu_(1)
        for start, end in _blocks(q_ZTd.shape[1]):
            scores = torch.bmm(q_ZTd[:, start:end], k_ZTd[:, :end].transpose(1, 2))
            scores[:, :, start:] += mask[: end - start, : end - start]
            probs.append(scores.softmax(-1))
            out_ZTd[:, start:end] = torch.bmm(probs[-1], v_ZTd[:, :end])
        ctx.save_for_backward(q_ZTd, k_ZTd, v_ZTd, out_ZTd, *probs)
        return out_ZTd

    @staticmethod
    def backward(ctx: Any, grad_ZTd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q_ZTd, k_ZTd, v_ZTd, out_ZTd, *probs = ctx.saved_tensors
        grad_q, grad_k, grad_v = torch.empty_like(q_ZTd), torch.zeros_like(k_ZTd), torch.zeros_like(v_ZTd)
        mean_ZT1 = (grad_ZTd * out_ZTd).sum(-1, keepdim=True)
        for (start, end), probs_block in zip(_blocks(q_ZTd.shape[1]), probs, strict=True):
            grad = grad_ZTd[:, start:end]
            grad_v[:, :end] += torch.bmm(probs_block.transpose(1, 2), grad)
            grad_scores = torch.bmm(grad, v_ZTd[:, :end].transpose(1, 2)).sub_(mean_ZT1[:, start:end]).mul_(probs_block)
            grad_q[:, start:end] = torch.bmm(grad_scores, k_ZTd[:, :end])
            grad_k[:, :end] += torch.bmm(grad_scores.transpose(1, 2), q_ZTd[:, start:end])
        return grad_q, grad_k, grad_v


def _blocks(length: int) -> list[tuple[int, int]]:
    return [(start, min(start + _BLOCK, length)) for start in range(0, length, _BLOCK)]


class _ToGroups(torch.autograd.Function):
    """Rows in the order of the groups. The backward of plain indexing scatters with additions; this one gathers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: HeadOrder) -> Tensor:
        ctx.save_for_backward(order.scatter)
        return x.index_select(0, order.gather)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # A padding position repeats a token. Only padding queries attend to it, and their gradient is zero.
        (scatter,) = ctx.saved_tensors
        return grad.index_select(0, scatter), None


class _FromGroups(torch.autograd.Function):
    """The inverse: rows in token order, without padding."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: HeadOrder) -> Tensor:
        ctx.save_for_backward(order.gather, order.padding)
        return x.index_select(0, order.scatter)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        gather, padding = ctx.saved_tensors
        return grad.index_select(0, gather).index_fill_(0, padding, 0.0), None
