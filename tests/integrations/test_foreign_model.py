"""Models of transformers that are read through transformers, with the interface of ours."""

import json
import shutil

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")

from moetrain.integrations.families import FamilyError  # noqa: E402
from moetrain.integrations.foreign_model import ForeignModel, folder_settings, open_folder  # noqa: E402
from moetrain.model_input import PackedTokens  # noqa: E402
from moetrain.models.hf import OlmoeError, read_olmoe  # noqa: E402
from moetrain.models.transformer import Transformer  # noqa: E402
from moetrain.monitoring.monitor import router_rows  # noqa: E402
from tests.integrations.tiny import tiny_model  # noqa: E402

# Conventions of all kinds: logits divided (granite), a dense first layer and groups (deepseek), state-space layers
# (jamba), biases in attention sinks (gpt_oss), experts in every second layer.
KINDS = ["flex_olmo", "mixtral", "gpt_oss", "granitemoe", "deepseek_v3", "jamba", "glm4_moe", "ernie4_5_moe"]
LENGTHS = ((7, 9), (12,))  # of the samples of each row
ROW = 18


def packed():
    """Two rows of samples with padding at their ends; the first and the last text token of a sample count apart."""
    draw = torch.Generator().manual_seed(0)
    tokens, targets = torch.zeros(2, ROW, dtype=torch.long), torch.full((2, ROW), -100)
    positions, slots, recorded = (
        torch.zeros(2, ROW, dtype=torch.long),
        torch.full((2, ROW), -1),
        torch.full((2, ROW), -1),
    )
    spans = []
    for row, lengths in enumerate(LENGTHS):
        place = 0
        for slot, length in enumerate(lengths):
            here = slice(place, place + length)
            tokens[row, here] = torch.randint(3, 96, (length,), generator=draw)
            targets[row, place : place + length - 1] = tokens[row, place + 1 : place + length]
            positions[row, here], slots[row, here] = torch.arange(length), slot
            recorded[row, place + 1 : place + length] = 2 * slot + torch.arange(length - 1) % 2
            spans.append((row * ROW + place, length))
            place += length
        spans.append((row * ROW + place, ROW - place))
    return PackedTokens(tokens, targets, positions, slots, recorded, torch.tensor(spans), 2)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_losses_and_routing_are_those_of_each_sample_alone(kind):
    model = tiny_model(kind)
    foreign = ForeignModel(model, torch.float32)
    inputs = packed()
    output = foreign(inputs, entropy=True)
    family, routers = foreign.recorder.routers.family, foreign.recorder.routers
    assert output.routing.sums_LBRE.shape == (len(routers.modules), 2, 4, routers.experts)
    load = torch.zeros(len(routers.modules), routers.experts)
    for row, lengths in enumerate(LENGTHS):
        place = 0
        for slot, length in enumerate(lengths):
            tokens = inputs.tokens_BT[row, place : place + length][None]
            logits = []
            hooks = [
                router.register_forward_hook(lambda router, args, out, kept=logits: kept.append((router, out)))
                for router in routers.modules
            ]
            alone = model(input_ids=tokens, use_cache=False).logits[0].float()
            for hook in hooks:
                hook.remove()
            log = alone.log_softmax(-1)
            loss = -log[:-1].gather(1, tokens[0, 1:, None])[:, 0]
            assert torch.allclose(output.loss_BT[row, place : place + length - 1], loss, atol=1e-4)
            entropy = -(log.exp() * log).sum(-1)[:-1]
            assert torch.allclose(output.entropy_BT[row, place : place + length - 1], entropy, atol=1e-4)
            for layer, (router, out) in enumerate(logits):
                values = (out[routers.output] if isinstance(out, tuple) else out).reshape(length, -1)
                probs = family.probabilities(router, values)
                for half in (0, 1):
                    found = output.routing.sums_LBRE[layer, row, 2 * slot + half]
                    assert torch.allclose(found, probs[1:][half::2].sum(0), atol=1e-4)
                chosen = family.choice(router, values, routers.top_k)
                load[layer] += torch.bincount(chosen.flatten(), minlength=routers.experts)
            place += length
    assert torch.equal(output.routing.load_LE, load)
    assert output.routing.counts_LBRE.sum() == len(routers.modules) * routers.top_k * sum(
        n - 1 for x in LENGTHS for n in x
    )


@pytest.mark.parametrize("kind", ["olmoe", "qwen3_moe"])
@torch.no_grad()
def test_a_model_that_ours_can_be_gives_the_same_through_transformers(kind, tmp_path):
    tiny_model(kind).save_pretrained(tmp_path)
    ours = read_olmoe(tmp_path, torch.float32)
    foreign = ForeignModel(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32), torch.float32
    )
    one, other = ours(packed(), record_layer_inputs=True), foreign(packed(), record_layer_inputs=True)
    assert torch.allclose(one.loss_BT, other.loss_BT, atol=1e-5)
    for name in ("sums_LBRE", "counts_LBRE", "probs_LE", "load_LE", "z_L", "entropy_L", "inputs_LBRD"):
        assert torch.allclose(getattr(one.routing, name), getattr(other.routing, name), atol=1e-4), name
    assert np.array_equal(router_rows(ours), router_rows(foreign))
    hidden = [model.hidden_states(packed())[0][packed().slots_BT.flatten() >= 0] for model in (ours, foreign)]
    assert torch.allclose(*hidden, atol=1e-4)


def test_a_folder_is_opened_as_ours_where_ours_can_be_it(tmp_path):
    for kind, type_ in (("olmoe", Transformer), ("qwen3_moe", Transformer), ("mixtral", ForeignModel)):
        tiny_model(kind).save_pretrained(tmp_path / kind)
        model = open_folder(tmp_path / kind, torch.float32)
        assert type(model) is type_
        settings = folder_settings(tmp_path / kind)
        assert (settings.num_hidden_layers, settings.num_experts, settings.num_experts_per_tok) == (3, 8, 2)
        assert settings.num_experts == model.settings.num_experts


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("attention_bias", True, "attention_bias True: only False"),
        ("use_sliding_window", True, "use_sliding_window True: only False"),
        ("decoder_sparse_step", 2, "decoder_sparse_step 2: only 1"),
        ("mlp_only_layers", [1], r"mlp_only_layers \[1\]: only \[\]"),
        ("hidden_act", "gelu", "hidden_act 'gelu': only 'silu'"),
    ],
)
def test_a_qwen3_that_ours_cannot_be_is_refused_by_the_field_and_read_through_transformers(
    field, value, message, tmp_path
):
    tiny_model("qwen3_moe", **{field: value}).save_pretrained(tmp_path)
    with pytest.raises(OlmoeError, match=message):
        read_olmoe(tmp_path, torch.float32)
    assert isinstance(open_folder(tmp_path, torch.float32), ForeignModel)


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"norm_topk_prob": False, "tie_word_embeddings": True, "head_dim": 16}])
def test_our_qwen3_has_the_logits_of_transformers(changes, tmp_path):
    model = tiny_model("qwen3_moe", **changes)
    for name, weight in model.named_parameters():
        if "norm" in name:  # norms of 1 could be left out without a difference
            weight.copy_(1 + 0.3 * torch.randn_like(weight))
    model.save_pretrained(tmp_path)
    ours = read_olmoe(tmp_path, torch.float32)
    tokens = torch.randint(3, 96, (2, 20), generator=torch.Generator().manual_seed(2))
    hidden, _ = ours.hidden_states(PackedTokens.one_sample_per_row(tokens))
    logits = (hidden @ ours.lm_head.weight.T).view(2, 20, -1)
    assert torch.allclose(logits, model(input_ids=tokens).logits, atol=1e-5)
    assert ours.settings.qk_norm == "head"


def test_what_cannot_be_read_is_told_in_one_line(tmp_path):
    tiny_model("gemma4_text").save_pretrained(tmp_path / "capped")
    config = json.loads((tmp_path / "capped" / "config.json").read_text())
    (tmp_path / "capped" / "config.json").write_text(json.dumps(config | {"final_logit_softcapping": 30.0}))
    with pytest.raises(FamilyError, match=r"capped: the logits of this gemma4_text are capped"):
        open_folder(tmp_path / "capped", torch.float32)
    tiny_model("mixtral").save_pretrained(tmp_path / "cut")
    (weights,) = (tmp_path / "cut").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(FamilyError, match="cut: transformers cannot read it: ") as error:
        open_folder(tmp_path / "cut", torch.float32)
    assert "\n" not in str(error.value)
    shutil.rmtree(tmp_path / "cut")
    with pytest.raises(OlmoeError, match="no transformers model here"):
        open_folder(tmp_path / "cut", torch.float32)
