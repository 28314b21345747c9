import inspect

import pytest
import torch
from torch.nn.attention.varlen import varlen_attn as installed_kernel

from moetrain.models.attention import attention, make_layout
from moetrain.models.attention_varlen import _varlen_arguments, sample_bounds
from tests.models import stand_ins

CPU = torch.device("cpu")
LENGTHS = {
    "one sample": [96],
    "many short": [3, 17, 5, 5, 1, 40, 16, 2, 30],
    "short and long": [200, 7, 260, 64, 193],
    "beyond the products": [1100, 40],
}


def inputs(lengths, dtype=torch.float32, heads=4, groups=4, width=8):
    torch.manual_seed(0)
    n = sum(lengths)
    q, k, v = (torch.randn(n, h, width, dtype=dtype, requires_grad=True) for h in (heads, groups, groups))
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return q, k, v, torch.tensor([*zip(starts, lengths, strict=True)])


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
    """What runs on CUDA alone runs here through stand-ins of the same signatures."""
    stand_ins.put_flash_attn(monkeypatch)
    stand_ins.put_varlen(monkeypatch)


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
    for mine, reference in zip(*results, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["sdpa", "batched"])
def test_bf16_is_close_to_fp32(backend):
    q, k, v, spans = inputs(LENGTHS["short and long"], torch.bfloat16)
    out = attention(q, k, v, make_layout(spans, backend, CPU), backend)
    exact = attention(q.float(), k.float(), v.float(), make_layout(spans, "reference", CPU), "reference")
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), exact, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("backend", ["sdpa", "batched", "varlen", "flash_attn", "reference"])
def test_samples_do_not_see_each_other_nor_what_comes(backend):
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
def test_torchs_kernel_as_it_was_in_2_10(monkeypatch, groups):
    stand_ins.put_varlen(monkeypatch, stand_ins.varlen_attn_2_10)
    q, k, v, spans = inputs(LENGTHS["many short"], groups=groups)
    mine = attention(q, k, v, make_layout(spans, "varlen", CPU), "varlen")
    torch.testing.assert_close(mine, attention(q, k, v, make_layout(spans, "reference", CPU), "reference"))


def test_the_installed_torchs_kernel_is_told_to_be_causal_in_its_own_words():
    signature = inspect.signature(installed_kernel)
    arguments, groups = _varlen_arguments(installed_kernel)
    signature.bind("q", "k", "v", "bounds", "bounds", 9, 9, **arguments)
    assert groups == ("enable_gqa" in signature.parameters)
    # Its stand-in takes nothing that it would not.
    assert set(inspect.signature(stand_ins.varlen_attn).parameters) >= {"window_size", *arguments}


def test_bounds_are_few_in_number_and_cover_every_token_whatever_the_order_of_spans():
    numbers = set()
    for count in range(1, 700):
        spans = torch.stack([torch.arange(count) * 3, torch.full((count,), 3)], 1)[torch.randperm(count)]
        bounds = sample_bounds(spans, CPU)
        assert bounds.dtype == torch.int32
        assert bounds[: count + 1].tolist() == list(range(0, 3 * count + 1, 3))
        assert (bounds[count:] == 3 * count).all()
        assert len(bounds) - 1 <= max(count + 8, 1.25 * count)
        numbers.add(len(bounds))
    assert len(numbers) == 22
