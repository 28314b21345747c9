"""Every backend against the reference on CUDA, forward and backward: alone and in a model."""

import pytest
import torch

from moetrain.config import ModelSettings
from moetrain.data.corpus import prepare_corpus
from moetrain.data.stream import training_stream
from moetrain.models.backends import choose_backends, compare_attention, compare_experts
from tests.gpu.common import DEVICE, GPU, PACKAGES, needs
from tests.models.test_transformer import gradients, make_model

pytestmark = GPU


def shape(hidden_size, heads, key_value_heads, num_experts, num_experts_per_tok, intermediate_size):
    return ModelSettings(
        hidden_size=hidden_size,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        num_experts=num_experts,
        num_experts_per_tok=num_experts_per_tok,
        intermediate_size=intermediate_size,
    )


SHAPES = {
    "small": shape(64, 4, 4, 8, 2, 32),
    "grouped-query": shape(256, 8, 2, 16, 4, 128),
    "OLMoE-1B-7B": shape(2048, 16, 16, 64, 8, 1024),
}
HALF, FULL = torch.bfloat16, torch.float32


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(
    ("backend", "dtype"), [("megablocks", HALF), ("grouped_mm", HALF), ("grouped_mm", FULL), ("loop", HALF)]
)
def test_experts(backend, dtype, shape):
    needs(*PACKAGES.get(backend, ()))
    compare_experts(backend, shape, DEVICE, dtype)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(
    ("backend", "dtype"), [("flash_attn", HALF), ("varlen", HALF), ("sdpa", HALF), ("sdpa", FULL), ("reference", HALF)]
)
def test_attention(backend, dtype, shape):
    needs(*PACKAGES.get(backend, ()))
    compare_attention(backend, shape, DEVICE, dtype)


def test_auto_takes_kernels_and_notes_which(capsys):
    chosen = choose_backends(ModelSettings(), DEVICE, HALF)
    print(*chosen.notes, sep="\n")
    assert chosen.experts in ("megablocks", "grouped_mm")
    assert chosen.attention in ("flash_attn", "varlen")
    assert choose_backends(ModelSettings(), DEVICE, FULL).attention == "sdpa"


@pytest.fixture
def batch(make_settings):
    settings = make_settings("data.seq_len=256", "panel.tokens=64")
    return training_stream(prepare_corpus(settings), settings).batch(0, 0, 4)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize(
    ("experts", "attention"), [("grouped_mm", "varlen"), ("megablocks", "varlen"), ("grouped_mm", "flash_attn")]
)
def test_a_model(batch, experts, attention, recompute, compiled):
    for name in (experts, attention):
        needs(*PACKAGES.get(name, ()))
    torch.compiler.reset()
    widths = {"hidden_size": 128, "intermediate_size": 64, "initializer_range": 0.05}
    exact, exact_gradients = gradients(make_model(attention="reference", experts="loop", **widths), batch)
    model = make_model(attention=attention, experts=experts, dtype=HALF, recompute=recompute, **widths).to(DEVICE)
    if compiled:
        model.compile_layers()
    output, its_gradients = gradients(model, batch.to(DEVICE))
    assert float(output.loss_sum.detach()) == pytest.approx(float(exact.loss_sum.detach()), rel=2e-3)
    for name, gradient in exact_gradients.items():
        # The gradients of a token that rounding sends to another expert differ entirely: compare directions.
        similar = torch.nn.functional.cosine_similarity(its_gradients[name].cpu().flatten(), gradient.flatten(), dim=0)
        assert float(similar) > 0.98, name
