import math
import signal

import pytest
import torch

from moetrain.config import ModelSettings, OptimSettings
from moetrain.distributed.mesh import ParallelLayout
from moetrain.distributed.signals import StopAgreement
from moetrain.models.initialization import initialize_weights
from moetrain.models.transformer import Routing, Transformer
from moetrain.optim.builder import make_optimizer, optimizer_state, start_optimizer_state
from moetrain.optim.schedule import learning_rate
from moetrain.training.balancing import Balancing
from moetrain.training.step import StepStatistics, update
from moetrain.training.train_metrics import TrainMetrics, expert_load


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


FINE = torch.tensor(1.0)  # a loss
MADE = torch.tensor(True)  # an update


def small_model(**changes):
    torch.manual_seed(0)
    settings = ModelSettings(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_experts=4, num_experts_per_tok=2, **changes
    )
    return initialize_weights(Transformer(settings, 50, torch.float32)), settings


def test_norms_and_embeddings_do_not_decay_and_all_else_does():
    model, _ = small_model()
    optimizer = make_optimizer(model, OptimSettings(weight_decay=0.3))
    decayed, plain = ({id(p) for p in group["params"]} for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    for name, parameter in model.named_parameters():
        assert (id(parameter) in plain) == ("norm" in name or "embed" in name), name
        assert (id(parameter) in plain) != (id(parameter) in decayed)


def take_up(model, optimizer, state):
    """As a checkpoint fills it."""
    started = start_optimizer_state(model, optimizer)
    assert started.keys() == state.keys()
    for name, value in state.items():
        started[name].copy_(value)


def test_optimizer_state_goes_and_comes_back_by_name():
    model, _ = small_model()
    optimizer = make_optimizer(model, OptimSettings())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    state = optimizer_state(model, optimizer)
    other, _ = small_model()
    again = make_optimizer(other, OptimSettings())
    take_up(other, again, state)
    restored = optimizer_state(other, again)
    assert restored.keys() == state.keys()
    assert all(torch.equal(restored[key], state[key]) for key in state)


def small_state(model):
    return make_optimizer(model, OptimSettings(state_precision="bf16"))


def give_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_moments_in_bf16_are_adamw_with_rounded_moments():
    """Against torch's AdamW whose moments are rounded by hand after each step."""
    (mine, _), (theirs, _) = small_model(), small_model()
    optimizer, reference = small_state(mine), make_optimizer(theirs, OptimSettings())
    for step in range(5):
        give_gradients(mine, step)
        give_gradients(theirs, step)
        update(ParallelLayout(), mine, optimizer, 1e-2, 1.0, FINE)
        update(ParallelLayout(), theirs, reference, 1e-2, 1.0, FINE)
        for state in reference.state.values():
            for key in ("exp_avg", "exp_avg_sq"):
                state[key].copy_(state[key].bfloat16())
    assert {state["exp_avg"].dtype for state in optimizer.state.values()} == {torch.bfloat16}
    state, expected = optimizer_state(mine, optimizer), optimizer_state(theirs, reference)
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key].float(), expected[key].float()) for key in state)
    assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), theirs.parameters(), strict=True))


def test_moments_in_bf16_come_back_and_are_left_alone_by_a_skipped_update():
    model, _ = small_model()
    optimizer = small_state(model)
    give_gradients(model, 0)
    update(ParallelLayout(), model, optimizer, 1e-2, 1.0, FINE)
    state = {key: value.clone() for key, value in optimizer_state(model, optimizer).items()}
    give_gradients(model, 1)
    model.lm_head.weight.grad[0, 0] = math.inf
    _, made = update(ParallelLayout(), model, optimizer, 1e-2, 1.0, FINE)
    assert not made
    assert all(torch.equal(state[key], value) for key, value in optimizer_state(model, optimizer).items())
    other, _ = small_model()
    again = small_state(other)
    take_up(other, again, state)
    assert all(torch.equal(state[key], value) for key, value in optimizer_state(other, again).items())
    # What was kept in float32 is rounded when it is taken up in bf16, and the other way round widened.
    wide = {key: value.float() for key, value in state.items()}
    take_up(other, again, wide)
    assert all(torch.equal(state[key], value) for key, value in optimizer_state(other, again).items())


def test_moments_that_bf16_would_round_away_are_refused():
    with pytest.raises(ValueError, match=r"rounds away what a step changes with beta1 0\.9 and beta2 0\.999: set both"):
        OptimSettings(state_precision="bf16", beta2=0.999)


def test_gradients_are_clipped_to_the_norm():
    model, _ = small_model()
    optimizer = make_optimizer(model, OptimSettings())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    norm, finite = update(ParallelLayout(), model, optimizer, 1e-3, 1.0, FINE)
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
    _, finite = update(
        ParallelLayout(), model, optimizer, 1e-3, 1.0, torch.tensor(1.0 if broken == "gradient" else math.inf)
    )
    assert not finite
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_ranks_agree_on_a_signal_at_once_on_cpu_and_one_step_later_on_cuda(monkeypatch):
    others = iter([0, signal.SIGTERM, 0, 0] * 2 + [0, 0])
    monkeypatch.setattr(ParallelLayout, "all_reduce_max", lambda _, own: torch.tensor(max(own, next(others))))
    here = StopAgreement(ParallelLayout())
    assert [here.ask(None) for _ in range(4)] == [None, "SIGTERM", None, None]
    late = StopAgreement(ParallelLayout(device=torch.device("cuda")))
    assert [late.ask(None) for _ in range(4)] == [None, None, "SIGTERM", None]
    assert late.ask("SIGINT") is None
    assert late.ask(None) == "SIGINT"


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
    interval = TrainMetrics(["a", "b"])
    interval.add(statistics([math.nan, 1.0], [5.0, 1.0]), torch.tensor(0.0), ~MADE)
    assert interval.points() == {}
    interval.add(statistics([math.nan, 1.0], [5.0, 1.0]), torch.tensor(0.0), ~MADE)
    interval.add(statistics([10.0, 4.0], [5.0, 1.0]), torch.tensor(1.0), MADE)
    interval.add(statistics([30.0, 0.0], [5.0, 0.0]), torch.tensor(3.0), MADE)
    again = TrainMetrics(["a", "b"])
    again.load_state(interval.state(), torch.device("cpu"))
    for points in (interval.points(), again.points()):
        assert points["loss/train"] == 4.0
        assert points["loss/train/a"] == 4.0
        assert points["loss/train/b"] == 4.0
        assert points["optim/grad_norm"] == 2.0
        assert points["loss/balance"] == 1.5
    interval.add(statistics([10.0, 0.0], [5.0, 0.0]), torch.tensor(1.0), MADE)
    assert "loss/train/b" not in interval.points()
