"""Probes in a run: they leave no trace in training, and what is logged comes out of the files again."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from moetrain.checkpoint.manager import checkpoint_folder
from moetrain.config import SettingsError
from moetrain.data.errors import DataError
from moetrain.loggers.preview import short_lines
from moetrain.train import train
from moetrain.trainer import Trainer
from tests.trainer.reading import scalars, states

STEPS = 12


@pytest.fixture(scope="module")
def runs(corpus_folder, tmp_path_factory):
    """The same run with probes and without."""
    from moetrain.config import load_settings
    from tests.conftest import small_run

    found = {}
    for name, extra in (("with", ["probes.tasks=[quiz.jsonl]", "probes.readings=5"]), ("without", [])):
        out = tmp_path_factory.mktemp(name)
        base = small_run(corpus_folder, out, tmp_path_factory.getbasetemp())
        assert train(load_settings(None, [*base, *extra])) == 0
        found[name] = out / "runs" / "run"
    return found


def test_training_with_probes_is_training_without_bit_for_bit(runs):
    watched, silent = (states(checkpoint_folder(runs[name], STEPS)) for name in ("with", "without"))
    shared = [name for name in silent if not name.startswith(("probes", "relations"))]
    assert {name.partition("/")[0] for name in shared} >= {"model", "optimizer", "monitor", "panel"}
    different = [n for n in shared if watched[n].numpy().tobytes() != silent[n].numpy().tobytes()]
    assert different == []
    curves, plain = scalars(runs["with"]), scalars(runs["without"])
    assert {tag: curves[tag] for tag in plain} == plain
    added = {tag.partition("/")[0] for tag in curves.keys() - plain.keys()}
    assert added <= {"probe", "correlation"}


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("probes.tasks=[nowhere.jsonl]", "no file at .*nowhere.jsonl"),
        ("probes.tasks=[hub:scIq]", "no hub task 'scIq'"),
        ("model.experts=megablocks", "model.experts=megablocks: it needs a CUDA device"),
    ],
)
def test_what_is_asked_for_in_vain_is_told_before_data_is_prepared(make_settings, monkeypatch, asked, said):
    monkeypatch.setattr("moetrain.trainer.prepare_corpus", lambda *_: pytest.fail("data was prepared"))
    with pytest.raises((DataError, SettingsError), match=said):
        Trainer.build(make_settings(asked))


def test_a_domain_of_short_samples_is_told(make_settings):
    summary = {"stories": {"long_enough_share": 0.5}, "sums": {"long_enough_share": 0.0}}
    (line,) = short_lines(summary, make_settings("data.domains.sums.panel_tokens=62"))
    assert line.startswith("sums: no sample has 62 tokens")
    assert short_lines(summary, make_settings("monitor.enabled=false")) == []


def test_every_probe_number_comes_out_of_the_files_again(runs):
    run = runs["with"]
    curves = scalars(run)
    quiz = {}
    for line in (next(iter(run.parent.parent.parent.glob("corpus*/quiz.jsonl")))).read_text().splitlines():
        item = json.loads(line)
        quiz[item["id"]] = item
    again = {}
    for path in sorted((run / "routing").glob("probe_*.parquet")):
        frame = pq.read_table(path).to_pandas()
        step = int(frame.step[0])
        choices = frame[frame.task == "adding"]
        values = np.stack(choices.log_probs)
        right = np.array([quiz[item]["answer"] for item in choices.item])
        assert (choices.correct.to_numpy(bool) == (values.argmax(1) == right)).all()
        odds = np.exp(values - values.max(1, keepdims=True))
        soft = (odds / odds.sum(1, keepdims=True))[np.arange(len(right)), right]
        for tag, value in (("adding/accuracy", (values.argmax(1) == right).mean()), ("adding/soft", soft.mean())):
            again.setdefault(f"probe/{tag}", []).append((step, value))
        answers = frame[frame.task == "owners"]
        again.setdefault("probe/owners/accuracy", []).append((step, answers.correct.to_numpy(bool).mean()))
    assert [step for step, _ in again["probe/adding/accuracy"]] == [0, 3, 6, 9, 12]
    for tag, series in again.items():
        logged = curves[tag]
        assert [step for step, _ in logged] == [step for step, _ in series]
        assert [value for _, value in logged] == pytest.approx([value for _, value in series], rel=1e-6)


def test_the_summary_and_the_events_say_what_the_probes_said(runs):
    run = runs["with"]
    summary = json.loads((run / "summary.json").read_text())
    assert set(summary["probes"]) == {"adding", "owners"}
    adding = summary["probes"]["adding"]
    assert (adding["domain"], adding["chance"], adding["too_few"]) == ("sums", 0.25, True)
    accuracy = adding["metrics"]["accuracy"]
    assert accuracy["n"] == 60
    assert accuracy["low"] <= accuracy["value"] <= accuracy["high"]
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    told = [event for event in events if event["type"] == "probe" and event["task"] == "adding"]
    assert [event["step"] for event in told] == [0, 3, 6, 9, 12]
    assert told[-1]["metrics"] == adding["metrics"]
    correlations = summary["domains"]["sums"]["correlations"]
    assert correlations["items"] == 60
    assert len(correlations["accuracy"]) == 5
    assert "note" in correlations or correlations["predictors"]["d_path"]["raw spearman"]["note"] == "too few"
