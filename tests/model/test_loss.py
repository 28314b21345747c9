import pytest
import torch
import torch.nn.functional as F

from moetrain.model import loss as module
from moetrain.model.loss import cross_entropy


@pytest.mark.parametrize("held", [64 * 50, 10**9])
def test_chunks_equal_torchs_own_forward_and_backward(monkeypatch, held):
    monkeypatch.setattr(module, "_LOGITS_HELD", {"cpu": held})
    torch.manual_seed(0)
    target = torch.randint(0, 50, (150,))
    target[::7] = -100
    results = []
    for own in (True, False):
        torch.manual_seed(1)
        hidden = torch.randn(150, 16, requires_grad=True)
        weight = torch.randn(50, 16, requires_grad=True)
        if own:
            total, by_token = cross_entropy(hidden, weight, target)
        else:
            by_token = F.cross_entropy(hidden @ weight.T, target, reduction="none")
            total = by_token.sum()
        (total / 17).backward()
        results.append((total.detach(), by_token.detach(), hidden.grad, weight.grad))
    for mine, reference in zip(*results, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-5)


def test_ignored_targets_cost_nothing_and_without_gradients_none_are_formed():
    hidden, weight = torch.randn(5, 4), torch.randn(9, 4)
    with torch.no_grad():
        total, by_token = cross_entropy(hidden, weight, torch.full((5,), -100))
    assert total == 0
    assert (by_token == 0).all()


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_what_is_frozen_gets_no_gradient_and_the_other_the_same(frozen):
    torch.manual_seed(0)
    gradients = []
    for both in (True, False):
        torch.manual_seed(1)
        given = {"hidden": torch.randn(7, 4), "weight": torch.randn(9, 4)}
        for name, each in given.items():
            each.requires_grad_(both or name != frozen)
        cross_entropy(given["hidden"], given["weight"], torch.arange(7))[0].backward()
        gradients.append({name: each.grad for name, each in given.items()})
    trained = "weight" if frozen == "hidden" else "hidden"
    assert torch.equal(gradients[0][trained], gradients[1][trained])
    assert gradients[1][frozen] is None
