"""Muon against a slow float64 reference and torch's own; skipped steps; state; groups."""

import math

import numpy as np
import pytest
import torch

from moetrain.config import ModelSettings, OptimSettings
from moetrain.distributed.mesh import ParallelLayout
from moetrain.models.initialization import initialize_weights
from moetrain.models.transformer import Transformer
from moetrain.optim.builder import initial_optimizer_state, make_optimizer, optimizer_state
from moetrain.optim.muon import Muon, orthogonalize
from moetrain.training.step import update

FINITE = torch.tensor(1.0)  # a loss
RATE, DECAY, MOMENTUM = 0.02, 0.1, 0.95


def small_model(dtype=torch.float32, **changes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings = ModelSettings(**sizes, num_experts=4, num_experts_per_tok=2, **changes)
    return initialize_weights(Transformer(settings, 50, dtype))


def muon(model, **changes):
    return make_optimizer(model, OptimSettings(**{"name": "muon", "weight_decay": DECAY} | changes))


def give_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def orthogonalized_slowly(matrix):
    """One matrix in float64 by the definition: each iteration maps a singular value s to a s + b s^3 + c s^5."""
    left, values, right = np.linalg.svd(np.asarray(matrix, np.float64), full_matrices=False)
    values = values / np.sqrt((values**2).sum())
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return left @ np.diag(values) @ right


def split(name, value):
    """The matrices of a parameter, one by one."""
    matrices = value.reshape(-1, *value.shape[-2:])
    return [half for matrix in matrices for half in (np.split(matrix, 2) if "gate_up" in name else [matrix])]


def join(name, matrices, shape):
    if "gate_up" in name:
        matrices = [np.concatenate(pair) for pair in zip(matrices[::2], matrices[1::2], strict=True)]
    return np.stack(matrices).reshape(shape)


@pytest.mark.parametrize("shape", [(3, 8, 20), (3, 20, 8), (2, 16, 16), (1, 1, 9)])
def test_newton_schulz_is_the_polynomial_of_the_singular_values(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    expected = np.stack([orthogonalized_slowly(matrix) for matrix in matrices.numpy()])
    assert np.abs(orthogonalize(matrices.double()).numpy() - expected).max() < 1e-12
    assert np.abs(orthogonalize(matrices).numpy() - expected).max() < 2e-5
    assert np.abs(orthogonalize(matrices.bfloat16()).float().numpy() - expected).max() < 0.05
    values = torch.linalg.svdvals(orthogonalize(matrices))
    assert 0.6 < float(values.min()) <= float(values.max()) < 1.2


def test_a_matrix_of_zeros_stays_zero_beside_others():
    matrices = torch.randn(3, 4, 6)
    matrices[1] = 0
    found = orthogonalize(matrices)
    assert not found[1].any()
    assert torch.allclose(found[2], orthogonalize(matrices[2:])[0], atol=1e-6)


def test_two_steps_are_those_of_a_float64_reference_expert_by_expert():
    model = small_model(num_shared_experts=1)
    optimizer = muon(model)
    weights = {name: p.detach().double().numpy().copy() for name, p in model.named_parameters()}
    momenta = {name: np.zeros_like(weight) for name, weight in weights.items()}
    moved = [name for name, p in model.named_parameters() if "momentum_buffer" in optimizer.initial_state(p)]
    for step in range(2):
        give_gradients(model, step)
        for name in moved:
            gradient = model.get_parameter(name).grad.double().numpy()
            momenta[name] = MOMENTUM * momenta[name] + (1 - MOMENTUM) * gradient
            nesterov = MOMENTUM * momenta[name] + (1 - MOMENTUM) * gradient
            matrices = [
                0.2 * math.sqrt(max(matrix.shape)) * orthogonalized_slowly(matrix) for matrix in split(name, nesterov)
            ]
            weights[name] -= RATE * DECAY * weights[name]
            weights[name] -= RATE * join(name, matrices, nesterov.shape)
        for group in optimizer.param_groups:
            group["lr"] = RATE
        optimizer.step()
        for name in moved:
            error = np.abs(model.get_parameter(name).detach().numpy() - weights[name]).max()
            assert error < 2e-6, (name, step)
    assert sum("experts" in name for name in moved) == 4
    assert sum("shared_expert" in name for name in moved) == 4


def test_matrices_in_bf16_are_moved_as_by_torchs_own_muon():
    model = small_model(dtype=torch.bfloat16)
    optimizer = muon(model)
    names = [name for name, _ in model.named_parameters() if "self_attn" in name and "proj" in name]
    copies = [torch.nn.Parameter(model.get_parameter(name).detach().clone()) for name in names]
    own = torch.optim.Muon(copies, lr=RATE, weight_decay=DECAY, momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw")
    before = [copy.detach().clone() for copy in copies]
    for step in range(3):
        give_gradients(model, step)
        for name, copy in zip(names, copies, strict=True):
            copy.grad = model.get_parameter(name).grad.clone()
        for group in optimizer.param_groups:
            group["lr"] = RATE
        optimizer.step()
        own.step()
    for name, copy, old in zip(names, copies, before, strict=True):
        change, expected = model.get_parameter(name).detach() - old, copy.detach() - old
        assert float((change - expected).norm() / expected.norm()) < 0.02, name


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_head_routers_and_norms_are_adamws(tied):
    model = small_model(tie_word_embeddings=tied)
    optimizer = muon(model)
    assert isinstance(optimizer, Muon)
    adamw = make_optimizer(model, OptimSettings(weight_decay=DECAY))
    others = ("norm", "embed", "lm_head", "gate.weight")
    for name, parameter in model.named_parameters():
        assert ("exp_avg" in optimizer.initial_state(parameter)) == any(word in name for word in others), name
    for step in range(2):
        give_gradients(model, step)
        expected = {}
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        adamw.step()
        for name, parameter in model.named_parameters():
            expected[name] = parameter.detach().clone()
            parameter.data.copy_(before[name])
        optimizer.step()
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, expected[name]) == any(word in name for word in others), name
    assert sum(p.numel() for group in optimizer.param_groups for p in group["params"]) == sum(
        p.numel() for p in model.parameters()
    )
    # A stream of random gradients: updates of both have one size, to a factor.
    sizes = [
        float((parameter.detach() - before[name]).pow(2).mean().sqrt()) for name, parameter in model.named_parameters()
    ]
    assert max(sizes) / min(sizes) < 12


@pytest.mark.parametrize("state_precision", ["fp32", "bf16"])
def test_a_skipped_step_changes_nothing_and_state_is_restored(state_precision):
    model = small_model()
    optimizer = muon(model, state_precision=state_precision)
    give_gradients(model, 0)
    update(ParallelLayout(), model, optimizer, RATE, 1.0, FINITE)
    assert all(parameter.grad is None for parameter in model.parameters())
    state = {key: value.clone() for key, value in optimizer_state(model, optimizer).items()}
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    momenta = {value.dtype for key, value in state.items() if key.endswith("momentum_buffer")}
    assert momenta == {torch.float32 if state_precision == "fp32" else torch.bfloat16}
    give_gradients(model, 1)
    model.model.layers[0].mlp.experts.down_proj.grad[1, 0, 0] = math.nan
    _, applied = update(ParallelLayout(), model, optimizer, RATE, 1.0, FINITE)
    assert not applied
    assert all(torch.equal(state[key], value) for key, value in optimizer_state(model, optimizer).items())
    assert all(map(torch.equal, weights, model.parameters()))
    # Another model with these weights and this state goes on bit for bit.
    other = small_model()
    other.load_state_dict(model.state_dict())
    again = muon(other, state_precision=state_precision)
    started = initial_optimizer_state(other, again)
    assert started.keys() == state.keys()
    for key, value in state.items():
        started[key].copy_(value)
    for each, its in ((model, optimizer), (other, again)):
        give_gradients(each, 2)
        update(ParallelLayout(), each, its, RATE, 1.0, FINITE)
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_a_momentum_that_bf16_would_round_away_is_refused():
    with pytest.raises(ValueError, match=r"rounds away what a step changes with momentum 0\.99: set it to 0\.98"):
        OptimSettings(name="muon", state_precision="bf16", momentum=0.99)
