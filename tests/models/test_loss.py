import pytest
import torch
import torch.nn.functional as F

from moetrain.models import loss as module
from moetrain.models.loss import cross_entropy


@pytest.mark.parametrize(("chunk", "float32"), [(64 * 50, 7 * 50), (64 * 50, 1), (10**9, 10**9)])
def test_chunks_equal_torchs_own_forward_and_backward(monkeypatch, chunk, float32):
    monkeypatch.setattr(module, "_CHUNK_LOGITS_CPU", chunk)
    monkeypatch.setattr(module, "_FLOAT32_LOGITS_CPU", float32)
    torch.manual_seed(0)
    target = torch.randint(0, 50, (150,))
    target[::7] = -100
    results = []
    for own in (True, False):
        torch.manual_seed(1)
        hidden = torch.randn(150, 16, requires_grad=True)
        weight = torch.randn(50, 16, requires_grad=True)
        if own:
            total, per_token, _ = cross_entropy(hidden, weight, target)
        else:
            per_token = F.cross_entropy(hidden @ weight.T, target, reduction="none")
            total = per_token.sum()
        (total / 17).backward()
        results.append((total.detach(), per_token.detach(), hidden.grad, weight.grad))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_ignored_targets_have_loss_0_also_without_gradients():
    hidden, weight = torch.randn(5, 4), torch.randn(9, 4)
    with torch.no_grad():
        total, per_token, _ = cross_entropy(hidden, weight, torch.full((5,), -100))
    assert total == 0
    assert (per_token == 0).all()


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_input_gets_no_gradient_and_the_other_an_unchanged_one(frozen):
    torch.manual_seed(0)
    gradients = []
    for both in (True, False):
        torch.manual_seed(1)
        inputs = {"hidden": torch.randn(7, 4), "weight": torch.randn(9, 4)}
        for name, tensor in inputs.items():
            tensor.requires_grad_(both or name != frozen)
        cross_entropy(inputs["hidden"], inputs["weight"], torch.arange(7))[0].backward()
        gradients.append({name: tensor.grad for name, tensor in inputs.items()})
    trained = "weight" if frozen == "hidden" else "hidden"
    assert torch.equal(gradients[0][trained], gradients[1][trained])
    assert gradients[1][frozen] is None


def test_matmuls_in_bf16_leave_the_weight_and_its_gradient_in_float32():
    torch.manual_seed(0)
    hidden = torch.randn(70, 16, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(90, 16).bfloat16().float().requires_grad_()
    target = torch.randint(0, 90, (70,))
    total, per_token, _ = cross_entropy(hidden, weight, target)
    total.backward()
    exact_hidden, exact_weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    exact = F.cross_entropy(exact_hidden @ exact_weight.T, target, reduction="none")
    exact.sum().backward()
    assert weight.grad.dtype == per_token.dtype == torch.float32
    torch.testing.assert_close(per_token.double(), exact, rtol=0.01, atol=0.03)  # logits are rounded to bf16
    for found, expected in ((hidden.grad, exact_hidden.grad), (weight.grad, exact_weight.grad)):
        torch.testing.assert_close(found.double(), expected, rtol=0.05, atol=0.02 * float(expected.abs().max()))


def test_a_loss_of_any_size_is_finite_and_exact():
    hidden = torch.tensor([[300.0], [-300.0], [0.0]])
    weight = torch.tensor([[1.0], [-1.0], [0.5]])
    _, per_token, _ = cross_entropy(hidden, weight, torch.tensor([1, 1, 2]))
    torch.testing.assert_close(per_token, torch.tensor([600.0, 0.0, torch.tensor(3.0).log()]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_entropy_is_that_of_the_prediction_and_changes_nothing_else(monkeypatch, dtype):
    monkeypatch.setattr(module, "_CHUNK_LOGITS_CPU", 1)
    monkeypatch.setattr(module, "_FLOAT32_LOGITS_CPU", 7 * 50)
    torch.manual_seed(0)
    hidden, weight = (torch.randn(size, 16).to(dtype) for size in (150, 50))
    target = torch.randint(0, 50, (150,))
    target[::7] = -100
    found = []
    for asked in (False, True):
        inputs = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        total, per_token, entropy = cross_entropy(*inputs, target, entropy=asked)
        total.backward()
        found.append((per_token, *(each.grad for each in inputs), entropy))
    (*without, none), (*with_entropy, entropy) = found
    assert none is None
    assert all(torch.equal(a, b) for a, b in zip(without, with_entropy, strict=True))
    expected = torch.distributions.Categorical(logits=(hidden @ weight.T).float()).entropy()
    torch.testing.assert_close(entropy, torch.where(target >= 0, expected, 0.0), rtol=1e-4, atol=1e-4)
    assert not entropy.requires_grad
