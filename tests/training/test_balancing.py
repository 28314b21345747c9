import pytest
import torch

from moetrain.models.transformer import Routing
from moetrain.training.balancing import Balancing
from tests.optim.test_adamw import small_model


def routing(probs_LE, load_LE):
    nothing = torch.zeros(0)
    return Routing(nothing, nothing, probs_LE, load_LE, nothing, nothing, nothing)


def test_balancing_loss_is_one_at_balance_and_the_number_of_experts_at_collapse():
    model, settings = small_model(balance_scope="micro_batch")
    balancing = Balancing(model, settings)
    even = routing(torch.full((2, 4), 25.0), torch.full((2, 4), 50.0))
    assert float(balancing.loss(even, 100)) == pytest.approx(1.0)
    one = torch.tensor([[100.0, 0, 0, 0]] * 2)
    assert float(balancing.loss(routing(one, one), 100)) == pytest.approx(4.0)


def test_a_micro_batch_of_padding_alone_adds_nothing():
    model, settings = small_model(balance_scope="micro_batch")
    assert float(Balancing(model, settings).loss(routing(torch.zeros(2, 4), torch.zeros(2, 4)), 100)) == 0


def test_global_scope_compares_with_the_whole_previous_step():
    model, settings = small_model(balance_scope="global")
    balancing = Balancing(model, settings)
    probs = torch.tensor([[40.0, 20, 20, 20]] * 2)
    assert float(balancing.loss(routing(probs, probs), 100)) == pytest.approx(1.0)
    balancing.after_step(torch.tensor([[8.0, 0, 0, 0], [2, 2, 2, 2]]), torch.tensor(True))
    assert float(balancing.loss(routing(probs, probs), 100)) == pytest.approx((4 * 0.4 + 1) / 2)
    fresh = Balancing(model, settings)
    fresh.load_state(balancing.state())
    assert torch.equal(fresh.share_LE, balancing.share_LE)


def test_loss_free_bias_moves_towards_experts_with_less():
    model, settings = small_model(balancing="bias", bias_update_rate=0.01)
    balancing = Balancing(model, settings)
    balancing.after_step(torch.tensor([[4.0, 0, 2, 2], [2, 2, 2, 2]]), torch.tensor(True))
    biases = [layer.mlp.gate.selection_bias for layer in model.model.layers]
    assert biases[0].tolist() == pytest.approx([-0.01, 0.01, 0, 0])
    assert biases[1].tolist() == [0, 0, 0, 0]
