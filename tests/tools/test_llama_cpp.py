"""Exported models in llama.cpp itself: its converter, from a checkout, and its library, from the package xllamacpp.

Set LLAMA_CPP to the checkout (that in llama-cpp-python's source distribution was used: 0.3.36) to run this.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from moetrain.checkpoint.restore import open_model
from moetrain.config import ModelSettings
from moetrain.models.hf import olmoe_config, write_weights
from moetrain.models.serving import serving_limits
from moetrain.models.transformer import Transformer
from tests.probes.references import logits
from tests.tools.test_prepare_data import load_tool

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("LLAMA_CPP" not in os.environ, reason="LLAMA_CPP names no checkout of llama.cpp"),
    pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="pip install xllamacpp"),
]
TEXTS = ("Ada has a drum.", "12 plus 7 is", " two  spaces é 漢", "a", "Ada </s> has <s>")

# What moetrain/models/README.md adds to the converter for a tokenizer that it does not know.
CONVERT = """
import runpy, sys
from pathlib import Path

checkout, *arguments = sys.argv[1:]
sys.path[:0] = [checkout, str(Path(checkout) / "gguf-py")]
from conversion.olmo import OlmoeModel as model

def set_vocab(self):
    self._set_vocab_sentencepiece()
    self.gguf_writer.add_add_space_prefix(False)

model.set_vocab = set_vocab
sys.argv = ["convert_hf_to_gguf.py", *arguments]
runpy.run_path(str(Path(checkout) / "convert_hf_to_gguf.py"), run_name="__main__")
"""

ASK = """
import json, sys, urllib.request
import xllamacpp

parameters = xllamacpp.CommonParams()
parameters.model.path, parameters.n_ctx, parameters.n_gpu_layers, parameters.warmup = sys.argv[1], 256, 0, False
parameters.cpuparams.n_threads = 1
server = xllamacpp.Server(parameters)

def post(path, content):
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(server.listening_address + path, json.dumps(content).encode(), headers)
    return json.load(urllib.request.urlopen(request, timeout=60))

answers = []
for text in json.loads(sys.argv[2]):
    ids = post("/tokenize", {"content": text, "add_special": True, "parse_special": False})["tokens"]
    asked = {"prompt": ids, "n_predict": 1, "n_probs": 20, "temperature": -1, "cache_prompt": False}
    found = post("/completion", asked)["completion_probabilities"][0]["top_logprobs"]
    answers.append([ids, {each["id"]: each["logprob"] for each in found}])
print(json.dumps(answers))
"""


@pytest.fixture
def exported(finished_run, tmp_path):
    folder = tmp_path / "exported"
    load_tool("export_hf").export(open_model(finished_run), folder)
    shutil.copy(finished_run / "tokenizer.model", folder)
    return folder


def converted(folder, script=CONVERT):
    target = folder.with_suffix(".gguf")
    command = [sys.executable, "-c", script, os.environ["LLAMA_CPP"], str(folder), "--outfile", str(target)]
    done = subprocess.run([*command, "--outtype", "f32"], capture_output=True, text=True, check=False)
    return target, done


def answers(gguf):
    """For each text its ids and the log-probabilities of the likeliest next tokens; None where the model is refused."""
    command = [sys.executable, "-c", ASK, str(gguf), json.dumps(TEXTS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def largest_difference(model, found):
    """Between our log-probabilities and those of llama.cpp, nats."""
    differences = []
    for ids, top in found:
        ours = logits(model, ids)[-1].log_softmax(-1)
        differences += [abs(float(ours[int(token)]) - value) for token, value in top.items()]
    return max(differences)


def test_ids_and_log_probabilities_are_ours(exported, finished_run):
    gguf, done = converted(exported)
    assert done.returncode == 0, done.stderr[-2000:]
    trained = open_model(finished_run, dtype=torch.float32)
    found = answers(gguf)
    for text, (ids, _) in zip(TEXTS, found, strict=True):
        assert ids == [trained.tokenizer.begin_id, *trained.tokenizer.encode(text)]
    assert largest_difference(trained.model, found) < 0.01  # its cache of keys and values is in float16


def test_an_own_tokenizer_is_refused_by_the_converter_as_it_is(exported):
    _, done = converted(exported, CONVERT.replace("model.set_vocab = set_vocab", ""))
    assert done.returncode != 0
    assert "BPE pre-tokenizer was not recognized" in done.stderr


@pytest.mark.parametrize(
    "change",
    [{}, {"norm_topk_prob": True}, {"rms_norm_eps": 1e-2}, {"tie_word_embeddings": True}, {"num_key_value_heads": 2}],
    ids=str,
)
def test_what_is_said_to_stand_against_a_model_does(exported, change):
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    settings = ModelSettings(**sizes, num_experts=8, num_experts_per_tok=2, **change)
    torch.manual_seed(0)
    model = Transformer(settings, 320, torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.uniform_(0.5, 1.5) if "norm" in name else parameter.normal_(0, 0.2)
    config = olmoe_config(settings, 320, 64, 1, 2, torch.float32)
    write_weights(model, exported, torch.float32)
    (exported / "config.json").write_text(json.dumps(config))
    gguf, done = converted(exported)
    found = answers(gguf) if done.returncode == 0 else None
    limits = serving_limits(config)["llama.cpp"]
    assert len(limits) == len(change)
    if any("refuses" in limit for limit in limits):
        assert found is None
    else:
        assert (largest_difference(model, found) > 0.05) == bool(limits)
