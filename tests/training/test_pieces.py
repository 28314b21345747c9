import math

import pytest
import torch

from moetrain.config import ModelSettings, OptimSettings
from moetrain.model.transformer import Routing, Transformer
from moetrain.training.balancing import Balancing
from moetrain.training.curves import Interval, expert_load
from moetrain.training.optimizer import load_optimizer_state, make_optimizer, optimizer_state
from moetrain.training.schedule import learning_rate
from moetrain.training.step import StepStatistics, update


def rates(steps=100, **changes):
    settings = OptimSettings(**({"learning_rate": 1.0, "warmup_steps": 10, "min_learning_rate_ratio": 0.1} | changes))
    return [learning_rate(step, steps, settings) for step in range(1, steps + 1)]


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_warm_up_is_linear_and_the_peak_is_reached_once_it_is_over(schedule):
    values = rates(schedule=schedule)
    assert values[:10] == pytest.approx([(n + 1) / 11 for n in range(10)])
    assert max(values) <= 1.0
    assert values[10] == pytest.approx(1.0, abs=0.01)


def test_schedules_end_where_they_should():
    assert rates(schedule="cosine")[-1] == pytest.approx(0.1)
    assert rates(schedule="cosine")[54] == pytest.approx(0.55, abs=0.01)
    wsd = rates(schedule="wsd", decay_share=0.2)
    assert wsd[10:80] == pytest.approx([1.0] * 70)
    assert wsd[89] == pytest.approx(0.55)
    assert wsd[-1] == pytest.approx(0.1)
    assert rates(schedule="constant")[-1] == 1.0


def test_a_run_shorter_than_its_warm_up_still_ends_at_the_final_rate():
    assert rates(steps=5, schedule="cosine")[-1] == pytest.approx(0.1)
    assert rates(steps=1, schedule="cosine") == pytest.approx([0.1])


def small_model(**changes):
    torch.manual_seed(0)
    settings = ModelSettings(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_experts=4, num_experts_per_tok=2, **changes
    )
    return Transformer(settings, 50, torch.float32), settings


def test_norms_and_embeddings_do_not_decay_and_all_else_does():
    model, _ = small_model()
    optimizer = make_optimizer(model, OptimSettings(weight_decay=0.3))
    decayed, plain = ({id(p) for p in group["params"]} for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    for name, parameter in model.named_parameters():
        assert (id(parameter) in plain) == ("norm" in name or "embed" in name), name
        assert (id(parameter) in plain) != (id(parameter) in decayed)


def test_optimizer_state_goes_and_comes_back_by_name():
    model, _ = small_model()
    optimizer = make_optimizer(model, OptimSettings())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    state = optimizer_state(model, optimizer)
    other, _ = small_model()
    again = make_optimizer(other, OptimSettings())
    load_optimizer_state(other, again, state)
    restored = optimizer_state(other, again)
    assert restored.keys() == state.keys()
    assert all(torch.equal(restored[key], state[key]) for key in state)
    del state["lm_head.weight.exp_avg"]
    with pytest.raises(ValueError, match=r"the optimizer state of lm_head\.weight is missing"):
        load_optimizer_state(other, again, state)


def test_gradients_are_clipped_to_the_norm():
    model, _ = small_model()
    optimizer = make_optimizer(model, OptimSettings())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    norm, finite = update(model, optimizer, 1e-3, 1.0, torch.tensor(1.0))
    assert finite
    assert float(norm) == pytest.approx(math.sqrt(sum(p.numel() for p in model.parameters())), rel=1e-5)
    assert all(p.grad is None for p in model.parameters())
    moments = torch.cat([s["exp_avg"].flatten() for s in optimizer.state.values()])
    assert float(moments.norm()) == pytest.approx(0.1, rel=1e-4)  # (1 - beta1) times a gradient of norm 1


@pytest.mark.parametrize("broken", ["gradient", "loss"])
def test_a_gradient_or_loss_that_is_not_finite_changes_nothing(broken):
    model, _ = small_model()
    optimizer = make_optimizer(model, OptimSettings())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    if broken == "gradient":
        model.lm_head.weight.grad[0, 0] = math.nan
    _, finite = update(model, optimizer, 1e-3, 1.0, torch.tensor(1.0 if broken == "gradient" else math.inf))
    assert not finite
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


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
    balancing.after_step(torch.tensor([[8.0, 0, 0, 0], [2, 2, 2, 2]]))
    assert float(balancing.loss(routing(probs, probs), 100)) == pytest.approx((4 * 0.4 + 1) / 2)
    fresh = Balancing(model, settings)
    fresh.load_state(balancing.state())
    assert torch.equal(fresh.share_LE, balancing.share_LE)


def test_loss_free_bias_moves_towards_experts_with_less():
    model, settings = small_model(balancing="bias", bias_update_rate=0.01)
    balancing = Balancing(model, settings)
    balancing.after_step(torch.tensor([[4.0, 0, 2, 2], [2, 2, 2, 2]]))
    biases = [layer.mlp.gate.selection_bias for layer in model.model.layers]
    assert biases[0].tolist() == pytest.approx([-0.01, 0.01, 0, 0])
    assert biases[1].tolist() == [0, 0, 0, 0]


def test_expert_load_by_hand():
    load = expert_load(torch.tensor([[10.0, 10, 10, 10], [40, 0, 0, 0]]).double())
    assert load["experts/load_cv"] == pytest.approx(math.sqrt(3) / 2)
    assert load["experts/load_cv/worst"] == pytest.approx(math.sqrt(3))
    assert load["experts/entropy"] == pytest.approx(0.5)
    assert load["experts/entropy/worst"] == pytest.approx(0.0)
    assert (load["experts/dead"], load["experts/dead/worst"]) == (1.5, 3)


def statistics(losses, tokens):
    double = torch.float64
    return StepStatistics(
        torch.tensor(losses, dtype=double),
        torch.tensor(tokens, dtype=double),
        torch.tensor(1.5, dtype=double),
        torch.tensor(2.0, dtype=double),
        torch.tensor([[1.0, 3.0]], dtype=double),
        torch.tensor([0.5], dtype=double),
    )


def test_a_point_is_the_mean_by_token_over_the_steps_since_the_last():
    interval = Interval(["a", "b"])
    interval.add(statistics([10.0, 4.0], [5.0, 1.0]), torch.tensor(1.0))
    interval.add(statistics([30.0, 0.0], [5.0, 0.0]), torch.tensor(3.0))
    again = Interval(["a", "b"])
    again.load_state(interval.state(), torch.device("cpu"))
    for points in (interval.points(), again.points()):
        assert points["loss/train"] == 4.0
        assert points["loss/train/a"] == 4.0
        assert points["loss/train/b"] == 4.0
        assert points["optim/grad_norm"] == 2.0
        assert points["loss/balance"] == 1.5
    interval.add(statistics([10.0, 0.0], [5.0, 0.0]), torch.tensor(1.0))
    assert "loss/train/b" not in interval.points()
