import pytest
import torch

from moetrain.models import experts as module
from moetrain.models import experts_cpu
from moetrain.models.experts import experts


def run(backend, dtype, index, num_experts=6):
    torch.manual_seed(0)
    n, k = index.shape
    x = torch.randn(n, 32).to(dtype).requires_grad_()  # drawn in float32: the same numbers in any dtype
    weight = torch.rand(n, k, requires_grad=True)
    gate_up = (torch.randn(num_experts, 2 * 16, 32) / 6).to(dtype).requires_grad_()
    down = (torch.randn(num_experts, 32, 16) / 4).to(dtype).requires_grad_()
    out = experts(x, index, weight, gate_up, down, backend)
    (out.float() * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return [out.detach(), x.grad, weight.grad, gate_up.grad, down.grad]


def choices(n, k, num_experts=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, num_experts, generator=generator).topk(k).indices


CASES = {
    "even": choices(100, 2),
    "all experts": choices(40, 6),
    "one choice": choices(33, 1),
    "some experts without tokens": choices(50, 2, num_experts=3),
    "all to one": torch.full((70, 1), 4),
    "a single token": choices(1, 2),
}


def assert_equals_the_loop(backend, index):
    """Output and all gradients, in float32."""
    for found, expected in zip(run(backend, torch.float32, index), run("loop", torch.float32, index), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def assert_bf16_is_close(backend):
    index = CASES["even"]
    for found, exact in zip(run(backend, torch.bfloat16, index), run("loop", torch.float32, index), strict=True):
        scale = exact.abs().max()
        torch.testing.assert_close(found.float() / scale, exact / scale, rtol=0, atol=0.02)


@pytest.mark.parametrize("index", CASES.values(), ids=CASES)
def test_grouped_mm_equals_the_loop_forward_and_backward(index):
    assert_equals_the_loop("grouped_mm", index)


@pytest.mark.parametrize("index", CASES.values(), ids=CASES)
def test_grouped_mm_as_on_cuda_equals_the_loop(index, monkeypatch):
    monkeypatch.setattr(module, "cpu_experts", module.grouped_experts)
    assert_equals_the_loop("grouped_mm", index)


@pytest.mark.parametrize("rows", [1, 64, 10**6])
@pytest.mark.parametrize("index", CASES.values(), ids=CASES)
def test_tiles_of_any_size_give_the_same(index, rows, monkeypatch):
    monkeypatch.setattr(experts_cpu, "_TILE_ROWS", rows)
    assert_equals_the_loop("grouped_mm", index)


def test_weights_may_be_wider_than_the_matmuls():
    torch.manual_seed(0)
    x, index, weight = torch.randn(40, 32).bfloat16(), choices(40, 2), torch.rand(40, 2)
    gate_up, down = torch.randn(6, 32, 32) / 6, torch.randn(6, 32, 16) / 4
    for backend in ("grouped_mm", "loop"):
        wide = [projection.clone().requires_grad_() for projection in (gate_up, down)]
        cast = [projection.bfloat16().requires_grad_() for projection in (gate_up, down)]
        outputs = [experts(x, index, weight, *projections, backend) for projections in (wide, cast)]
        torch.testing.assert_close(*outputs, rtol=0, atol=0)
        for output in outputs:
            output.sum().backward()
        for one, other in zip(wide, cast, strict=True):
            torch.testing.assert_close(one.grad, other.grad.float(), rtol=0, atol=0)


def test_bf16_is_close_to_fp32():
    assert_bf16_is_close("grouped_mm")


def test_no_token_is_dropped_however_uneven_the_load():
    index = torch.cat([torch.full((1000, 1), 2), torch.full((1, 1), 5)])
    out = run("grouped_mm", torch.float32, index)[0]
    assert (out.abs().sum(1) > 0).all()
