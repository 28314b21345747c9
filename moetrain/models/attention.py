"""Causal attention within samples: tokens of a packed row never see another sample.

One function, several backends, chosen by name. Each takes q, k, v of flattened rows and a `Layout` of the samples
among them, and is compared with `reference_attention` in the tests, forward and backward.

Shapes: N tokens (all rows of a micro-batch, flattened), H query heads, G key and value heads, d width of a head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F

from moetrain.models.attention_varlen import flash_attn_varlen, sample_bounds, torch_varlen

Backend = Literal["flash_attn", "varlen", "sdpa", "batched", "reference"]

# On CPU the fused kernel is slow on short samples: 8 of 512 tokens take 2.5 times the plain products in blocks below,
# 64 of 64 tokens 5 times (forward and backward). The products keep the probabilities, so the longest samples, for
# which those would fill memory, still take the kernel.
_LONGEST_PRODUCTS = 1024
_BLOCK = 128  # queries that are multiplied with the keys before them at once
_MULTIPLE = 16  # padded lengths are multiples of this, so that shapes, and with them kernels, repeat


@dataclass(frozen=True)
class Group:
    """Samples of similar length, laid side by side, [count, length]."""

    tokens: torch.Tensor  # int64, the token at each place (any token where padding)
    inside: torch.Tensor  # bool, whether it is no padding


class HeadOrder(NamedTuple):
    """How rows of one head each, [N * heads], the heads of a token side by side, are laid out. All int64."""

    gather: torch.Tensor  # [laid out], the row at each place (any row where padding)
    scatter: torch.Tensor  # [N * heads], the place of each row
    padding: torch.Tensor  # the places that are padding


@dataclass(frozen=True)
class Layout:
    """Where the samples of a micro-batch lie, and the order that puts samples of like length side by side."""

    spans_N2: torch.Tensor
    groups: tuple[Group, ...] = ()
    bounds: torch.Tensor | None = None  # int32 on the device, see `moetrain.models.attention_varlen.sample_bounds`
    longest: int = 0  # no sample is longer
    _by_head: dict[int, HeadOrder] = field(default_factory=dict)

    def by_head(self, heads: int) -> HeadOrder:
        """Groups one after the other, each as [count, heads, length]; made once for all layers."""
        if heads not in self._by_head:
            number = torch.arange(heads, device=self.groups[0].tokens.device)[:, None]
            gather = torch.cat([(group.tokens[:, None] * heads + number).flatten() for group in self.groups])
            inside = torch.cat([group.inside[:, None].expand(-1, heads, -1).flatten() for group in self.groups])
            places = torch.arange(len(gather), device=gather.device)
            scatter = torch.empty_like(gather[inside])
            scatter[gather[inside]] = places[inside]
            self._by_head[heads] = HeadOrder(gather, scatter, places[~inside])
        return self._by_head[heads]


def make_layout(spans_N2: torch.Tensor, backend: Backend, device: torch.device, longest: int | None = None) -> Layout:
    """The layout of samples given as (start, length) on the host; together they cover every token once.

    Args:
        longest: a length that no sample exceeds, the same for all layouts so that what is compiled for it is used
            again; without it, that of the longest sample.
    """
    if backend in ("varlen", "flash_attn"):
        longest = longest or int(spans_N2[:, 1].max())
        return Layout(spans_N2, bounds=sample_bounds(spans_N2, device), longest=longest)
    if backend != "batched":
        return Layout(spans_N2)
    spans = spans_N2.tolist()
    padded: dict[int, list[tuple[int, int]]] = {}
    for start, length in spans:
        padded.setdefault(_padded_length(length), []).append((start, length))
    groups = []
    for length, members in sorted(padded.items()):
        offsets = torch.arange(length)
        starts = torch.tensor([start for start, _ in members])[:, None]
        inside = offsets < torch.tensor([own for _, own in members])[:, None]
        groups.append(Group(torch.where(inside, starts + offsets, starts).to(device), inside.to(device)))
    return Layout(spans_N2, tuple(groups))


def _padded_length(length: int) -> int:
    """Few distinct lengths, at most an eighth longer than asked for (or one step of `_MULTIPLE`)."""
    step = max(_MULTIPLE, 2 ** max(0, math.floor(math.log2(length)) - 2))
    return -(-length // step) * step


def attention(
    q_NHd: torch.Tensor, k_NGd: torch.Tensor, v_NGd: torch.Tensor, layout: Layout, backend: Backend
) -> torch.Tensor:
    """Attention output [N, H, d], in the type of q; each sample attends causally to itself alone."""
    if backend == "reference":
        return reference_attention(q_NHd, k_NGd, v_NGd, layout.spans_N2)
    if backend == "sdpa":
        return _sdpa_by_document(q_NHd, k_NGd, v_NGd, layout.spans_N2)
    if backend in ("varlen", "flash_attn"):
        assert layout.bounds is not None
        kernel = torch_varlen if backend == "varlen" else flash_attn_varlen
        return kernel(q_NHd, k_NGd, v_NGd, layout.bounds, layout.longest)
    return _batched(q_NHd, k_NGd, v_NGd, layout)


def reference_attention(
    q_NHd: torch.Tensor, k_NGd: torch.Tensor, v_NGd: torch.Tensor, spans_N2: torch.Tensor
) -> torch.Tensor:
    """The plain definition, by a mask over all tokens: what every backend is compared with."""
    owner = torch.empty(len(q_NHd), dtype=torch.int64)
    for number, (start, length) in enumerate(spans_N2.tolist()):
        owner[start : start + length] = number
    owner = owner.to(q_NHd.device)
    repeat = q_NHd.shape[1] // k_NGd.shape[1]
    k_NHd, v_NHd = k_NGd.repeat_interleave(repeat, 1), v_NGd.repeat_interleave(repeat, 1)
    scores_HNN = torch.einsum("nhd,mhd->hnm", q_NHd, k_NHd).float() / math.sqrt(q_NHd.shape[-1])
    seen_NN = (owner[:, None] == owner[None, :]).tril()
    probs_HNN = scores_HNN.masked_fill(~seen_NN, -torch.inf).softmax(-1)
    return torch.einsum("hnm,mhd->nhd", probs_HNN.to(v_NHd.dtype), v_NHd)


def _sdpa_by_document(
    q_NHd: torch.Tensor, k_NGd: torch.Tensor, v_NGd: torch.Tensor, spans_N2: torch.Tensor
) -> torch.Tensor:
    lengths = spans_N2[:, 1].tolist()
    order = torch.argsort(spans_N2[:, 0]).tolist()
    split = [lengths[n] for n in order]
    parts = zip(q_NHd.split(split), k_NGd.split(split), v_NGd.split(split), strict=True)
    return torch.cat([_causal(*(x[None].transpose(1, 2) for x in part)).transpose(1, 2)[0] for part in parts])


def _causal(q_BHTd: torch.Tensor, k_BGTd: torch.Tensor, v_BGTd: torch.Tensor) -> torch.Tensor:
    grouped = q_BHTd.shape[1] != k_BGTd.shape[1]
    return F.scaled_dot_product_attention(q_BHTd, k_BGTd, v_BGTd, is_causal=True, enable_gqa=grouped)


def _batched(q_NHd: torch.Tensor, k_NGd: torch.Tensor, v_NGd: torch.Tensor, layout: Layout) -> torch.Tensor:
    # Padding stands at the end of each sample, where causal attention hides it from every real token.
    laid_out = [_lay_out(x, layout) for x in (q_NHd, k_NGd, v_NGd)]
    outputs = []
    for group, q, k, v in zip(layout.groups, *laid_out, strict=True):
        count, length = group.tokens.shape
        if length > _LONGEST_PRODUCTS:
            heads = (x.view(count, -1, length, x.shape[-1]) for x in (q, k, v))
            outputs.append(_causal(*heads).reshape(-1, q.shape[-1]))
        else:
            outputs.append(_products(q, k, v).flatten(0, 1))
    order = layout.by_head(q_NHd.shape[1])
    return _PutBack.apply(torch.cat(outputs), *order).view_as(q_NHd)


def _lay_out(x_NHd: torch.Tensor, layout: Layout) -> list[torch.Tensor]:
    """Each group as [samples times heads, length, d], in one copy."""
    heads, width = x_NHd.shape[1:]
    order = layout.by_head(heads)
    laid_out = _LayOut.apply(x_NHd.reshape(-1, width), order.gather, order.scatter)
    parts = laid_out.split([group.tokens.numel() * heads for group in layout.groups])
    lengths = (group.tokens.shape[1] for group in layout.groups)
    return [part.view(-1, length, width) for part, length in zip(parts, lengths, strict=True)]


def _products(q_YTd: torch.Tensor, k_ZTd: torch.Tensor, v_ZTd: torch.Tensor) -> torch.Tensor:
    repeat = len(q_YTd) // len(k_ZTd)
    if repeat > 1:
        k_ZTd, v_ZTd = k_ZTd.repeat_interleave(repeat, 0), v_ZTd.repeat_interleave(repeat, 0)
    return _CausalProducts.apply(q_YTd * q_YTd.shape[-1] ** -0.5, k_ZTd, v_ZTd)


class _CausalProducts(torch.autograd.Function):
    """Causal attention as batched products, a block of queries at a time with the keys up to its end.

    Blocks leave out half of the work that a full square of scores would do. Shapes: [Z samples times heads, T, d].
    """

    @staticmethod
    def forward(ctx: Any, q_ZTd: torch.Tensor, k_ZTd: torch.Tensor, v_ZTd: torch.Tensor) -> torch.Tensor:
        probs, out_ZTd = [], torch.empty_like(q_ZTd)
        to_come = q_ZTd.new_full((_BLOCK, _BLOCK), -torch.inf).triu_(1)
        for start, end in _blocks(q_ZTd.shape[1]):
            scores = torch.bmm(q_ZTd[:, start:end], k_ZTd[:, :end].transpose(1, 2))
            scores[:, :, start:] += to_come[: end - start, : end - start]
            probs.append(scores.softmax(-1))
            out_ZTd[:, start:end] = torch.bmm(probs[-1], v_ZTd[:, :end])
        ctx.save_for_backward(q_ZTd, k_ZTd, v_ZTd, out_ZTd, *probs)
        return out_ZTd

    @staticmethod
    def backward(ctx: Any, grad_ZTd: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
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


class _LayOut(torch.autograd.Function):
    """Tokens in laid-out order. Plain indexing's backward adds into places one by one; this one reads them."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, gather: torch.Tensor, scatter: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(scatter)
        return x.index_select(0, gather)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        # A padding place repeats a token, but causal attention leaves its gradient to padding queries, which have none.
        (scatter,) = ctx.saved_tensors
        return grad.index_select(0, scatter), None, None


class _PutBack(torch.autograd.Function):
    """The inverse: laid-out tokens in their own order, padding dropped."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, gather: torch.Tensor, scatter: torch.Tensor, padding: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(gather, padding)
        return x.index_select(0, scatter)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        gather, padding = ctx.saved_tensors
        return grad.index_select(0, gather).index_fill_(0, padding, 0.0), None, None, None
