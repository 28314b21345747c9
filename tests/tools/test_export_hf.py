import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain.checkpoint.restore import open_model
from moetrain.config import SettingsError, load_settings
from moetrain.data.corpus import prepare_corpus
from moetrain.data.tokenizer import load_from_folder
from moetrain.model_input import PackedTokens
from moetrain.train import train
from moetrain.training.initialize import initial_model
from tests.conftest import small_run
from tests.models.test_hf import random_olmoe
from tests.tools.test_prepare_data import load_tool
from tests.trainer.reading import scalars

transformers = pytest.importorskip("transformers")
export_hf = load_tool("export_hf")


@pytest.fixture(scope="module")
def run(corpus_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported")
    base = small_run(corpus_folder, out, tmp_path_factory.getbasetemp())
    few = ["train.max_steps=30", "panel.readings=2", "train.checkpoint_every=15", "train.eval_every=15"]
    assert train(load_settings(None, [*base, *few])) == 0
    return out / "runs" / "run"


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "exported"
    assert export_hf.main([str(run), str(folder), "--shard-size", "0.00003"]) == 0
    return folder


@pytest.fixture(scope="module")
def loaded(exported):
    model = transformers.OlmoeForCausalLM.from_pretrained(exported).eval()
    return model, transformers.AutoTokenizer.from_pretrained(exported)


def test_the_exported_model_has_our_loss_per_token(run, loaded):
    trained = open_model(run, dtype=torch.float32)
    model, tokenizer = loaded
    tokens = torch.tensor([tokenizer("Ada has a drum, so the drum belongs to Ada.").input_ids])
    targets = torch.cat([tokens[:, 1:], torch.full((1, 1), -100)], 1)
    with torch.no_grad():
        our_loss = trained.model(PackedTokens.one_sample_per_row(tokens, targets)).loss_BT[0, :-1]
        probabilities = model(tokens).logits.log_softmax(-1)[0, :-1]
    exported_loss = -probabilities.gather(1, tokens[0, 1:, None])[:, 0]
    torch.testing.assert_close(our_loss, exported_loss, rtol=1e-5, atol=1e-5)
    assert exported_loss.mean() < 4.5  # trained: a uniform guess over 320 ids has 5.77


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])) | st.text(st.sampled_from("Ada has \n\u2581<s>/12")))
def test_auto_tokenizer_gives_our_ids(run, loaded, text):
    tokenizer, (_, auto_tokenizer) = load_from_folder(run), loaded
    ids = tokenizer.encode(text)
    assert auto_tokenizer(text, add_special_tokens=False).input_ids == ids
    assert auto_tokenizer(text).input_ids == [tokenizer.begin_id, *ids]
    assert auto_tokenizer.decode(ids) == text


TEXTS = ("Ada has a drum.", "", " two  spaces ", "a </s> mark <s> in a text", "\u2581 é 漢\n")


def test_the_tokenizer_keeps_its_ids_through_transformers(run, loaded, exported, tmp_path):
    ours, (_, auto_tokenizer) = load_from_folder(run), loaded
    auto_tokenizer.save_pretrained(tmp_path)
    with_mark = transformers.AutoTokenizer.from_pretrained(exported, add_bos_token=True)
    without = transformers.AutoTokenizer.from_pretrained(exported, add_bos_token=False)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        ids = ours.encode(text)
        for tokenizer in (auto_tokenizer, with_mark, again):
            assert tokenizer(text).input_ids == [ours.begin_id, *ids]
            assert tokenizer(text, add_special_tokens=False).input_ids == ids
            assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
        assert without(text).input_ids == ids
    for tokenizer in (auto_tokenizer, again):
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (ours.begin_id, ours.end_id)
        assert (tokenizer.pad_token_id, tokenizer.unk_token_id) == (ours.end_id, 0)
        assert (tokenizer.model_max_length, len(tokenizer)) == (64, ours.vocab_size)
        assert tokenizer.chat_template is None
    assert not list(exported.glob("chat_template*"))


def test_generation_has_our_marks(run, loaded, exported):
    ours, (model, _) = load_from_folder(run), loaded
    for config in (transformers.GenerationConfig.from_pretrained(exported), model.generation_config):
        marks = (config.bos_token_id, config.eos_token_id, config.pad_token_id)
        assert marks == (ours.begin_id, ours.end_id, ours.end_id)


def test_generation_of_a_padded_batch_equals_single_texts(loaded):
    model, tokenizer = loaded
    texts = ["Ada has a", "12 plus 7"]
    alone = []
    for text in texts:
        ids = model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=8, do_sample=False)
        assert ids.shape[1] > len(tokenizer(text).input_ids)
        alone.append(tokenizer.decode(ids[0], skip_special_tokens=True))
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    together = model.generate(**batch, max_new_tokens=8, do_sample=False)
    assert tokenizer.batch_decode(together, skip_special_tokens=True) == alone
    assert all(generated.startswith(text) for generated, text in zip(alone, texts, strict=True))


def test_training_continues_from_the_export_at_the_same_loss(run, exported, corpus_folder, tmp_path, tmp_path_factory):
    base = small_run(corpus_folder, tmp_path, tmp_path_factory.getbasetemp())
    source = [f"model.initialize_from={exported}", f"tokenizer.model={exported / 'tokenizer.json'}"]
    assert train(load_settings(None, [*base, *source, "train.max_steps=2", "model.balancing=bias"])) == 0
    before, after = scalars(run), scalars(tmp_path / "runs" / "run")
    for domain in ("stories", "sums"):
        tag = f"loss/validation/{domain}"
        assert after[tag][0][1] == pytest.approx(before[tag][-1][1], abs=1e-5)
        assert before[tag][0][1] > before[tag][-1][1] + 0.5


def test_embedding_rows_beyond_the_tokenizer_are_kept(exported, corpus_folder, tmp_path, tmp_path_factory):
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    source_model = random_olmoe(tmp_path / "source", **sizes, num_key_value_heads=2, vocab_size=352)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(exported / name, tmp_path / "source")
    base = small_run(corpus_folder, tmp_path, tmp_path_factory.getbasetemp())
    source = [f"model.initialize_from={tmp_path / 'source'}", f"tokenizer.model={tmp_path / 'source/tokenizer.json'}"]
    settings = load_settings(None, [*base, *source, "train.max_steps=1"])
    model = initial_model(settings, prepare_corpus(settings).tokenizer, torch.float32)
    assert torch.equal(model.lm_head.weight, source_model.lm_head.weight)
    assert model.training
    assert train(settings) == 0
    opened = open_model(tmp_path / "runs" / "run")
    assert opened.model.lm_head.weight.shape == (352, 32)
    assert opened.tokenizer.vocab_size == 320
    assert export_hf.export(opened, tmp_path / "again") == []
    assert json.loads((tmp_path / "again" / "config.json").read_text())["vocab_size"] == 352


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.initialize_from=./nowhere"], "no such folder"),
        (["model.num_experts=4", "model.rope_theta=7.0"], r"set model.num_experts=8 model.rope_theta=10000.0$"),
        (["model.num_shared_experts=1"], "set model.num_shared_experts=0$"),
        (["model.num_key_value_heads=1"], "set model.num_key_value_heads=2$"),
        (["model.experts=dense"], "set model.experts=auto$"),
        (["tokenizer.model=null"], "set tokenizer.model=.*tokenizer.json$"),
        (["tokenizer.model={run}/tokenizer.model"], "tokenizer.model is not the tokenizer of"),
    ],
)
def test_incompatible_initialization_is_one_line(
    run, exported, corpus_folder, tmp_path, tmp_path_factory, overrides, message
):
    base = small_run(corpus_folder, tmp_path, tmp_path_factory.getbasetemp())
    source = [f"model.initialize_from={exported}", f"tokenizer.model={exported / 'tokenizer.json'}"]
    settings = load_settings(None, [*base, *source, *(override.format(run=run) for override in overrides)])
    with pytest.raises(SettingsError, match=message) as caught:
        initial_model(settings, prepare_corpus(settings).tokenizer, torch.float32)
    assert str(caught.value).startswith("model.initialize_from: ")
    assert "\n" not in str(caught.value)


def test_half_precision_halves_the_files(run, tmp_path):
    assert export_hf.main([str(run), str(tmp_path / "half"), "--dtype", "bfloat16"]) == 0
    model = transformers.OlmoeForCausalLM.from_pretrained(tmp_path / "half", dtype="auto")
    assert model.dtype == torch.bfloat16
    sizes = [p.numel() for p in model.parameters()]
    assert (tmp_path / "half" / "model.safetensors").stat().st_size == pytest.approx(2 * sum(sizes), rel=0.15)
    ours = open_model(run).model.state_dict()
    assert torch.equal(model.lm_head.weight, ours["lm_head.weight"].bfloat16())
    name = "model.layers.1.mlp.experts.gate_up_proj"
    assert torch.equal(model.get_parameter(name), ours[name].bfloat16())


def test_export_is_atomic_and_overwrites_nothing(run, exported, tmp_path, capsys, monkeypatch):
    assert export_hf.main([str(run), str(exported)]) == 2
    assert "nothing is overwritten" in capsys.readouterr().err

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(export_hf, "write_weights", full)
    assert export_hf.main([str(run), str(tmp_path / "new")]) == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("setting", ["model.num_shared_experts=1", "model.balancing=bias"])
def test_unsupported_settings_are_one_line(corpus_folder, tmp_path, tmp_path_factory, capsys, setting):
    base = small_run(corpus_folder, tmp_path, tmp_path_factory.getbasetemp())
    assert train(load_settings(None, [*base, setting, "train.max_steps=1"])) == 0
    capsys.readouterr()
    assert export_hf.main([str(tmp_path / "runs" / "run"), str(tmp_path / "new")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {setting}: transformers' OLMoE")
    assert error.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_a_missing_checkpoint_is_one_line_and_help_has_an_example(tmp_path, capsys):
    assert export_hf.main([str(tmp_path / "none"), str(tmp_path / "new")]) == 2
    assert "no such folder: give RUN" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        export_hf.main(["--help"])
    assert "python tools/export_hf.py runs/four_domains exported" in capsys.readouterr().out
