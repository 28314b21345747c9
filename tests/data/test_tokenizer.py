import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain.data.errors import DataError
from moetrain.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from tests.conftest import sentences, sums


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    rng = random.Random(0)
    return train_tokenizer([sentences(rng, 20) for _ in range(50)] + [sums(rng, 20) for _ in range(50)], 400)


@pytest.mark.parametrize(
    "text", ["\u2581", " \u2581 a\u2581", "  x \t\r\n", "\x00", "<s></s><unk><0x41>", "漢字 é 🎉 \u3000\xa0"]
)
def test_any_text_is_decoded_unchanged(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=500, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_unicode_is_decoded_unchanged_and_its_bytes_counted(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())
    assert tokenizer.begin_id not in ids
    assert tokenizer.end_id not in ids


def test_a_lone_surrogate_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"lone surrogate \(U\+D800\) at character 2"):
        tokenizer.encode("ab\ud800")


def test_training_gives_the_same_vocabulary_each_time(tokenizer):
    rng = random.Random(0)
    again = train_tokenizer([sentences(rng, 20) for _ in range(50)] + [sums(rng, 20) for _ in range(50)], 400)
    assert again.model == tokenizer.model
    assert again.vocab_size == 400


def test_a_vocabulary_too_small_for_the_characters_says_how_many_there_are():
    many = "".join(chr(0x4E00 + n) for n in range(200))
    with pytest.raises(DataError, match=r"vocab_size 300 is too small: .* alone are \d+ pieces: raise it"):
        train_tokenizer([many] * 20, 300)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), DataError("a file is gone"), MemoryError()])
def test_what_reading_the_texts_raises_is_raised(error):
    def texts():
        yield "some text"
        raise error

    with pytest.raises(type(error)) as caught:
        train_tokenizer(texts(), 320)
    assert caught.value is error


def test_a_lone_surrogate_in_the_texts_is_refused():
    with pytest.raises(ValueError, match="lone surrogate"):
        train_tokenizer(["some text", "\ud800"], 320)


def test_a_tiny_text_gives_a_smaller_vocabulary_that_still_encodes_all():
    tokenizer = train_tokenizer(["abc"], 4000)
    assert tokenizer.vocab_size < 300
    assert tokenizer.decode(tokenizer.encode("xyz é")) == "xyz é"


def test_text_beyond_the_longest_sentence_is_trained_on():
    # SentencePiece skips sentences this long; the rare word must still become a piece.
    tokenizer = train_tokenizer(["quixotic " * 2000], 320)
    assert len(tokenizer.encode("quixotic")) == 1


def test_a_batch_is_encoded_like_single_texts(tokenizer):
    texts = ["Ada has", "a \u2581 b", "", "3 plus 4"]
    assert tokenizer.encode_all(texts, threads=2) == [tokenizer.encode(text) for text in texts]


def test_a_saved_model_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "t.model")
    assert load_tokenizer(tmp_path / "t.model").fingerprint == tokenizer.fingerprint
