import sys
import types

import numpy as np
import pytest
import torch

from moetrain import grokking
from moetrain.config import SettingsError
from moetrain.data.errors import DataError
from moetrain.distributed.mesh import ParallelLayout
from moetrain.model_input import PackedTokens
from moetrain.probes.embeddings import item_text, mean_hidden_states, sentence_encoder
from moetrain.train import train
from tests.probes.conftest import item

ONE_RANK = ParallelLayout()
TEXTS = ["Ada has a candle", "3 plus 4 is 7.", "so", "the bread belongs to Eva. " * 5]


def slow_mean(model, ids):
    with torch.no_grad():
        hidden, _ = model.hidden_states(PackedTokens.one_sample_per_row(torch.tensor([ids])))
    return hidden[1:].mean(0).numpy()


@pytest.mark.parametrize("context_tokens", [1000, 12])
def test_embeddings_are_means_over_the_texts_tokens(model, tokenizer, context_tokens):
    texts = [tokenizer.encode(text) for text in TEXTS]
    slow = [slow_mean(model, [tokenizer.begin_id, *ids][:context_tokens]) for ids in texts]
    for batch_tokens in (1, 30, 1000):
        found = mean_hidden_states(model, texts, tokenizer, ONE_RANK, context_tokens, batch_tokens)
        assert found.dtype == np.float32
        assert np.allclose(found, slow, atol=1e-5)
    assert mean_hidden_states(model, [], tokenizer, ONE_RANK, context_tokens, 30).shape == (0, 32)


def test_similar_groups_are_paired(model, tokenizer):
    texts = [
        tokenizer.encode(text) for text in ("Ada has a candle", "Ben has a drum", "3 plus 4 is 7.", "9 plus 9 is 18")
    ]
    found = mean_hidden_states(model, texts, tokenizer, ONE_RANK, 100, 100)
    groups = {0: np.array([0]), 5: np.array([1])}
    pairs = grokking.pair_groups(groups, groups, found[[0, 2]], found[[3, 1]])
    assert [(pair.memorized_at, pair.generalized_at) for pair in pairs] == [(0, 5), (5, 0)]


def test_an_items_text_is_the_question_with_its_answer():
    assert item_text(item("Who?", choices=["Ada", "Ben"], answer=1)) == "Who? Ben"
    assert item_text(item("def f():\n", "    pass", sep="")) == "def f():\n    pass"


def test_a_text_without_tokens_is_refused(model, tokenizer):
    with pytest.raises(ValueError, match="a text without tokens has no embedding"):
        mean_hidden_states(model, [[5], []], tokenizer, ONE_RANK, 100, 100)


def test_sentence_transformers_models_are_loaded_by_name(monkeypatch):
    class SentenceTransformer:
        def __init__(self, name, trust_remote_code):
            assert not trust_remote_code
            if name != "small":
                raise OSError(f"no such model\n{name}")

        def encode(self, texts, convert_to_numpy, show_progress_bar):
            assert convert_to_numpy
            assert not show_progress_bar
            return np.array([[len(text), 1] for text in texts], np.float64)

    module = types.SimpleNamespace(SentenceTransformer=SentenceTransformer)
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    encode = sentence_encoder("small")
    assert encode(("a", "bcd")).tolist() == [[1, 1], [3, 1]]
    assert encode(["a"]).dtype == np.float32
    with pytest.raises(DataError, match=r"probes\.embeddings: large cannot be read: no such model large"):
        sentence_encoder("large")
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(SettingsError, match=r"pip install 'moetrain\[embeddings\]'"):
        sentence_encoder("small")


def small_encoder(folder):
    """A sentence-transformers model with random weights, of MiniLM's kind: BERT and a mean over tokens."""
    transformers = pytest.importorskip("transformers")
    package = pytest.importorskip("sentence_transformers", reason="needs pip install 'moetrain[embeddings]'")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "ada", "has", "a", "candle", "drum", "the", "so", "##s"]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(vocab_size=len(words), **shape)).save_pretrained(folder)
    transformers.BertTokenizer.from_pretrained(folder).save_pretrained(folder)
    package.SentenceTransformer(str(folder), device="cpu").save(str(folder / "encoder"))
    return str(folder / "encoder")


def test_a_sentence_encoder_embeds_by_the_mean_over_its_tokens(tmp_path):
    encode = sentence_encoder(small_encoder(tmp_path / "bert"))
    texts = ["Ada has a candle", "so", "the drums"]
    found = encode(texts)
    from transformers import AutoModel, AutoTokenizer

    tokenizer, bert = (kind.from_pretrained(tmp_path / "bert") for kind in (AutoTokenizer, AutoModel))
    with torch.no_grad():
        slow = [bert(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0).numpy() for text in texts]
    assert found.dtype == np.float32
    assert np.allclose(found, slow, atol=1e-5)
    assert np.linalg.norm(found[0] - found[1]) > 0.01


def test_an_encoder_that_cannot_be_loaded_ends_the_run_before_it_begins(make_settings, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(SettingsError, match=r"probes\.embeddings: needs a package"):
        train(make_settings("probes.embeddings=small"))
    assert not (tmp_path / "runs").exists()
