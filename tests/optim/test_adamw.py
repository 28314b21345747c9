import math

import pytest
import torch

from moetrain.config import ModelSettings, OptimSettings
from moetrain.distributed.mesh import ParallelLayout
from moetrain.models.initialization import initialize_weights
from moetrain.models.transformer import Transformer
from moetrain.optim.builder import initial_optimizer_state, make_optimizer, optimizer_state
from moetrain.training.step import update

FINITE = torch.tensor(1.0)  # a loss


def small_model(**changes):
    torch.manual_seed(0)
    settings = ModelSettings(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_experts=4, num_experts_per_tok=2, **changes
    )
    return initialize_weights(Transformer(settings, 50, torch.float32)), settings


def test_norms_and_embeddings_do_not_decay_and_all_else_does():
    model, _ = small_model()
    optimizer = make_optimizer(model, OptimSettings(weight_decay=0.3))
    decayed, undecayed = ({id(p) for p in group["params"]} for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    for name, parameter in model.named_parameters():
        assert (id(parameter) in undecayed) == ("norm" in name or "embed" in name), name
        assert (id(parameter) in undecayed) != (id(parameter) in decayed)


def restore(model, optimizer, state):
    """As a checkpoint does it."""
    started = initial_optimizer_state(model, optimizer)
    assert started.keys() == state.keys()
    for name, value in state.items():
        started[name].copy_(value)


def test_optimizer_state_is_saved_and_restored_by_name():
    model, _ = small_model()
    optimizer = make_optimizer(model, OptimSettings())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    state = optimizer_state(model, optimizer)
    other, _ = small_model()
    again = make_optimizer(other, OptimSettings())
    restore(other, again, state)
    restored = optimizer_state(other, again)
    assert restored.keys() == state.keys()
    assert all(torch.equal(restored[key], state[key]) for key in state)


@pytest.mark.parametrize("changes", [{}, {"state_precision": "bf16"}, {"name": "muon"}], ids=str)
def test_the_direction_is_that_of_a_step_without_momentum(changes):
    model, _ = small_model()
    settings = OptimSettings(beta1=0.0, momentum=0.0, weight_decay=0.0, **changes)
    optimizer = make_optimizer(model, settings)
    for step in range(3):
        torch.manual_seed(step)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        expected = [optimizer.direction(parameter, parameter.grad) for parameter in model.parameters()]
        before = [parameter.detach().clone() for parameter in model.parameters()]
        for group in optimizer.param_groups:
            group["lr"] = 0.01
        optimizer.step()
        for parameter, old, direction in zip(model.parameters(), before, expected, strict=True):
            assert torch.allclose(parameter, old - 0.01 * direction, atol=1e-6)


def bf16_adamw(model):
    return make_optimizer(model, OptimSettings(state_precision="bf16"))


def give_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_moments_in_bf16_are_adamw_with_rounded_moments():
    """Against torch's AdamW whose moments are rounded by hand after each step."""
    (model, _), (reference_model, _) = small_model(), small_model()
    optimizer, reference = bf16_adamw(model), make_optimizer(reference_model, OptimSettings())
    for step in range(5):
        give_gradients(model, step)
        give_gradients(reference_model, step)
        update(ParallelLayout(), model, optimizer, 1e-2, 1.0, FINITE)
        update(ParallelLayout(), reference_model, reference, 1e-2, 1.0, FINITE)
        for state in reference.state.values():
            for key in ("exp_avg", "exp_avg_sq"):
                state[key].copy_(state[key].bfloat16())
    assert {state["exp_avg"].dtype for state in optimizer.state.values()} == {torch.bfloat16}
    state, expected = optimizer_state(model, optimizer), optimizer_state(reference_model, reference)
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key].float(), expected[key].float()) for key in state)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), reference_model.parameters(), strict=True))


def test_moments_in_bf16_are_restored_and_unchanged_by_a_skipped_update():
    model, _ = small_model()
    optimizer = bf16_adamw(model)
    give_gradients(model, 0)
    update(ParallelLayout(), model, optimizer, 1e-2, 1.0, FINITE)
    state = {key: value.clone() for key, value in optimizer_state(model, optimizer).items()}
    give_gradients(model, 1)
    model.lm_head.weight.grad[0, 0] = math.inf
    _, applied = update(ParallelLayout(), model, optimizer, 1e-2, 1.0, FINITE)
    assert not applied
    assert all(torch.equal(state[key], value) for key, value in optimizer_state(model, optimizer).items())
    other, _ = small_model()
    again = bf16_adamw(other)
    restore(other, again, state)
    assert all(torch.equal(state[key], value) for key, value in optimizer_state(other, again).items())
    # Float32 moments of a checkpoint are rounded where this run keeps bf16, and the reverse.
    wide = {key: value.float() for key, value in state.items()}
    restore(other, again, wide)
    assert all(torch.equal(state[key], value) for key, value in optimizer_state(other, again).items())


def test_moments_that_bf16_would_round_away_are_refused():
    with pytest.raises(ValueError, match=r"rounds away what a step changes with beta1 0\.9 and beta2 0\.999: set both"):
        OptimSettings(state_precision="bf16", beta2=0.999)


def test_gradients_are_clipped_to_the_norm():
    model, _ = small_model()
    optimizer = make_optimizer(model, OptimSettings())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    norm, applied = update(ParallelLayout(), model, optimizer, 1e-3, 1.0, FINITE)
    assert applied
    assert float(norm) == pytest.approx(math.sqrt(sum(p.numel() for p in model.parameters())), rel=1e-5)
    assert all(p.grad is None for p in model.parameters())
    moments = torch.cat([s["exp_avg"].flatten() for s in optimizer.state.values()])
    assert float(moments.norm()) == pytest.approx(0.1, rel=1e-4)  # (1 - beta1) times a gradient of norm 1


@pytest.mark.parametrize("broken", ["gradient", "loss"])
def test_an_update_with_a_gradient_or_loss_that_is_not_finite_is_skipped(broken):
    model, _ = small_model()
    optimizer = make_optimizer(model, OptimSettings())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    if broken == "gradient":
        model.lm_head.weight.grad[0, 0] = math.nan
    _, applied = update(
        ParallelLayout(), model, optimizer, 1e-3, 1.0, torch.tensor(1.0 if broken == "gradient" else math.inf)
    )
    assert not applied
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


class Momentum(torch.optim.Optimizer):
    """Another optimizer that can skip a step: plain momentum."""

    found_inf = None

    def initial_state(self, parameter):
        return {"momentum": torch.zeros_like(parameter)}

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter] = self.state[parameter] or self.initial_state(parameter)
                applied = 1 - (0 if self.found_inf is None else self.found_inf)
                state["momentum"].lerp_(parameter.grad.nan_to_num(), 0.1 * applied)
                parameter.sub_(group["lr"] * applied * state["momentum"])


def test_another_optimizer_can_skip_steps_and_be_restored():
    model, _ = small_model()
    optimizer = Momentum(model.parameters(), {"lr": 0.0})
    give_gradients(model, 0)
    _, applied = update(ParallelLayout(), model, optimizer, 1e-2, 1.0, FINITE)
    assert applied
    state = {key: value.clone() for key, value in optimizer_state(model, optimizer).items()}
    weights = [parameter.clone() for parameter in model.parameters()]
    give_gradients(model, 1)
    _, applied = update(ParallelLayout(), model, optimizer, 1e-2, 1.0, torch.tensor(math.nan))
    assert not applied
    assert all(torch.equal(state[key], value) for key, value in optimizer_state(model, optimizer).items())
    assert all(map(torch.equal, weights, model.parameters()))
    other, _ = small_model()
    again = Momentum(other.parameters(), {"lr": 0.0})
    restore(other, again, state)
    assert all(torch.equal(state[key], value) for key, value in optimizer_state(other, again).items())
