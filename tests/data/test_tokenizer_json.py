import json
import random

import pytest
import sentencepiece as spm
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain.config import load_settings
from moetrain.data.corpus import prepare_corpus
from moetrain.data.documents import DataError
from moetrain.data.stream import training_stream
from moetrain.data.tokenizer import check_lossless, load_from_folder, load_tokenizer, train_tokenizer
from moetrain.data.tokenizer_export import write_tokenizer
from tests.conftest import sentences

tokenizers = pytest.importorskip("tokenizers")
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers  # noqa: E402

MARKS = ["<|endoftext|>"]


def byte_level(special=MARKS, normalizer=None):
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    if normalizer is not None:
        made.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([sentences(random.Random(0), 200)], trainer)
    return made


def byte_fallback():
    """In the form of Gemma's: spaces as U+2581, unknown characters as bytes."""
    pieces = [
        "<pad>",
        "<eos>",
        "<bos>",
        "<unk>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "\u2581",
        *"abcdehnorst",
        "th",
        "the",
    ]
    model = models.BPE(
        {piece: n for n, piece in enumerate(pieces)},
        [("t", "h"), ("th", "e")],
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    made = tokenizers.Tokenizer(model)
    made.normalizer = normalizers.Replace(" ", "\u2581")
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens(["<pad>", "<eos>", "<bos>", "<unk>"])
    made.add_tokens(["\n\n\n"])
    return made


@pytest.fixture(scope="module", params=[byte_level, byte_fallback], ids=["byte-level", "byte fallback"])
def tokenizer(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("json") / "tokenizer.json"
    request.param().save(str(path))
    return load_tokenizer(path)


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])) | st.text(st.sampled_from("the \n\u2581<|endoftext|>")))
def test_any_unicode_is_decoded_unchanged_and_its_bytes_counted(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())
    assert max(ids, default=0) < tokenizer.vocab_size
    assert tokenizer.begin_id not in ids
    assert tokenizer.end_id not in ids


def test_it_is_lossless_and_encodes_a_batch_like_single_texts(tokenizer):
    check_lossless(tokenizer)
    texts = ["the hat", "a \u2581 b", "", "<|endoftext|><eos>"]
    assert tokenizer.encode_all(texts, threads=2) == [tokenizer.encode(text) for text in texts]
    assert len(tokenizer.token_bytes()) == tokenizer.vocab_size
    with pytest.raises(ValueError, match="lone surrogate"):
        tokenizer.encode("a\ud800")


def test_marks_are_those_named_then_those_configured_then_common_ones(tmp_path):
    path = tmp_path / "tokenizer.json"
    made = byte_level(["<s>", "</s>", "<|x|>", "<|y|>"])
    made.save(str(path))

    def marks(*named):
        tokenizer = load_tokenizer(path, *named)
        return made.id_to_token(tokenizer.begin_id), made.id_to_token(tokenizer.end_id), tokenizer.fingerprint

    usual, named = marks(), marks("<|y|>", "<|x|>")
    assert usual[:2] == ("<s>", "</s>")
    assert named[:2] == ("<|y|>", "<|x|>")
    assert usual[2] != named[2]
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": {"content": "<|x|>"}, "eos_token": "<|y|>"})
    )
    assert marks()[:2] == ("<|x|>", "<|y|>")
    byte_level().save(str(path))
    (tmp_path / "tokenizer_config.json").unlink()
    one = load_tokenizer(path)
    assert one.begin_id == one.end_id == 0


def test_text_is_not_normalized_to_nfc(tmp_path):
    path = tmp_path / "tokenizer.json"
    composing = byte_level(normalizer=normalizers.NFC())  # as OLMoE's
    composing.save(str(path))
    tokenizer = load_tokenizer(path)
    check_lossless(tokenizer)
    composed = "Ünïcödé é"
    assert tokenizer.encode(composed) == composing.encode(composed).ids
    assert tokenizer.decode(tokenizer.encode("é")) == "é"
    tokenizer.save_in(tmp_path)
    assert load_from_folder(tmp_path).fingerprint == tokenizer.fingerprint


def with_added(*contents, **kind):
    """A byte-level tokenizer with more added tokens."""
    made = byte_level()
    made.add_tokens([tokenizers.AddedToken(content, **kind) for content in contents])
    return made


@pytest.mark.parametrize("kind", [{}, {"lstrip": True}, {"rstrip": True}, {"lstrip": True, "rstrip": True}])
@pytest.mark.parametrize("special", [False, True])
def test_white_space_beside_added_tokens_is_kept(tmp_path, kind, special):
    path = tmp_path / "tokenizer.json"
    with_added("<|user|>", "<|said|>", special=special, **kind).save(str(path))
    tokenizer = load_tokenizer(path)
    check_lossless(tokenizer)
    for text in ("a \n<|user|>\t b", " <|user|> <|said|>\n\n", "<|user|><|said|>"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.token_bytes()[ids].sum() == len(text.encode())
        assert (tokenizer._tokenizer.token_to_id("<|user|>") in ids) == (not special)
    assert with_added("<|user|>", special=special).encode("a<|user|>b").ids[-1] == tokenizer.encode("b")[-1]


def test_an_added_token_that_marks_documents_is_plain_text_within_one(tmp_path):
    """As in Phi-3, whose end mark is no special token."""
    path = tmp_path / "tokenizer.json"
    with_added("<|end|>", "<|other|>", rstrip=True).save(str(path))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    tokenizer = load_tokenizer(path)
    check_lossless(tokenizer)
    for text in ("chat <|end|> \nends", "<|end|>", "<|end|><|endoftext|><|other|>  "):
        ids = tokenizer.encode(text)
        assert tokenizer.end_id not in ids
        assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes()[tokenizer.end_id] == 0
    (tmp_path / "run").mkdir()
    tokenizer.save_in(tmp_path / "run")
    again = load_from_folder(tmp_path / "run")
    assert (again.fingerprint, again.end_id) == (tokenizer.fingerprint, tokenizer.end_id)


def test_a_mark_that_text_encodes_to_is_refused(tmp_path):
    """Its pieces merge to the mark, which is no added token."""
    made = byte_level(["<pad>"])
    model = json.loads(made.to_str())
    vocabulary, size = model["model"]["vocab"], len(model["model"]["vocab"])
    model["model"]["vocab"] = vocabulary | {"</": size, "</>": size + 1}
    model["model"]["merges"] += [["<", "/"], ["</", ">"]]
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(model))
    with pytest.raises(ValueError, match="it writes its marks as part of the text"):
        check_lossless(load_tokenizer(path, None, "</>"))
    check_lossless(load_tokenizer(path, None, "<pad>"))


def test_marks_may_be_named_in_special_tokens_map_alone(tmp_path):
    path = tmp_path / "tokenizer.json"
    made = byte_level(["<|x|>", "<|y|>", "<|z|>"])
    made.save(str(path))
    with pytest.raises(ValueError, match="no end mark is known: set tokenizer"):
        load_tokenizer(path)
    named = {"bos_token": "<|x|>", "eos_token": {"content": "<|y|>", "lstrip": False}}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(named))
    tokenizer = load_tokenizer(path)
    assert [made.id_to_token(i) for i in (tokenizer.begin_id, tokenizer.end_id)] == ["<|x|>", "<|y|>"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|z|>"}))
    tokenizer = load_tokenizer(path)
    assert [made.id_to_token(i) for i in (tokenizer.begin_id, tokenizer.end_id)] == ["<|x|>", "<|z|>"]


def test_a_common_end_mark_is_found_among_added_tokens_that_are_not_special(tmp_path):
    path = tmp_path / "tokenizer.json"
    made = byte_level(["<pad>"])
    made.add_tokens(["</s>"])
    made.save(str(path))
    assert load_tokenizer(path).end_id == made.token_to_id("</s>")


@pytest.mark.parametrize("steps", [["NFC"], ["NFC", "NFC"], [], [["NFC"], "NFC"]])
def test_normalization_to_nfc_within_a_sequence_is_left_out_too(tmp_path, steps):
    def normalizer(step):
        return normalizers.NFC() if step == "NFC" else normalizers.Sequence([normalizer(each) for each in step])

    path = tmp_path / "tokenizer.json"
    byte_level(normalizer=normalizer(steps)).save(str(path))
    tokenizer = load_tokenizer(path)
    check_lossless(tokenizer)
    assert (tokenizer.model == path.read_bytes()) == (steps == [])
    byte_level(normalizer=normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])).save(str(path))
    with pytest.raises(ValueError, match="it is not lossless"):
        check_lossless(load_tokenizer(path))


def test_another_tokenizer_or_none_helps_where_one_is_refused(corpus_folder, tmp_path):
    base = [f"data.root={corpus_folder}", "data.domains.d.path=stories.jsonl", f"data.cache_dir={tmp_path / 'cache'}"]
    path = tmp_path / "tokenizer.json"
    byte_level(normalizer=normalizers.Lowercase()).save(str(path))
    with pytest.raises(DataError, match=r"give another, or leave tokenizer\.model out: one is then trained"):
        prepare_corpus(load_settings(None, [*base, f"tokenizer.model={path}"]))
    assert prepare_corpus(load_settings(None, [*base, "tokenizer.vocab_size=320"])).tokenizer.vocab_size == 320
    with pytest.raises(DataError, match=r"give a SentencePiece \.model or a tokenizer\.json in it"):
        prepare_corpus(load_settings(None, [*base, f"tokenizer.model={tmp_path}"]))
    byte_level().save(str(path))
    assert prepare_corpus(load_settings(None, [*base, f"tokenizer.model={path}"])).tokenizer.vocab_size > 256


def unigram():
    made = tokenizers.Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "</s>": 2}, unk_token="[UNK]"))
    made.add_special_tokens(["</s>"])
    return made


@pytest.mark.parametrize(
    ("make", "overrides", "message"),
    [
        (
            lambda: byte_level(["[PAD]"]),
            [],
            r"no end mark is known: set tokenizer.end_token \(its added tokens: \[PAD\]\)",
        ),
        (byte_level, ["tokenizer.end_token=<none>"], r"it has no token '<none>' to mark documents with"),
        (lambda: byte_level(normalizer=normalizers.Lowercase()), [], "it is not lossless: .* comes back as"),
        (lambda: byte_level(normalizer=normalizers.NFKC()), [], "it is not lossless"),
        (lambda: with_added("ñ"), [], "it is not lossless: 'inñtext.*: give another, or leave tokenizer.model out"),
        (unigram, [], "neither byte-level nor has byte fallback"),
        (None, [], "not a tokenizer.json"),
    ],
)
def test_an_unusable_tokenizer_is_an_error_of_one_line(corpus_folder, tmp_path, make, overrides, message):
    path = tmp_path / "tokenizer.json"
    if make is None:
        path.write_text("{}")
    else:
        make().save(str(path))
    base = [f"data.root={corpus_folder}", "data.domains.d.path=stories.jsonl", f"data.cache_dir={tmp_path / 'cache'}"]
    with pytest.raises(DataError, match=message) as caught:
        prepare_corpus(load_settings(None, [*base, f"tokenizer.model={path}", *overrides]))
    assert str(caught.value).startswith(f"tokenizer.model: {path} cannot be used")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("make", [lambda: byte_level(normalizer=normalizers.NFKC()), unigram], ids=["NFKC", "words"])
def test_a_tokenizer_that_loses_text_is_accepted_if_asked(corpus_folder, tmp_path, make):
    path = tmp_path / "tokenizer.json"
    make().save(str(path))
    base = [f"data.root={corpus_folder}", "data.domains.d.path=stories.jsonl", f"data.cache_dir={tmp_path / 'cache'}"]
    chosen = load_settings(None, [*base, f"tokenizer.model={path}", "tokenizer.lossy=true"])
    corpus = prepare_corpus(chosen)
    assert len(corpus.domains[0].index) == 400
    theirs = tokenizers.Tokenizer.from_file(str(path))
    (first,) = read_texts(corpus_folder / "stories.jsonl", 1)
    wanted = theirs.encode(first, add_special_tokens=False).ids
    assert corpus.domains[0].tokens[: len(wanted)].tolist() == wanted
    corpus.tokenizer.save_in(tmp_path)
    assert load_from_folder(tmp_path).fingerprint == corpus.tokenizer.fingerprint
    (tmp_path / "exported").mkdir()
    assert write_tokenizer(corpus.tokenizer, tmp_path / "exported", 64) == []
    exported = tokenizers.Tokenizer.from_file(str(tmp_path / "exported" / "tokenizer.json"))
    assert exported.encode(first).ids == [corpus.tokenizer.begin_id, *wanted]


def test_marks_within_text_are_refused_although_text_may_be_lost(tmp_path):
    path = tmp_path / "tokenizer.json"
    made = tokenizers.Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "</s>": 2}, unk_token="[UNK]"))
    made.add_special_tokens(["[UNK]"])
    made.save(str(path))
    with pytest.raises(ValueError, match="it writes its marks as part of the text"):
        check_lossless(load_tokenizer(path, None, "[UNK]"), lossy=True)


def read_texts(path, count):
    with open(path) as file:
        return [json.loads(next(file))["text"] for _ in range(count)]


def test_a_run_can_use_it_with_several_workers(corpus_folder, tmp_path):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    chosen = load_settings(
        None,
        [
            f"data.root={corpus_folder}",
            "data.domains.stories.path=stories.jsonl",
            "data.domains.sums.path=sums.jsonl",
            f"data.cache_dir={tmp_path / 'cache'}",
            f"tokenizer.model={tmp_path / 'tokenizer.json'}",
            "data.workers=2",
            "data.seq_len=64",
            "panel.tokens=16",
        ],
    )
    corpus = prepare_corpus(chosen)
    stream = training_stream(corpus, chosen)
    text = corpus.tokenizer.decode(stream.sequence(0).tolist())
    assert "has a" in text or "belongs" in text
    again = prepare_corpus(chosen.model_copy(update={"data": chosen.data.model_copy(update={"workers": 1})}))
    assert again.fingerprint == corpus.fingerprint


def test_a_given_sentencepiece_model_keeps_every_space_or_is_refused(tmp_path):
    def train(**more):
        path = tmp_path / "given"
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter([sentences(random.Random(n), 5) for n in range(100)]),
            model_prefix=str(path),
            model_type="bpe",
            vocab_size=300,
            byte_fallback=True,
            hard_vocab_limit=False,
            minloglevel=2,
            **more,
        )
        return load_tokenizer(path.with_suffix(".model"))

    # As in Llama: a space is added before each text, which would count as a byte of it.
    given = train(normalization_rule_name="identity", remove_extra_whitespaces=False)
    check_lossless(given)
    for text in ("a  b", " a", "\u2581a \u2581"):
        ids = given.encode(text)
        assert given.decode(ids) == text
        assert given.token_bytes()[ids].sum() == len(text.encode())
    check_lossless(train_tokenizer([sentences(random.Random(0), 100)], 300))
    with pytest.raises(ValueError, match="it is not lossless"):
        check_lossless(train(normalization_rule_name="nmt_nfkc"))
