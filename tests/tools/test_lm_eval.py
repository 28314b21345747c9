"""lm-evaluation-harness on an exported model, against our model's log-probabilities."""

import json
import math
import os
import random
import re
import subprocess
import sys

import pytest
import torch

from moetrain.checkpoint.restore import open_model
from moetrain.config import load_settings
from moetrain.model_input import PackedTokens
from moetrain.train import train
from tests.conftest import sentences, small_run, sums
from tests.test_readme import README
from tests.tools.test_prepare_data import load_tool

pytest.importorskip("lm_eval", reason="pip install 'moetrain[lm-eval]'")
pytestmark = pytest.mark.slow

TASKS = {
    "small_task": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
""",
    "small_text": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
""",
}


@pytest.fixture
def items():
    rng = random.Random(1)
    made = []
    for _ in range(24):
        a, b = rng.randint(0, 20), rng.randint(0, 20)
        wrong = rng.sample([n for n in range(41) if n != a + b], 2)
        made.append({"question": f"{a} plus {b} is", "choices": [str(n) for n in (a + b, *wrong)], "answer": 0})
    # Text with special tokens, bytes and spaces that are easily tokenized differently.
    made.append({"question": "Ada\u2581 </s> has é", "choices": ["a drum.", "a <s> apple"], "answer": 0})
    return made


def log_probability(trained, context, continuation):
    """The log-probability of a continuation, from the logits of one sequence that begins with the begin token."""
    tokenizer, model = trained.tokenizer, trained.model
    sequence, before = tokenizer.encode(context + continuation), tokenizer.encode(context)
    tokens = torch.tensor([[tokenizer.begin_id, *sequence]])
    length = tokens.shape[1]
    with torch.no_grad():
        hidden, _ = model.hidden_states(PackedTokens.one_sample_per_row(tokens))
        probabilities = (hidden @ model.lm_head.weight.T).log_softmax(-1)
    first = 1 + len(before)
    return float(sum(probabilities[place - 1, tokens[0, place]] for place in range(first, length)))


def probed(run, items, folder):
    """The same items evaluated by tools/probe.py."""
    about = {"domain": "sums", "task": "small_sums", "sep": " "}
    named = [{**item, **about, "prompt": item["question"], "id": str(n)} for n, item in enumerate(items)]
    (folder / "ours.jsonl").write_text("\n".join(map(json.dumps, named)) + "\n")
    written = folder / "probed.json"
    given = [str(run), str(folder / "ours.jsonl"), "--dtype", "float32", "--json", str(written)]
    assert load_tool("probe").main(given) == 0
    return [item["choice_logprobs"] for item in json.loads(written.read_text())["tasks"]["small_sums"]["items"]]


@pytest.fixture(scope="module")
def run(corpus_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm_eval")
    few = ["train.max_steps=30", "panel.readings=2", "train.checkpoint_every=30", "train.eval_every=30"]
    assert train(load_settings(None, [*small_run(corpus_folder, folder, folder / "cache"), *few])) == 0
    return folder / "runs" / "run"


@pytest.fixture(scope="module")
def exported(run):
    folder = run.parent.parent / "exported"
    assert load_tool("export_hf").main([str(run), str(folder)]) == 0
    return folder


def evaluated(task, items, exported, folder):
    """Run README's command, but for the names, on a task; returns the samples in order, and the scores."""
    asked = f"my_{task.split('_')[1]}"
    (said,) = [line for line in README.splitlines() if "lm_eval --model hf" in line and f"--tasks {asked}" in line]
    tasks = folder / "tasks"
    tasks.mkdir()
    (tasks / "items.jsonl").write_text("\n".join(map(json.dumps, items)) + "\n")
    data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {tasks / 'items.jsonl'}}}}}\ntest_split: test\n"
    (tasks / f"{task}.yaml").write_text(f"task: {task}\n{data}{TASKS[task]}")
    names = {"lm_eval": f"{sys.executable} -m lm_eval", "my_tasks": str(tasks), asked: task}
    named = re.sub("|".join(names), lambda found: names[found[0]], said.partition("#")[0])
    named = named.replace("pretrained=exported", f"pretrained={exported}")
    results = f"--device cpu --batch_size 8 --output_path {folder / 'results'} --log_samples"
    cache = {"HF_HOME": str(folder / "hub"), "HF_DATASETS_CACHE": str(folder / "sets"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*named.split(), *results.split()], env=os.environ | cache, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (samples,) = (folder / "results").rglob(f"samples_{task}_*.jsonl")
    (scores,) = (folder / "results").rglob("results_*.json")
    lines = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda line: line["doc_id"])
    return lines, json.loads(scores.read_text())["results"][task]


def test_rolling_likelihood_equals_our_loss_of_whole_texts(run, exported, tmp_path):
    rng = random.Random(2)
    texts = [sentences(rng, 1), sums(rng, 2), "12 plus 7 is 19.", "Ada\u2581 </s> has é"]
    lines, scores = evaluated("small_text", [{"text": text} for text in texts], exported, tmp_path)
    trained = open_model(run, dtype=torch.float32)
    assert all(len(trained.tokenizer.encode(text)) < 64 for text in texts)  # one window of the harness
    ours = [log_probability(trained, "", text) for text in texts]
    harness = [float(line["resps"][0][0]) for line in lines]
    assert harness == pytest.approx(ours, abs=1e-3)
    bits = -sum(ours) / math.log(2) / sum(len(text.encode()) for text in texts)
    assert scores["bits_per_byte,none"] == pytest.approx(bits, rel=1e-4)


def test_log_probabilities_equal_ours(run, exported, items, tmp_path):
    lines, scores = evaluated("small_task", items, exported, tmp_path)
    harness = [[float(response[0][0]) for response in line["resps"]] for line in lines]
    trained = open_model(run, dtype=torch.float32)
    ours = [[log_probability(trained, item["question"], f" {c}") for c in item["choices"]] for item in items]
    assert [line["doc"]["question"] for line in lines] == [item["question"] for item in items]
    for row, harness_row in zip(ours, harness, strict=True):
        assert harness_row == pytest.approx(row, abs=1e-4)
        assert max(row) - min(row) > 0.01  # far more than the tolerance
    assert probed(run, items, tmp_path) == [pytest.approx(row, abs=1e-4) for row in harness]
    assert scores["acc,none"] == pytest.approx(sum(row[0] == max(row) for row in ours) / len(items))
