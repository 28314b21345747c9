"""Remedies that error messages name are followed here to the letter; those of data files are followed in tests/data."""

import json
import re

import pytest
import torch

from moetrain.config import SettingsError
from moetrain.data.corpus import prepare_corpus
from moetrain.data.errors import DataError
from moetrain.train import train
from moetrain.training.initialize import initial_model
from tests.tools.test_prepare_data import load_tool

SETTING = re.compile(r"\b[a-z]+\.[a-z_.]+=[^\s,;:]+")


@pytest.fixture(scope="module")
def exported(finished_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "exported"
    assert load_tool("export_hf").main([str(finished_run), str(folder)]) == 0
    return folder


@pytest.mark.parametrize(
    ("overrides", "steps"),
    [
        (["model.num_experts=4", "model.rope_theta=7.0"], 1),
        (["model.num_shared_experts=1"], 1),
        (["model.num_key_value_heads=1", "model.tie_word_embeddings=true"], 1),
        (["model.experts=dense"], 1),
        (["tokenizer.model=null"], 1),
        (["tokenizer.model=null", "model.hidden_size=64", "model.experts=dense"], 3),
    ],
    ids=str,
)
def test_what_is_proposed_for_weights_of_other_settings_leads_to_a_model(exported, make_settings, overrides, steps):
    source = [f"model.initialize_from={exported}", f"tokenizer.model={exported / 'tokenizer.json'}"]
    overrides = [*source, *overrides]
    for _ in range(steps):
        settings = make_settings(*overrides)
        tokenizer = prepare_corpus(settings).tokenizer
        with pytest.raises(SettingsError) as caught:
            initial_model(settings, tokenizer, torch.float32)
        overrides += SETTING.findall(str(caught.value).partition(": set ")[2])
    settings = make_settings(*overrides)
    assert initial_model(settings, prepare_corpus(settings).tokenizer, torch.float32).settings == settings.model


@pytest.mark.parametrize(
    "overrides",
    [
        ["optim.state_precision=bf16", "optim.beta1=0.99", "optim.beta2=0.999"],
        ["data.domains.sums.weight=2.0"],
        ["tokenizer.begin_token=<s>"],
        ["data.domains.stories.repeats_within=0.5"],
        ["model.num_experts_per_tok=9"],
        ["panel.tokens=63"],
    ],
    ids=str,
)
def test_what_is_proposed_for_settings_that_contradict_each_other_is_accepted(make_settings, overrides):
    with pytest.raises(SettingsError) as caught:
        make_settings(*overrides)
    remedies = {
        "set both to 0.98 or less": ["optim.beta1=0.98", "optim.beta2=0.98"],
        "set data.mixture=weights": ["data.mixture=weights", "data.domains.stories.weight=1.0"],
        "set tokenizer.model to one": ["tokenizer.model=tokenizer.json"],
        "or raise repeats": ["data.domains.stories.repeats=2"],
        "lower it": ["model.num_experts_per_tok=8"],
        "lower panel.tokens": ["panel.tokens=62"],
    }
    (proposed,) = [change for words, change in remedies.items() if words in str(caught.value)]
    make_settings(*overrides, *proposed)


def test_what_is_proposed_for_too_little_text_works(make_settings):
    settings = ["train.batch_rows=100000", "train.max_steps=1"]
    with pytest.raises(DataError, match=r"or lower train\.batch_rows"):
        train(make_settings(*settings))
    assert train(make_settings(*settings, "train.batch_rows=16")) == 0


def test_what_is_proposed_for_a_vocabulary_too_small_for_the_characters_works(make_settings, tmp_path):
    words = ["".join(map(chr, range(start, start + 20))) for start in range(0x4E00, 0x4E00 + 400, 20)]
    lines = [json.dumps({"text": f"{number} " + " ".join(words)}) for number in range(50)]
    (tmp_path / "signs.jsonl").write_text("\n".join(lines))
    settings = [f"data.domains.stories.path={tmp_path / 'signs.jsonl'}", "tokenizer.vocab_size=300"]
    with pytest.raises(DataError, match=r"are \d+ pieces: raise it") as caught:
        prepare_corpus(make_settings(*settings))
    (least,) = re.findall(r"are (\d+) pieces", str(caught.value))
    corpus = prepare_corpus(make_settings(*settings, f"tokenizer.vocab_size={least}"))
    assert corpus.tokenizer.vocab_size == int(least) > 300
