import json
import random

import pytest
import sentencepiece as spm
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain.data.tokenizer import SAMPLE_TEXTS, SentencePieceTokenizer, load_tokenizer, train_tokenizer
from moetrain.data.tokenizer_export import as_tokenizers, write_tokenizer
from tests.conftest import sentences, sums
from tests.data.test_tokenizer_json import byte_fallback, byte_level

tokenizers = pytest.importorskip("tokenizers")


def own():
    rng = random.Random(0)
    return train_tokenizer([sentences(rng, 20) for _ in range(50)] + [sums(rng, 20) for _ in range(50)], 400)


def of_runs():
    """A vocabulary of few symbols, in which overlapping merges compete."""
    return train_tokenizer(["aaaa aaa aa a ababab bababa aab abb\n" * 50, "    \n\n\n\t\t  \n" * 100], 330)


def spm_model(path, **changes):
    fields = {"model_type": "bpe", "vocab_size": 320, "byte_fallback": True, "hard_vocab_limit": False}
    fields |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "minloglevel": 2}
    texts = (sentences(random.Random(n), 5) for n in range(100))
    spm.SentencePieceTrainer.train(sentence_iterator=texts, model_prefix=str(path / "given"), **(fields | changes))
    return SentencePieceTokenizer((path / "given.model").read_bytes())


def with_symbols(path):
    return spm_model(path, user_defined_symbols=["<name>", "\u2581has\u2581a", "belongs", "\u2581\u2581"])


@pytest.fixture(scope="module", params=[own, of_runs, with_symbols, byte_level], ids=lambda make: make.__name__)
def pair(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("export")
    if request.param is byte_level:
        byte_level(["<s>", "</s>"]).save(str(path / "tokenizer.json"))
        tokenizer = load_tokenizer(path / "tokenizer.json")
    else:
        tokenizer = request.param(path) if request.param is with_symbols else request.param()
    return tokenizer, as_tokenizers(tokenizer)


PIECES = (
    "ab",
    "aab",
    "a",
    "b",
    " ",
    "  ",
    "\n",
    "\t",
    "\u2581",
    "<s>",
    "</s>",
    "<unk>",
    "<0x41>",
    "é",
    "漢",
    "🎉",
    "\x00",
)
WORDS = (
    "Ada",
    " has a",
    " has",
    " apple",
    ", so the",
    " belongs to ",
    "<name>",
    "12 plus 7 is 19.",
    " \u2581",
    "e\u0301",
)


@settings(max_examples=200, deadline=None)
@given(
    st.text(st.characters(exclude_categories=["Cs"]))
    | st.lists(st.sampled_from(PIECES), max_size=60).map("".join)
    | st.lists(st.sampled_from(WORDS + PIECES), max_size=40).map("".join)
)
def test_any_text_has_the_same_ids(pair, text):
    tokenizer, built = pair
    ids = tokenizer.encode(text)
    assert built.encode(text, add_special_tokens=False).ids == ids
    assert built.encode(text).ids == [tokenizer.begin_id, *ids]
    assert built.decode(ids) == text


def test_an_exported_tokenizer_loads_as_the_same_tokenizer(tmp_path):
    tokenizer = own()
    assert write_tokenizer(tokenizer, tmp_path, 64) == []
    again = load_tokenizer(tmp_path / "tokenizer.json")
    assert (again.vocab_size, again.begin_id, again.end_id) == (400, tokenizer.begin_id, tokenizer.end_id)
    assert again.token_bytes().tolist() == tokenizer.token_bytes().tolist()
    for text in SAMPLE_TEXTS:
        assert again.encode(text) == tokenizer.encode(text)


def test_a_note_says_that_u2581_is_read_as_a_space(tmp_path):
    byte_fallback().save(str(tmp_path / "tokenizer.json"))
    (note,) = write_tokenizer(load_tokenizer(tmp_path / "tokenizer.json"), tmp_path, 64)
    assert note.startswith("texts with U+2581 itself")


def with_unused(path):
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(spm_model(path).model)
    proto.pieces[270].type = sentencepiece_model_pb2.ModelProto.SentencePiece.UNUSED
    return SentencePieceTokenizer(proto.SerializeToString())


def with_equal_scores(path):
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(spm_model(path).model)
    proto.pieces[270].score = proto.pieces[271].score
    return SentencePieceTokenizer(proto.SerializeToString())


class Shifted(SentencePieceTokenizer):
    """Has ids that no tokenizer.json of this model gives."""

    def encode_all(self, texts, threads=1):
        return [[(i + 1) % self.vocab_size for i in ids] for ids in super().encode_all(texts, threads)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: spm_model(path, model_type="unigram"), "tokenizer.model is not a BPE model"),
        (with_unused, "has a piece that no text reaches"),
        (lambda path: spm_model(path, user_defined_symbols=["has a"]), r"no text reaches \('has a'\)"),
        (with_equal_scores, "has pieces of equal score"),
        (lambda path: Shifted(own().model), "a tokenizer.json cannot give this tokenizer's ids"),
    ],
)
def test_a_tokenizer_that_cannot_be_exported_is_an_error_of_one_line(tmp_path, make, message):
    with pytest.raises(ValueError, match=message) as caught:
        write_tokenizer(make(tmp_path), tmp_path, 64)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("make", [own, of_runs])
def test_the_order_of_merges_matters_to_such_texts(make):
    # Otherwise the fuzzed test could not detect a wrong order.
    built = as_tokenizers(make())
    tree = json.loads(built.to_str())
    tree["model"]["merges"].reverse()
    other = tokenizers.Tokenizer.from_str(json.dumps(tree))
    rng = random.Random(0)
    texts = ["".join(rng.choice(PIECES + WORDS) for _ in range(30)) for _ in range(50)]
    assert any(other.encode(text).ids != built.encode(text).ids for text in texts)
