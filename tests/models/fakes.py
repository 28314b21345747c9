"""Fakes, in pure torch, of packages that need CUDA: they let the adapters be tested on any machine.

Each has the signature, the layouts and the requirements (contiguous, sizes on the host) of the original.
`test_megablocks.py` compares megablocks' with the package itself, where it is installed.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import nn


def modules(**content: Any) -> dict[str, ModuleType]:
    """Modules by dotted name (``__`` stands for a dot), each an attribute of its package."""
    found: dict[str, ModuleType] = {}
    for path, names in content.items():
        parts = path.split("__")
        for depth in range(1, len(parts) + 1):
            name = ".".join(parts[:depth])
            if name not in found:
                found[name] = ModuleType(name)
                if depth > 1:
                    setattr(found[".".join(parts[: depth - 1])], parts[depth - 1], found[name])
        vars(found[".".join(parts)]).update(names)
    return found


def put(monkeypatch: Any, **content: Any) -> None:
    """Make these modules importable until the test ends."""
    for name, module in modules(**content).items():
        monkeypatch.setitem(sys.modules, name, module)


# grouped_gemm 0.3.0


class GroupedGemm(torch.autograd.Function):
    """Each group of rows of ``a`` times its own matrix of ``b``."""

    @staticmethod
    def forward(ctx: Any, a: torch.Tensor, b: torch.Tensor, batch_sizes: torch.Tensor, trans_b: bool) -> torch.Tensor:
        ctx.save_for_backward(a, b, batch_sizes)
        ctx.trans_b = trans_b
        return gmm(a, b, batch_sizes, trans_b=trans_b)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        a, b, batch_sizes = ctx.saved_tensors
        grad = grad.contiguous()
        left, right = (grad, a) if ctx.trans_b else (a, grad)
        return (
            gmm(grad, b, batch_sizes, trans_b=not ctx.trans_b) if ctx.needs_input_grad[0] else None,
            gmm(left, right, batch_sizes, trans_a=True) if ctx.needs_input_grad[1] else None,
            None,
            None,
        )


def gmm(
    a: torch.Tensor,
    b: torch.Tensor,
    batch_sizes: torch.Tensor,
    trans_a: bool = False,
    trans_b: bool = False,
    c: torch.Tensor | None = None,
) -> torch.Tensor:
    """The backend's matmul; fails where the original fails."""
    assert batch_sizes.device.type == "cpu"
    assert batch_sizes.dtype == torch.int64
    assert batch_sizes.ndim == 1
    assert a.is_contiguous()
    assert b.is_contiguous()
    assert a.dtype == b.dtype
    groups = a.split(batch_sizes.tolist())
    if trans_a:
        out = torch.stack([x.T @ y for x, y in zip(groups, b.split(batch_sizes.tolist()), strict=True)])
    else:
        out = torch.cat([x @ (w.T if trans_b else w) for x, w in zip(groups, b, strict=True)])
    return out if c is None else c.copy_(out)


def _grouped_gemm(a: torch.Tensor, b: torch.Tensor, batch_sizes: torch.Tensor, trans_b: bool = False) -> torch.Tensor:
    return GroupedGemm.apply(a, b, batch_sizes, trans_b)


def put_grouped_gemm(monkeypatch: Any) -> None:
    put(monkeypatch, grouped_gemm__ops={"gmm": _grouped_gemm}, grouped_gemm__backend={"gmm": gmm})


# megablocks 0.10.0: its compiled module, and the two classes that the adapter uses


def _sort(x: torch.Tensor, end_bit: int, x_out: torch.Tensor, iota_out: torch.Tensor) -> None:
    values, order = (x % 2**end_bit).sort(stable=True)
    x_out.copy_(values)
    iota_out.copy_(order)


def _inclusive_cumsum(x: torch.Tensor, dim: int, out: torch.Tensor) -> None:
    out.copy_(x.cumsum(dim))


def _histogram(x: torch.Tensor, bins: int) -> torch.Tensor:
    return torch.bincount(x, minlength=bins).int()


def put_megablocks_ops(monkeypatch: Any) -> None:
    put(monkeypatch, megablocks_ops={"sort": _sort, "inclusive_cumsum": _inclusive_cumsum, "histogram": _histogram})


@dataclass
class Arguments:
    """The fields that the adapter sets, with megablocks' defaults."""

    hidden_size: int = 1024
    ffn_hidden_size: int = 4096
    moe_num_experts: int = 1
    moe_top_k: int = 1
    mlp_type: str = "mlp"
    mlp_impl: str = "sparse"
    activation_fn: Any = None
    bias: bool = True
    return_bias: bool = True
    fp16: bool = True
    bf16: bool = False
    device: Any = None
    moe_loss_weight: float = 0.1
    moe_zloss_weight: float = 0


class ParallelDroplessMLP(nn.Module):
    """Sorts tokens by expert, applies ``mlp``, and adds up the weighted outputs."""

    def __init__(self, args: Arguments) -> None:
        super().__init__()
        assert (args.mlp_type, args.mlp_impl) == ("glu", "grouped")
        assert args.bf16
        assert not args.fp16
        assert not args.bias
        assert not args.moe_loss_weight  # otherwise it would collect scores in a global list
        self.args = args
        self.mlp = nn.Module()
        for name in ("w1", "v1", "w2"):
            shape = (args.moe_num_experts * args.ffn_hidden_size, args.hidden_size)
            self.mlp.register_parameter(name, nn.Parameter(torch.empty(shape, device=args.device)))

    def forward(
        self, x: torch.Tensor, scores: torch.Tensor, expert_weights: torch.Tensor, top_experts: torch.Tensor
    ) -> torch.Tensor:
        top_k, chosen = self.args.moe_top_k, top_experts.flatten().int()
        order = chosen.sort(stable=True).indices
        tokens_per_expert = _histogram(chosen, self.args.moe_num_experts)
        out = self.mlp(x.view(-1, x.shape[-1])[order // top_k], tokens_per_expert)
        weighted = out.float() * expert_weights.flatten()[order, None].float()
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order))
        return weighted.to(x.dtype)[back].view(-1, top_k, x.shape[-1]).sum(1).view(x.shape)


def put_megablocks(monkeypatch: Any) -> None:
    put_grouped_gemm(monkeypatch)
    put(
        monkeypatch,
        megablocks__layers__arguments={"Arguments": Arguments},
        megablocks__layers__dmoe={"ParallelDroplessMLP": ParallelDroplessMLP},
    )


# Variable-length attention: flash-attn 2.8.3's, and torch's with the arguments of 2.10 and of later versions


def _by_sample(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor, longest: int, causal: bool
) -> torch.Tensor:
    """The kernels' result and requirements; without ``causal`` each token attends to its whole sample."""
    assert bounds.dtype == torch.int32
    assert q.shape[-1] % 8 == 0
    lengths = bounds.diff().tolist()
    assert bounds[0] == 0
    assert sum(lengths) == len(q)
    assert 0 <= min(lengths) <= max(lengths) <= longest
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    outputs = []
    for qs, ks, vs in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        scores = torch.einsum("nhd,mhd->hnm", qs, ks).float() * q.shape[-1] ** -0.5
        if causal:
            scores = scores.masked_fill(torch.ones(scores.shape[1:], dtype=torch.bool).triu(1), -torch.inf)
        outputs.append(torch.einsum("hnm,mhd->nhd", scores.softmax(-1).to(v.dtype), vs))
    return torch.cat(outputs)


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: torch.Tensor | None = None,
) -> torch.Tensor:
    assert torch.equal(cu_seqlens_q, cu_seqlens_k)
    assert max_seqlen_q == max_seqlen_k
    return _by_sample(q, k, v, cu_seqlens_q, max_seqlen_q, causal)


def varlen_attn_2_10(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
    return_aux: Any = None,
) -> torch.Tensor:
    assert query.shape[1] == key.shape[1]
    return _by_sample(query, key, value, cu_seq_q, max_q, is_causal)


def varlen_attn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    num_splits: int | None = None,
) -> torch.Tensor:
    assert enable_gqa or query.shape[1] == key.shape[1]
    return _by_sample(query, key, value, cu_seq_q, max_q, window_size == (-1, 0))


def put_flash_attn(monkeypatch: Any) -> None:
    put(monkeypatch, flash_attn={"flash_attn_varlen_func": flash_attn_varlen_func})


def put_varlen(monkeypatch: Any, kernel: Any = varlen_attn) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
