import pytest
import torch

from moetrain.models import experts as module
from moetrain.models import experts_cpu
from moetrain.models.experts import experts


def run(backend, dtype, index, num_experts=6):
    torch.manual_seed(0)
    n, k = index.shape
    x = torch.randn(n, 32).to(dtype).requires_grad_()  # drawn in float32: the same numbers in any type
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


@pytest.mark.parametrize("index", CASES.values(), ids=CASES)
def test_grouped_mm_equals_the_loop_forward_and_backward(index):
    for mine, reference in zip(run("grouped_mm", torch.float32, index), run("loop", torch.float32, index), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("index", CASES.values(), ids=CASES)
def test_grouped_mm_as_on_cuda_equals_the_loop(index, monkeypatch):
    monkeypatch.setattr(module, "cpu_experts", module.grouped_experts)
    for mine, reference in zip(run("grouped_mm", torch.float32, index), run("loop", torch.float32, index), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 64, 10**6])
@pytest.mark.parametrize("index", CASES.values(), ids=CASES)
def test_tiles_of_any_size_give_the_same(index, rows, monkeypatch):
    monkeypatch.setattr(experts_cpu, "_TILE_ROWS", rows)
    for mine, reference in zip(run("grouped_mm", torch.float32, index), run("loop", torch.float32, index), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-5)


def test_weights_may_be_wider_than_what_is_multiplied():
    torch.manual_seed(0)
    x, index, weight = torch.randn(40, 32).bfloat16(), choices(40, 2), torch.rand(40, 2)
    gate_up, down = torch.randn(6, 32, 32) / 6, torch.randn(6, 32, 16) / 4
    for backend in ("grouped_mm", "loop"):
        wide = [part.clone().requires_grad_() for part in (gate_up, down)]
        cast = [part.bfloat16().requires_grad_() for part in (gate_up, down)]
        outputs = [experts(x, index, weight, *parts, backend) for parts in (wide, cast)]
        torch.testing.assert_close(*outputs, rtol=0, atol=0)
        for output in outputs:
            output.sum().backward()
        for one, other in zip(wide, cast, strict=True):
            torch.testing.assert_close(one.grad, other.grad.float(), rtol=0, atol=0)


def test_bf16_is_close_to_fp32():
    for mine, exact in zip(
        run("grouped_mm", torch.bfloat16, CASES["even"]), run("loop", torch.float32, CASES["even"]), strict=True
    ):
        scale = exact.abs().max()
        torch.testing.assert_close(mine.float() / scale, exact / scale, rtol=0, atol=0.02)


def test_no_token_is_dropped_however_uneven_the_load():
    index = torch.cat([torch.full((1000, 1), 2), torch.full((1, 1), 5)])
    out = run("grouped_mm", torch.float32, index)[0]
    assert (out.abs().sum(1) > 0).all()
