import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from moetrain.config import ModelSettings
from moetrain.model_input import PackedTokens
from moetrain.models import hf
from moetrain.models.hf import OlmoeError, find_olmoe, olmoe_config, read_olmoe, read_settings, write_weights
from moetrain.models.transformer import Transformer

transformers = pytest.importorskip("transformers")

VOCABULARY = 96
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "intermediate_size": 16,
}


def make_model(**changes):
    torch.manual_seed(0)
    settings = ModelSettings(**(SMALL | changes))
    model = Transformer(settings, VOCABULARY, torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Large enough that a wrong expert, norm or half of an expert changes the logits.
            parameter.uniform_(0.5, 1.5) if "norm" in name else parameter.normal_(0, 0.2)
    return model


def write(model, folder, dtype=torch.float32, shard_bytes=hf.SHARD_BYTES):
    folder.mkdir()
    files = write_weights(model, folder, dtype, shard_bytes)
    config = olmoe_config(model.settings, VOCABULARY, 64, 1, 2, dtype)
    (folder / "config.json").write_text(json.dumps(config))
    return files


def logits(model, tokens):
    rows, length = tokens.shape
    with torch.no_grad():
        hidden, _ = model.hidden_states(PackedTokens.one_sample_per_row(tokens))
        return (hidden @ model.lm_head.weight.T).view(rows, length, -1)


def assert_same_logits(model, reference):
    tokens = torch.randint(0, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = reference(tokens).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(logits(model, tokens), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 2},
        {"norm_topk_prob": True, "rope_theta": 500.0, "rms_norm_eps": 1e-2},
        {"tie_word_embeddings": True},
        {"experts": "dense"},
        {"num_experts": 1, "num_experts_per_tok": 1},
    ],
    ids=str,
)
def test_transformers_and_we_load_an_exported_model_with_the_same_logits(tmp_path, changes):
    model = make_model(**changes)
    files = write(model, tmp_path / "hf", shard_bytes=20_000)
    assert len(files) > 3
    assert all(os.stat(file).st_mode == os.stat(tmp_path / "hf" / "config.json").st_mode for file in files)
    loaded, info = transformers.OlmoeForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert_same_logits(model, loaded.eval())
    back = read_olmoe(tmp_path / "hf", torch.float32)
    assert_same_logits(back, loaded)
    if changes.get("experts") != "dense":
        key_value_heads = {"num_key_value_heads": model.settings.key_value_heads}
        assert back.settings == model.settings.model_copy(update=key_value_heads)
        state = back.state_dict()
        assert state.keys() == model.state_dict().keys()
        assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
        assert (back.lm_head.weight is back.model.embed_tokens.weight) == back.settings.tie_word_embeddings


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [({"intermediate_size": 18}, torch.float32), ({"intermediate_size": 100}, torch.bfloat16),
     ({"hidden_size": 36, "num_attention_heads": 2}, torch.bfloat16)],
)  # fmt: skip
def test_widths_that_transformers_grouped_matmul_refuses_load_and_run(tmp_path, changes, dtype):
    model = make_model(**changes)
    write(model, tmp_path / "hf", dtype)
    tokens = torch.randint(0, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(1))
    loaded = transformers.OlmoeForCausalLM.from_pretrained(tmp_path / "hf", dtype=dtype).eval()
    if dtype == torch.float32:
        assert_same_logits(model, loaded)
    assert loaded.generate(tokens, max_new_tokens=3, do_sample=False).shape == (2, 43)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config.pop("experts_implementation") == "eager"
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    refused = transformers.OlmoeForCausalLM.from_pretrained(tmp_path / "hf", dtype=dtype)
    with torch.no_grad(), pytest.raises(RuntimeError, match="multiple of 16 bytes"):
        refused(tokens)


def test_other_widths_leave_the_choice_of_experts_to_transformers(tmp_path):
    write(make_model(), tmp_path / "hf")
    assert "experts_implementation" not in json.loads((tmp_path / "hf" / "config.json").read_text())


def test_names_on_disk_are_those_of_the_published_olmoe(tmp_path):
    model = make_model()
    (file,) = write(model, tmp_path / "hf")
    config = transformers.OlmoeConfig(**json.loads((tmp_path / "hf/config.json").read_text()))
    transformers.OlmoeForCausalLM(config).save_pretrained(tmp_path / "reference")
    ours, expected = load_file(file), load_file(tmp_path / "reference" / "model.safetensors")
    assert {name: t.shape for name, t in ours.items()} == {name: t.shape for name, t in expected.items()}
    layer = "model.layers.1.mlp.experts"
    assert torch.equal(ours[f"{layer}.5.gate_proj.weight"], model.state_dict()[f"{layer}.gate_up_proj"][5, :16])
    assert torch.equal(ours[f"{layer}.5.up_proj.weight"], model.state_dict()[f"{layer}.gate_up_proj"][5, 16:])


def random_olmoe(folder, seed=3, **changes):
    """A small OLMoE that transformers wrote, in several files and bfloat16 like the published one."""
    torch.manual_seed(seed)
    fields = SMALL | {"vocab_size": VOCABULARY, "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}}
    config = transformers.OlmoeConfig(**(fields | changes), initializer_range=0.2, pad_token_id=1, eos_token_id=2)
    transformers.OlmoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return transformers.OlmoeForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 2}, {"tie_word_embeddings": True}], ids=str)
def test_a_folder_written_by_transformers_is_read(tmp_path, changes):
    reference = random_olmoe(tmp_path / "reference", **changes)
    model = read_olmoe(tmp_path / "reference", torch.float32)
    assert_same_logits(model, reference)
    assert all(p.dtype == torch.float32 and p.requires_grad for p in model.parameters())


def test_stacked_experts_are_read_too(tmp_path):
    reference = random_olmoe(tmp_path / "reference")
    for file in (tmp_path / "reference").glob("model*"):
        file.unlink()
    save_file(
        {name: value.contiguous() for name, value in reference.state_dict().items()},
        tmp_path / "reference/model.safetensors",
    )
    assert_same_logits(read_olmoe(tmp_path / "reference", torch.float32), reference)


def test_a_folder_is_read_with_other_balancing(tmp_path):
    reference = random_olmoe(tmp_path / "reference")
    own, _ = read_settings(tmp_path / "reference")
    biased = own.model_copy(update={"balancing": "bias", "experts": "loop", "attention": "sdpa"})
    model = read_olmoe(tmp_path / "reference", torch.float32, biased)
    assert model.state_dict()["model.layers.0.mlp.gate.selection_bias"].abs().sum() == 0
    assert_same_logits(model, reference)


def test_the_published_config_is_read(tmp_path):
    # OLMoE-1B-7B-0924's, which omits defaults.
    published = {
        "architectures": ["OlmoeForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "clip_qkv": None,
        "eos_token_id": 50279,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 1024,
        "max_position_embeddings": 4096,
        "model_type": "olmoe",
        "norm_topk_prob": False,
        "num_attention_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 16,
        "num_key_value_heads": 16,
        "pad_token_id": 1,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 50304,
    }
    (tmp_path / "config.json").write_text(json.dumps(published))
    settings, vocab_size = read_settings(tmp_path)
    with torch.device("meta"):
        counts = Transformer(settings, vocab_size, torch.float32).parameter_counts()
    assert counts == (6_919_161_856, 1_282_017_280)  # "1B active of 7B"
    assert settings.rms_norm_eps == 1e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_shared_experts": 1}, "model.num_shared_experts=1: transformers' OLMoE has no shared expert"),
        ({"balancing": "bias"}, "model.balancing=bias: transformers' OLMoE selects experts without a bias"),
    ],
)
def test_settings_that_transformers_cannot_express_are_rejected_by_name(changes, message):
    with pytest.raises(OlmoeError, match=message) as caught:
        olmoe_config(ModelSettings(**(SMALL | changes)), VOCABULARY, 64, 1, 2, torch.float32)
    assert "\n" not in str(caught.value)


def set_config(**fields):
    def edit(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | fields))

    return edit


def drop(name):
    def edit(folder):
        weights = load_file(folder / "model.safetensors")
        save_file({key: value for key, value in weights.items() if key != name}, folder / "model.safetensors")

    return edit


def add(name):
    def edit(folder):
        save_file(load_file(folder / "model.safetensors") | {name: torch.zeros(2)}, folder / "model.safetensors")

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (shutil.rmtree, "no transformers model here"),
        (lambda folder: (folder / "config.json").write_text("{"), "no transformers model here"),
        (set_config(model_type="mixtral"), "model_type 'mixtral': only 'olmoe' and 'qwen3_moe' can be read"),
        (set_config(clip_qkv=8.0), "clip_qkv 8.0: only None can be read"),
        (set_config(attention_bias=True), "attention_bias True"),
        (set_config(rope_parameters={"rope_type": "yarn", "factor": 2.0}), "rotary positions of type .*yarn"),
        (set_config(head_dim=64), "head_dim 64"),
        (set_config(num_experts_per_tok=99), "num_experts_per_tok 99 exceeds num_experts 8"),
        (set_config(hidden_size="wide"), "hidden_size: Input should be a valid integer"),
        (set_config(num_experts=9), r"gate.weight has shape \(8, 32\), but config.json or the settings give \(9, 32\)"),
        (lambda folder: (folder / "model.safetensors").unlink(), "its weights cannot be read"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"cut off"), "its weights cannot be read"),
        (drop("model.layers.2.mlp.experts.7.up_proj.weight"), "7.up_proj.weight is missing"),
        (drop("model.norm.weight"), "weight model.norm.weight is missing: name a complete folder"),
        (add("model.layers.0.self_attn.q_proj.bias"), "unknown weight model.layers.0.self_attn.q_proj.bias"),
    ],
)
def test_a_folder_that_cannot_be_read_is_one_line(tmp_path, edit, message):
    write(make_model(), tmp_path / "hf")
    add("model.layers.0.self_attn.rotary_emb.inv_freq")(tmp_path / "hf")  # old versions wrote it
    read_olmoe(tmp_path / "hf", torch.float32)
    edit(tmp_path / "hf")
    with pytest.raises(OlmoeError, match=message) as caught:
        read_olmoe(tmp_path / "hf", torch.float32)
    assert "\n" not in str(caught.value)


def test_a_revision_of_the_hub_is_found_in_its_cache(tmp_path, monkeypatch):
    commit = "0" * 40
    cached = tmp_path / "models--allenai--OLMoE-tiny"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "step5000-tokens20B").write_text(commit)
    reference = random_olmoe(cached / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    import huggingface_hub

    plain = huggingface_hub.snapshot_download
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: plain(*a, cache_dir=tmp_path, **k))
    folder = find_olmoe("allenai/OLMoE-tiny@step5000-tokens20B")
    assert_same_logits(read_olmoe(folder, torch.float32), reference)
    with pytest.raises(OlmoeError, match="no such folder, and the download from the hub failed: ") as caught:
        find_olmoe("allenai/OLMoE-tiny@step9-tokens1B")
    assert "\n" not in str(caught.value)
    with pytest.raises(OlmoeError, match=r"\./nowhere: no such folder: name a folder, or OWNER/NAME"):
        find_olmoe("./nowhere")
