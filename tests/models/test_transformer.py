import pytest
import torch

from moetrain.config import ModelSettings
from moetrain.data.corpus import prepare_corpus
from moetrain.data.stream import training_stream
from moetrain.model_input import PackedTokens
from moetrain.models.backends import Backends
from moetrain.models.initialization import initialize_weights
from moetrain.models.transformer import Transformer
from tests.models import fakes

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "intermediate_size": 16,
    # Large enough that routing is far from uniform and a wrong expert changes the result.
    "initializer_range": 0.2,
}


def make_model(vocab_size=320, recompute=False, dtype=torch.float32, **changes):
    torch.manual_seed(0)
    return initialize_weights(Transformer(ModelSettings(**(SMALL | changes)), vocab_size, dtype, recompute))


@pytest.fixture
def batch(make_settings):
    settings = make_settings()
    corpus = prepare_corpus(settings)
    stream = training_stream(corpus, settings)
    return stream.batch(0, 0, 4)


def gradients(model, batch):
    output = model(batch.model_input())
    loss = output.loss_sum / 100
    if output.routing is not None:
        loss = loss + 0.1 * (output.routing.probs_LE.square().mean() + output.routing.z_L.mean())
    loss.backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_close(found, expected):
    """Loss, routing and gradients, as returned by `gradients`."""
    (output, its_gradients), (reference, reference_gradients) = found, expected
    torch.testing.assert_close(output.loss_BT, reference.loss_BT, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.routing.sums_LBRE, reference.routing.sums_LBRE, rtol=1e-5, atol=1e-5)
    for name, gradient in reference_gradients.items():
        torch.testing.assert_close(
            its_gradients[name], gradient, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("norm_topk_prob", [False, True])
@pytest.mark.parametrize("groups", [4, 2])
def test_logits_equal_transformers_olmoe(norm_topk_prob, groups):
    transformers = pytest.importorskip("transformers")
    model = make_model(norm_topk_prob=norm_topk_prob, num_key_value_heads=groups)
    config = transformers.OlmoeConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=groups,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=norm_topk_prob,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        rms_norm_eps=1e-5,
        pad_token_id=None,
        eos_token_id=None,
    )
    reference = transformers.OlmoeForCausalLM(config).eval()
    reference.load_state_dict(model.state_dict(), strict=True)  # the names of the parameters agree
    tokens = torch.randint(3, 320, (2, 40))
    with torch.no_grad():
        hidden, _ = model.hidden_states(PackedTokens.one_sample_per_row(tokens))
        logits = (hidden @ model.lm_head.weight.T).view(2, 40, -1)
        torch.testing.assert_close(logits, reference(tokens).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ["batched", "sdpa"])
@pytest.mark.parametrize("experts", ["grouped_mm", "loop"])
def test_every_backend_gives_the_reference_loss_gradients_and_routing(batch, attention, experts):
    found = gradients(make_model(attention=attention, experts=experts), batch)
    assert_close(found, gradients(make_model(attention="reference", experts="loop"), batch))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("attention", ["varlen", "flash_attn"])
def test_a_checkpoint_gives_the_same_with_the_kernels_for_cuda(batch, monkeypatch, attention, recompute):
    reference = make_model(attention="reference", experts="loop", num_key_value_heads=2)
    expected = gradients(reference, batch)
    fakes.put_megablocks(monkeypatch)
    fakes.put_flash_attn(monkeypatch)
    fakes.put_varlen(monkeypatch)
    monkeypatch.setattr(Transformer, "backends", lambda self, device: Backends(attention, "megablocks"))
    model = make_model(num_key_value_heads=2, recompute=recompute)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.load_state_dict(reference.state_dict())
    assert_close(gradients(model, batch), expected)


def test_loss_and_routing_per_sample_are_the_same_packed_and_alone(batch):
    model = make_model()
    with torch.no_grad():
        packed = model(batch.model_input())
        compared = 0
        for row in range(4):
            for slot in range(batch.samples_BS.shape[1]):
                if batch.samples_BS[row, slot] < 0:
                    continue
                inside = batch.slots_BT[row] == slot
                recorded = batch.recorded_BT[row][inside]
                alone = model(
                    PackedTokens.one_sample_per_row(
                        batch.tokens_BT[row][inside][None],
                        batch.targets_BT[row][inside][None],
                        torch.where(recorded >= 0, recorded % 2, -1)[None],
                    )
                )
                torch.testing.assert_close(alone.loss_BT[0], packed.loss_BT[row][inside], rtol=1e-5, atol=1e-5)
                for name in ("sums_LBRE", "counts_LBRE"):
                    expected = getattr(packed.routing, name)[:, row, 2 * slot : 2 * slot + 2]
                    torch.testing.assert_close(getattr(alone.routing, name)[:, 0], expected, rtol=1e-5, atol=1e-5)
                compared += bool(batch.compared_BS[row, slot])
        assert compared >= 4


def test_recomputing_layers_changes_no_bit(batch):
    kept, kept_gradients = gradients(make_model(), batch)
    recomputed, recomputed_gradients = gradients(make_model(recompute=True), batch)
    assert torch.equal(kept.loss_BT, recomputed.loss_BT)
    for field in ("sums_LBRE", "counts_LBRE", "probs_LE", "load_LE", "z_L", "entropy_L", "inputs_LBRD"):
        assert torch.equal(getattr(kept.routing, field), getattr(recomputed.routing, field)), field
    for name, gradient in kept_gradients.items():
        assert torch.equal(gradient, recomputed_gradients[name]), name


def test_the_sums_of_each_recorded_sample_count_its_tokens(batch):
    routing = make_model()(batch.model_input()).routing
    tokens = (batch.recorded_BT[:, None, :] == torch.arange(2 * batch.samples_BS.shape[1])[None, :, None]).sum(-1)
    for layer in range(3):
        torch.testing.assert_close(routing.sums_LBRE[layer].sum(-1), tokens.float())
        assert torch.equal(routing.counts_LBRE[layer].sum(-1), 2.0 * tokens)
        assert routing.load_LE[layer].sum() == 2 * (batch.slots_BT >= 0).sum()


def test_bf16_compute_keeps_routing_and_loss_in_float32_and_close(batch):
    exact = make_model(initializer_range=0.05)(batch.model_input())
    rounded = make_model(initializer_range=0.05, dtype=torch.bfloat16)(batch.model_input())
    assert rounded.loss_BT.dtype == rounded.routing.sums_LBRE.dtype == torch.float32
    assert float(rounded.loss_sum.detach()) == pytest.approx(float(exact.loss_sum.detach()), rel=1e-3)


def test_the_dense_twin_has_the_active_parameters_and_no_routing(batch):
    moe, dense = make_model(), make_model(experts="dense")
    router = 3 * 8 * 32
    assert dense.parameter_counts()[0] == moe.parameter_counts()[1] - router
    output, grads = gradients(dense, batch)
    assert output.routing is None
    assert all(g.abs().sum() > 0 for g in grads.values())


def test_a_shared_expert_is_trained(batch):
    output, grads = gradients(make_model(num_shared_experts=1), batch)
    assert grads["model.layers.0.mlp.shared_expert.down_proj.weight"].abs().sum() > 0
    assert output.routing is not None
