"""The tool on a small run: its output, that the probed model has the adapters, and its errors."""

import copy
import json
import random

import pytest
import torch

from moetrain.checkpoint.restore import open_model
from moetrain.config import load_settings
from moetrain.data.instructions import read_instructions
from moetrain.probes.fine_tuning import LoraSettings
from moetrain.probes.tasks import read_entries, tasks_of
from moetrain.train import train
from tests.conftest import small_run

pytest.importorskip("peft", reason="the extra 'instruct' is not installed")
import export_hf
import instruct_probe
import probe

FAST = ["--rank", "4", "--learning-rate", "0.01", "--epochs", "3", "--batch-size", "8"]


@pytest.fixture(scope="module")
def run(corpus_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("instructed")
    base = small_run(corpus_folder, out, tmp_path_factory.getbasetemp())
    few = ["train.max_steps=10", "panel.readings=2", "train.checkpoint_every=10", "train.eval_every=10"]
    assert train(load_settings(None, [*base, *few])) == 0
    return out / "runs" / "run"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Instructions to add, in three forms, and questions of the same kind: 20 of the form of a probe occur in both."""
    folder, rng = tmp_path_factory.mktemp("instructions"), random.Random(0)
    pairs = [(a, b) for a in range(12) for b in range(12)]
    rng.shuffle(pairs)
    prompts = {pair: f"What do you have after {pair[0]} apples and then {pair[1]} more of them?" for pair in pairs}
    rows = []
    for number, pair in enumerate(pairs[:60]):
        question, answer = prompts[pair], f"{sum(pair)} apples."
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        forms = [
            {"prompt": f"{question}\nAnswer:", "answer": answer},
            {"instruction": question, "input": "", "output": answer},
            {"messages": turns},
        ]
        rows.append(forms[number % 3])
    write(folder / "apples.jsonl", rows)
    items = []
    for pair in pairs[40:100]:
        item = {"domain": "sums", "task": "apples", "id": str(pair), "prompt": f"{prompts[pair]}\nAnswer:", "sep": " "}
        right = sum(pair) % 3
        choices = [f"{sum(pair) + number - right} apples." for number in range(3)]
        items.append(item | {"choices": choices, "answer": right})
    write(folder / "items.jsonl", items)
    answers = [item["choices"][item["answer"]] for item in items]
    open_items = [plain(item) | {"task": "open", "target": right} for item, right in zip(items, answers, strict=True)]
    write(folder / "open.jsonl", open_items)
    return folder


def plain(item):
    return {key: value for key, value in item.items() if key not in ("choices", "answer")}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def tuned(run, files, *more):
    given = [str(run), str(files / "items.jsonl"), str(files / "open.jsonl")]
    return instruct_probe.main([*given, "--instructions", str(files / "apples.jsonl"), *FAST, *more])


@pytest.fixture(scope="module")
def record(run, files):
    """The record of one fine-tuning; the adapters are written too."""
    assert tuned(run, files, "--json", str(files / "found.json"), "--output", str(files / "adapters")) == 0
    return json.loads((files / "found.json").read_text())


def test_scores_before_equal_the_probe_tools_and_scores_after_differ(run, files, record):
    tasks = [str(files / "items.jsonl"), str(files / "open.jsonl")]
    assert probe.main([str(run), *tasks, "--json", str(files / "probed.json")]) == 0
    probed = json.loads((files / "probed.json").read_text())
    assert {key: record[key] for key in ("checkpoint", "step", "precision")} == {
        key: probed[key] for key in ("checkpoint", "step", "precision")
    }
    assert list(record["before"]) == list(record["tasks"]) == ["apples", "open"]
    for task, before in record["before"].items():
        after = record["tasks"][task]
        known = {item["id"]: item["choice_logprobs"] for item in probed["tasks"][task]["items"]}
        assert len(known) == 60
        for item in before["items"]:
            assert item["choice_logprobs"] == pytest.approx(known[item["id"]], abs=1e-4)
        assert [item["id"] for item in after["items"]] == [item["id"] for item in before["items"]]
        assert after["bpb"] < before["bpb"] - 0.2
        gained = record["change"][task]
        assert gained["accuracy"] == pytest.approx(after["accuracy"] - before["accuracy"])
        assert gained["n"] == after["n"]


def test_items_that_occur_in_the_instructions_are_excluded(run, files, record, capsys):
    assert record["contaminated"] == {"apples": 20, "open": 20}
    assert record["tasks"]["apples"]["n"] == 40
    capsys.readouterr()
    only = [str(run), str(files / "items.jsonl"), "--instructions", str(files / "apples.jsonl"), "--epochs", "1"]
    assert instruct_probe.main([*only, "--contaminated", "keep", "--json", str(files / "kept.json")]) == 0
    assert json.loads((files / "kept.json").read_text())["tasks"]["apples"]["n"] == 60
    assert "occur in the instructions, kept: 20 of apples" in capsys.readouterr().out
    write(files / "same.jsonl", [json.loads(line) for line in (files / "items.jsonl").read_text().splitlines()[:20]])
    assert instruct_probe.main([str(run), str(files / "same.jsonl"), *only[2:]]) == 2
    assert "every item occurs in the instructions" in capsys.readouterr().err


def test_the_settings_and_losses_are_recorded(run, record):
    done = record["fine_tuning"]
    assert done["examples"] == 60
    assert done["steps"] == len(done["losses"]) == 3 * 8
    assert done["loss_by_epoch"][-1] < done["loss_by_epoch"][0] - 0.1
    assert done["loss_by_epoch"][0] == pytest.approx(sum(done["losses"][:8]) / 8)
    assert done["parameters"] == 3 * 3 * 4 * (32 + 32)
    given = {"rank": 4, "alpha": 8.0, "dropout": 0.1, "learning_rate": 0.01, "epochs": 3, "batch_size": 8}
    assert {key: done[key] for key in given} == given
    assert done["seed"] == open_model(run).settings.run.seed


def test_the_same_seed_writes_the_same_file(run, files, record):
    again = files / "again.json"
    assert tuned(run, files, "--json", str(again)) == 0
    assert again.read_bytes() == (files / "found.json").read_bytes()
    assert tuned(run, files, "--json", str(again), "--seed", "9", "--epochs", "1") == 0
    assert json.loads(again.read_text())["fine_tuning"]["losses"][0] != record["fine_tuning"]["losses"][0]


def test_the_adapters_load_onto_the_exported_model_and_give_the_same_scores(run, files, record):
    """Our LoRA is compared with transformers' model and peft's loading."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    trained = open_model(run, dtype=torch.float32)
    export_hf.export(trained, files / "exported")
    theirs = transformers.OlmoeForCausalLM.from_pretrained(files / "exported").eval()
    adapted = peft.PeftModel.from_pretrained(theirs, files / "adapters").eval()
    tokenizer = trained.tokenizer
    items = {item["id"]: item for item in map(json.loads, (files / "open.jsonl").read_text().splitlines())}
    for kept in record["tasks"]["open"]["items"][:10]:
        item = items[kept["id"]]
        whole = tokenizer.encode(f"{item['prompt']} {item['target']}")
        first = 1 + len(tokenizer.encode(item["prompt"]))
        tokens = torch.tensor([[tokenizer.begin_id, *whole]])
        with torch.no_grad():
            log_probs = adapted(tokens).logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
        assert kept["choice_logprobs"] == pytest.approx([log_probs[first - 1 :].sum().item()], abs=1e-3)


def test_the_function_prints_nothing_and_keeps_the_checkpoint(run, files, capsys):
    trained = open_model(run)
    before = copy.deepcopy(trained.model.state_dict())
    examples = read_instructions([files / "apples.jsonl"])
    tasks = tasks_of(read_entries([str(files / "open.jsonl")], ".", "tasks"), limit=5)
    capsys.readouterr()
    settings = LoraSettings(rank=2, epochs=1, modules=("q_proj",))
    found = instruct_probe.instruct_probe(trained, examples, tasks, settings, 1000, max_new_tokens=2)
    assert capsys.readouterr().out == ""
    assert found.tuned.parameters == 3 * 2 * (32 + 32)
    assert {"exact_match", "accuracy"} <= set(found.after["open"].metrics)
    after = {name.replace(".base_layer", ""): value for name, value in trained.model.state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(torch.equal(value, before[name]) for name, value in open_model(run).model.state_dict().items())


def test_the_terminal_shows_progress_scores_and_the_change(run, files, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert tuned(run, files, "--limit", "6", "--epochs", "1") == 0
    shown = " ".join(capsys.readouterr().out.split())
    for part in (
        "probing before fine-tuning",
        "step 8/8 loss",
        "probing after fine-tuning",
        "fine-tuned 6 0.333",
        "accuracy of apples changed by",
        "8 steps trained 2,304 parameters; loss by epoch:",
        "items that occur in the instructions, excluded: 20 of apples, 20 of open",
        "too few items (under 100) for precise numbers: apples, open",
    ):
        assert part in shown


def test_unusable_input_is_a_one_line_error(run, files, capsys):
    write(files / "bad.jsonl", [{"prompt": "a", "answer": "b"}, {"prompt": "a"}])
    cases = {
        "bad.jsonl:2: answer is missing": ["--instructions", str(files / "bad.jsonl")],
        "--instructions: no file at": ["--instructions", str(files / "none.jsonl")],
        "no module 'query' to tune: choose of k_proj": ["--modules", "query"],
        "rank is 0: give 1 or more": ["--rank", "0"],
        "nothing is overwritten": ["--output", str(files)],
    }
    for message, more in cases.items():
        assert tuned(run, files, *more) == 2
        complaint = " ".join(capsys.readouterr().err.split())
        assert message in complaint
        assert complaint.startswith("error: ")
    with pytest.raises(SystemExit):
        instruct_probe.main(["--help"])
    assert "python tools/instruct_probe.py runs/four_domains" in capsys.readouterr().out
