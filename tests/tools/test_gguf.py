"""What llama.cpp's converter asks of a folder, as far as its package gguf says: names of tensors, marks, the card."""

import json
import re

import pytest
from safetensors import safe_open

from moetrain.checkpoint.restore import open_model
from tests.tools.test_prepare_data import load_tool

gguf = pytest.importorskip("gguf", reason="pip install gguf")
pytest.importorskip("tokenizers")
export_hf = load_tool("export_hf")


@pytest.fixture(scope="module")
def exported(finished_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf") / "exported"
    export_hf.export(open_model(finished_run), folder)
    return folder


def test_every_tensor_has_a_name_in_ggufs_olmoe_and_none_is_missing(exported):
    config = json.loads((exported / "config.json").read_text())
    layers, architecture = config["num_hidden_layers"], gguf.MODEL_ARCH.OLMOE
    names = gguf.get_tensor_name_map(architecture, layers)
    with safe_open(exported / "model.safetensors", "np") as file:
        # The converter stacks the experts of a layer first.
        keys = {re.sub(r"experts\.\d+\.", "experts.", key) for key in file.keys()}  # noqa: SIM118
    found = {key: names.get_name(key, try_suffixes=(".weight",)) for key in keys}
    assert None not in found.values()
    wanted = {
        gguf.TENSOR_NAMES[tensor].format(bid=layer) + ".weight"
        for tensor in gguf.MODEL_TENSORS[architecture]
        for layer in range(layers)
    }
    assert set(found.values()) == wanted


def test_marks_are_found_and_only_the_begin_mark_is_added(exported, finished_run):
    tokenizer = open_model(finished_run).tokenizer
    vocabulary = gguf.SpecialVocab(exported, load_merges=True)
    ids = vocabulary.special_token_ids
    assert (ids["bos"], ids["eos"], ids["pad"]) == (tokenizer.begin_id, tokenizer.end_id, tokenizer.end_id)
    assert vocabulary.add_special_token == {"bos": True, "eos": False}
    assert vocabulary.chat_template is None
    tree = json.loads((exported / "tokenizer.json").read_text())
    assert len(vocabulary.merges) == len(tree["model"]["merges"]) > 0


def test_the_card_is_read(exported):
    metadata = gguf.Metadata.load(model_path=exported)
    assert {"olmoe", "mixture-of-experts", "moetrain"} <= set(metadata.tags)
