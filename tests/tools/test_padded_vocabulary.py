"""``tokenizer.pad_to``: rows of embedding and head beyond the tokenizer's ids are harmless in training and export."""

import json

import pytest
import torch

from moetrain.checkpoint.restore import open_model
from moetrain.config import SettingsError, load_settings
from moetrain.model_input import PackedTokens
from moetrain.train import train
from tests.conftest import small_run
from tests.tools.test_prepare_data import load_tool

transformers = pytest.importorskip("transformers")
export_hf = load_tool("export_hf")

IDS, ROWS = 320, 384


@pytest.fixture(scope="module")
def run(corpus_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("padded")
    base = small_run(corpus_folder, out, tmp_path_factory.getbasetemp())
    few = ["train.max_steps=30", "panel.readings=2", "train.checkpoint_every=15", "train.eval_every=15"]
    assert train(load_settings(None, [*base, *few, "tokenizer.pad_to=128"])) == 0
    return out / "runs" / "run"


def test_padded_rows_are_exported_and_nearly_never_predicted(run, tmp_path):
    folder = tmp_path / "exported"
    trained = open_model(run, dtype=torch.float32)
    assert trained.tokenizer.vocab_size == IDS
    assert trained.model.lm_head.weight.shape[0] == trained.model.model.embed_tokens.weight.shape[0] == ROWS
    assert export_hf.main([str(run), str(folder)]) == 0
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == ROWS
    model = transformers.OlmoeForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == IDS
    tokens = torch.tensor([tokenizer("Ada has a drum, so the drum belongs to Ada.").input_ids])
    targets = torch.cat([tokens[:, 1:], torch.full((1, 1), -100)], 1)
    with torch.no_grad():
        our_loss = trained.model(PackedTokens.one_sample_per_row(tokens, targets)).loss_BT[0, :-1]
        logits = model(tokens).logits[0, :-1]
    assert logits.shape[1] == ROWS
    theirs = torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="none")
    torch.testing.assert_close(our_loss, theirs, rtol=1e-5, atol=1e-5)
    share = logits.softmax(-1)[:, IDS:].sum(1)
    # At the start it is (384 - 320) / 384 = 17%. Nothing is ever trained towards it, so that it falls: to 2.7% in these
    # 30 steps of 1,024 tokens, to 4e-5 in 300.
    assert share.mean() < 0.05
    torch.manual_seed(0)
    written = model.generate(tokens[:, :4].repeat(32, 1), max_new_tokens=32, do_sample=True, pad_token_id=2)
    assert (written < IDS).float().mean() > 0.95
    tokenizer.batch_decode(written)


def test_a_vocabulary_that_fits_is_not_padded_and_a_given_model_takes_none(corpus_folder, tmp_path):
    base = small_run(corpus_folder, tmp_path, tmp_path)
    settings = load_settings(None, [*base, "tokenizer.pad_to=64"])
    assert [settings.tokenizer.rows(size) for size in (1, 64, 65, 320, 129_280)] == [64, 64, 128, 320, 129_280]
    with pytest.raises(SettingsError, match=r"pad_to has no effect with model.initialize_from"):
        load_settings(None, [*base, "tokenizer.pad_to=64", "model.initialize_from=a", "tokenizer.model=b"])
