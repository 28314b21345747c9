import pytest
import torch
import torch.nn.functional as F

from moetrain.models.elementwise import rms_norm, rotate


def compare(own, reference, *inputs):
    results = []
    for function in (own, reference):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        out = function(*leaves)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def compiled(function):
    """Traced, with its operations as they are."""
    torch.compiler.reset()
    return torch.compile(function, backend="eager")


@pytest.mark.parametrize("transform", [lambda function: function, compiled], ids=["eager", "compiled"])
def test_rms_norm_equals_torchs_forward_and_backward(transform):
    torch.manual_seed(0)
    x = torch.randn(50, 24) * torch.logspace(-3, 2, 50)[:, None]
    x[7] = 0
    compare(
        transform(lambda x, w: rms_norm(x, w, 1e-5)), lambda x, w: F.rms_norm(x, (24,), w, 1e-5), x, torch.randn(24)
    )


@pytest.mark.parametrize("transform", [lambda function: function, compiled], ids=["eager", "compiled"])
def test_rotation_equals_complex_multiplication_forward_and_backward(transform):
    torch.manual_seed(0)
    angles = torch.randn(30, 1, 6)

    def reference(x):
        rotated = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([rotated.real, rotated.imag], -1)

    compare(transform(lambda x: rotate(x, angles.cos(), angles.sin())), reference, torch.randn(30, 4, 12))
