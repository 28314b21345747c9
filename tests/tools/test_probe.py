import json

import probe
import pytest

from moetrain.checkpoint.restore import open_model
from moetrain.config import load_settings
from moetrain.train import train
from tests.conftest import small_run
from tests.probes.conftest import some_items
from tests.probes.references import log_probability


@pytest.fixture(scope="module")
def run(corpus_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("probed")
    base = small_run(corpus_folder, out, tmp_path_factory.getbasetemp())
    few = ["train.max_steps=4", "panel.readings=2", "train.checkpoint_every=2", "train.eval_every=4"]
    assert train(load_settings(None, [*base, *few])) == 0
    return out / "runs" / "run"


@pytest.fixture
def files(tmp_path):
    items = some_items(10)
    for task in ("mc", "open", "text"):
        rows = [json.dumps({**item, "domain": "sums"}) + "\n" for item in items if item["task"] == task]
        (tmp_path / f"{task}.jsonl").write_text("".join(rows))
    return tmp_path


def test_all_numbers_are_written_and_shown(run, files, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    listed = files / "found.json"
    given = [str(files / name) for name in ("mc.jsonl", "[ot]*.jsonl")]
    assert probe.main([str(run), *given, "--json", str(listed)]) == 0
    record = json.loads(listed.read_text())
    assert record["step"] == 4
    assert list(record["tasks"]) == ["mc", "open", "text"]
    trained = open_model(run)
    for item, kept in zip(some_items(10)[::3], record["tasks"]["mc"]["items"], strict=True):
        slow = [
            log_probability(trained.model, trained.tokenizer, item["prompt"], f" {choice}", 64)[0]
            for choice in item["choices"]
        ]
        assert kept["id"] == item["id"]
        assert kept["choice_logprobs"] == pytest.approx(slow, abs=1e-4)
    shown = " ".join(capsys.readouterr().out.split())
    multiple = record["tasks"]["mc"]
    assert multiple["n"] == 10
    numbers = f"{multiple['accuracy']:.3f}±{1.96 * multiple['accuracy_error']:.3f}"
    assert f"mc 10 {multiple['chance']:.3f} {numbers}" in shown
    assert f"cut from the left: {multiple['cut']} of mc" in shown
    assert "too few items (under 100) for precise numbers: mc, open, text" in shown
    assert "bpb" in record["tasks"]["text"]
    assert "accuracy" not in record["tasks"]["text"]


def test_fewer_items_another_checkpoint_and_generated_answers(run, files):
    listed = files / "found.json"
    plain = [json.loads(line) for line in (files / "open.jsonl").read_text().splitlines()]
    rows = [json.dumps({key: value for key, value in item.items() if key != "solution"}) for item in plain]
    (files / "open.jsonl").write_text("\n".join(rows) + "\n")
    checkpoint = str(run / "checkpoints" / "step_00000002")
    given = [checkpoint, str(files / "open.jsonl"), "--limit", "4", "--generate", "2", "--json", str(listed)]
    assert probe.main(given) == 0
    record = json.loads(listed.read_text())
    assert record["step"] == 2
    assert record["tasks"]["open"]["n"] == len(record["tasks"]["open"]["items"]) == 4
    assert 0 <= record["tasks"]["open"]["exact_match"] <= 1


def test_unusable_input_is_a_one_line_error(run, files, capsys):
    (files / "bad.jsonl").write_text('{"prompt": ""}\n')
    cases = {
        "bad.jsonl:1: domain is missing": [str(run), str(files / "bad.jsonl")],
        "TASK_FILE: no file at": [str(run), str(files / "none.jsonl")],
        "did you mean hub:arc_easy?": [str(run), "hub:arc_eazy"],
        "no such folder": [str(files / "none"), str(files / "mc.jsonl")],
    }
    for message, given in cases.items():
        assert probe.main(given) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    with pytest.raises(SystemExit):
        probe.main([str(run), str(files / "mc.jsonl"), "--limit", "0"])
