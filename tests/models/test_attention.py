import inspect

import pytest
import torch
from torch.nn.attention.varlen import varlen_attn as installed_kernel

from moetrain.models.attention import attention, make_layout
from moetrain.models.attention_varlen import _varlen_arguments, sample_bounds
from tests.models import fakes

CPU = torch.device("cpu")
LENGTHS = {
    "one sample": [96],
    "many short": [3, 17, 5, 5, 1, 40, 16, 2, 30],
    "short and long": [200, 7, 260, 64, 193],
    "longer than the blocked matmuls take": [1100, 40],
}


def inputs(lengths, dtype=torch.float32, heads=4, groups=4, width=8):
    torch.manual_seed(0)
    n = sum(lengths)
    q, k, v = (torch.randn(n, h, width, dtype=dtype, requires_grad=True) for h in (heads, groups, groups))
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return q, k, v, torch.tensor([*zip(starts, lengths, strict=True)])


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
    """Kernels that need CUDA are fakes with the same signatures."""
    fakes.put_flash_attn(monkeypatch)
    fakes.put_varlen(monkeypatch)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("backend", ["sdpa", "batched", "varlen", "flash_attn"])
def test_backends_equal_the_reference_forward_and_backward(backend, groups, lengths):
    results = []
    for name in (backend, "reference"):
        q, k, v, spans = inputs(lengths, groups=groups)
        out = attention(q, k, v, make_layout(spans, name, CPU), name)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        results.append((out.detach(), q.grad, k.grad, v.grad))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["sdpa", "batched"])
def test_bf16_is_close_to_fp32(backend):
    q, k, v, spans = inputs(LENGTHS["short and long"], torch.bfloat16)
    out = attention(q, k, v, make_layout(spans, backend, CPU), backend)
    exact = attention(q.float(), k.float(), v.float(), make_layout(spans, "reference", CPU), "reference")
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), exact, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("backend", ["sdpa", "batched", "varlen", "flash_attn", "reference"])
def test_tokens_attend_neither_to_other_samples_nor_to_later_tokens(backend):
    q, k, v, spans = inputs([20, 30, 14])
    layout = make_layout(spans, backend, CPU)
    before = attention(q, k, v, layout, backend)
    changed = v.detach().clone()
    changed[35] += 1
    difference = (attention(q, k, changed, layout, backend) - before).abs().amax((1, 2))
    assert (difference[:35] == 0).all()
    assert (difference[50:] == 0).all()
    assert (difference[35:50] > 0).all()


@pytest.mark.parametrize("groups", [4, 2])
def test_torchs_kernel_with_the_arguments_of_2_10(monkeypatch, groups):
    fakes.put_varlen(monkeypatch, fakes.varlen_attn_2_10)
    q, k, v, spans = inputs(LENGTHS["many short"], groups=groups)
    found = attention(q, k, v, make_layout(spans, "varlen", CPU), "varlen")
    torch.testing.assert_close(found, attention(q, k, v, make_layout(spans, "reference", CPU), "reference"))


def test_the_arguments_of_the_installed_torchs_kernel_are_valid():
    signature = inspect.signature(installed_kernel)
    arguments, groups = _varlen_arguments(installed_kernel)
    signature.bind("q", "k", "v", "bounds", "bounds", 9, 9, **arguments)
    assert groups == ("enable_gqa" in signature.parameters)
    # The fake has these parameters too.
    assert set(inspect.signature(fakes.varlen_attn).parameters) >= {"window_size", *arguments}


def test_bounds_have_few_lengths_and_cover_every_token_for_any_order_of_spans():
    sizes = set()
    for count in range(1, 700):
        spans = torch.stack([torch.arange(count) * 3, torch.full((count,), 3)], 1)[torch.randperm(count)]
        bounds = sample_bounds(spans, CPU)
        assert bounds.dtype == torch.int32
        assert bounds[: count + 1].tolist() == list(range(0, 3 * count + 1, 3))
        assert (bounds[count:] == 3 * count).all()
        assert len(bounds) - 1 <= max(count + 8, 1.25 * count)
        sizes.add(len(bounds))
    assert len(sizes) == 22
