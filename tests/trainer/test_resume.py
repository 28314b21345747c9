"""A run that was stopped and resumed equals the uninterrupted run, bit for bit, on data that can be learned."""

import json

import pyarrow.parquet as pq
import pytest
import torch

from moetrain.checkpoint.manager import CheckpointError, checkpoint_folder
from moetrain.distributed.signals import STOPPED_BY_SIGNAL
from moetrain.train import train
from tests.trainer.reading import scalars, states

STEPS = 12
SETTINGS = (
    "train.micro_batch_rows=4",
    "data.domains.sums.panel_tokens=12",
    "data.domains.stories.eps=5.0",
    "model.balancing=bias",
    "monitor.store_top=2",
    "probes.tasks=[quiz.jsonl]",
    "probes.readings=5",
)


class StopAt:
    """Stands in for the signal: stops the run after a given number of steps."""

    def __init__(self, steps):
        self.steps, self.calls = steps, 0

    def __call__(self):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    @property
    def received(self):
        self.calls += 1
        return "SIGTERM" if self.calls >= self.steps else None


def stop_after(monkeypatch, steps):
    monkeypatch.setattr("moetrain.training_loop.StopSignals", StopAt(steps))


@pytest.fixture(scope="module")
def straight(corpus_folder, tmp_path_factory):
    from moetrain.config import load_settings
    from tests.conftest import small_run

    out = tmp_path_factory.mktemp("straight")
    torch.set_num_threads(1)
    base = [*small_run(corpus_folder, out, tmp_path_factory.getbasetemp()), *SETTINGS]
    assert train(load_settings(None, base)) == 0
    return out / "runs" / "run"


def assert_same_run(resumed, straight):
    actual, expected = (states(checkpoint_folder(run, STEPS)) for run in (resumed, straight))
    assert actual.keys() == expected.keys()
    different = [name for name in actual if actual[name].numpy().tobytes() != expected[name].numpy().tobytes()]
    assert different == []
    assert scalars(resumed) == scalars(straight)
    summaries = [json.loads((run / "summary.json").read_text()) for run in (resumed, straight)]
    assert summaries[0]["domains"] == summaries[1]["domains"]
    assert summaries[0]["tokens"] == summaries[1]["tokens"]
    assert summaries[0]["probes"] == summaries[1]["probes"]
    assert len(summaries[0]["probes"]) == 2
    assert records(resumed) == records(straight)
    assert course_events(resumed) == course_events(straight)


def records(run):
    """Every row of every record, in whatever files."""
    kinds = {"panel": [], "router": [], "probe": [], "samples": []}
    for path in sorted((run / "routing").glob("*.parquet")):
        kinds[path.name.partition("_")[0]] += pq.read_table(path).to_pylist()
    assert all(kinds.values())
    return {kind: [repr(row) for row in rows] for kind, rows in kinds.items()}  # NaN equals NaN there


def course_events(run):
    """The events of a run, without those of its interruptions."""
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return sorted(json.dumps(event) for event in events if event["type"] in ("phase", "memorized", "probe"))


def test_the_straight_run_learned_and_drew_its_curves(straight):
    points = scalars(straight)
    loss = [value for _, value in points["loss/train"]]
    assert loss[-1] < loss[0] - 0.5
    assert [step for step, _ in points["loss/train"]] == [3, 6, 9, 12]
    assert [step for step, _ in points["loss/validation/sums"]] == [0, 4, 8, 12]
    assert points["stream/d_path/stories"][-1][0] == 12
    for domain in ("stories", "sums"):
        for tag in ("d_path", "d_path_norm", "cosine", "inconsistency", "spread"):
            assert points[f"stream/{tag}/{domain}"]
        assert points[f"loss/train/{domain}"]
        assert points[f"data/tokens/{domain}"][-1][1] > 0


@pytest.mark.parametrize("stops", [[5], [7], [4, 6], [1, 1, 1]], ids=str)
def test_stopped_anywhere_and_resumed_it_is_the_same_run(straight, make_settings, monkeypatch, tmp_path, stops):
    settings = make_settings(*SETTINGS)
    for stop in stops:
        stop_after(monkeypatch, stop)
        assert train(settings) == STOPPED_BY_SIGNAL
    monkeypatch.setattr("moetrain.training_loop.StopSignals", StopAt(10**9))
    assert train(settings) == 0
    run = tmp_path / "runs" / "run"
    assert_same_run(run, straight)
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert sum(event["type"] == "resume" for event in events) == len(stops)


def test_a_dense_model_in_blocks_stopped_and_resumed_is_the_same_run(make_settings, monkeypatch, tmp_path):
    settings = make_settings(*SETTINGS, "model.experts=dense", "model.dense_experts=8", "model.balancing=aux")
    monkeypatch.setattr("moetrain.training_loop.StopSignals", StopAt(10**9))
    assert train(settings) == 0
    straight = (tmp_path / "runs" / "run").rename(tmp_path / "straight")
    stop_after(monkeypatch, 7)
    assert train(settings) == STOPPED_BY_SIGNAL
    monkeypatch.setattr("moetrain.training_loop.StopSignals", StopAt(10**9))
    assert train(settings) == 0
    assert_same_run(tmp_path / "runs" / "run", straight)


def test_what_was_written_after_an_older_checkpoint_is_cut_off_not_repeated(
    straight, make_settings, tmp_path, monkeypatch
):
    settings = make_settings(*SETTINGS, "train.keep_checkpoints=5")
    stop_after(monkeypatch, 11)
    assert train(settings) == STOPPED_BY_SIGNAL
    monkeypatch.setattr("moetrain.training_loop.StopSignals", StopAt(10**9))
    run = tmp_path / "runs" / "run"
    older = make_settings(*SETTINGS, "train.keep_checkpoints=5", f"train.resume={checkpoint_folder(run, 5)}")
    assert train(older) == 0
    assert_same_run(run, straight)


def test_a_torn_record_after_the_checkpoint_is_cut_off(straight, make_settings, tmp_path, monkeypatch):
    settings = make_settings(*SETTINGS)
    stop_after(monkeypatch, 6)
    assert train(settings) == STOPPED_BY_SIGNAL
    monkeypatch.setattr("moetrain.training_loop.StopSignals", StopAt(10**9))
    run = tmp_path / "runs" / "run"
    with open(run / "events.jsonl", "a") as file:
        file.write('{"type": "chec')
    with open(next(run.glob("events.out.tfevents.*")), "ab") as file:
        file.write(b"\x18\x00\x00\x00torn")
    assert train(settings) == 0
    assert_same_run(run, straight)
    for line in (run / "events.jsonl").read_text().splitlines():
        json.loads(line)


def test_a_corrupt_checkpoint_is_named_and_the_one_before_is_taken(
    straight, make_settings, tmp_path, monkeypatch, capsys
):
    settings = make_settings(*SETTINGS)
    stop_after(monkeypatch, 8)
    assert train(settings) == STOPPED_BY_SIGNAL
    monkeypatch.setattr("moetrain.training_loop.StopSignals", StopAt(10**9))
    run = tmp_path / "runs" / "run"
    path = checkpoint_folder(run, 8) / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    assert train(settings) == 0
    said = capsys.readouterr().out.replace("\n", "")
    assert "step_00000008/model.safetensors: corrupt" in said
    assert "from step_00000005" in said
    # The corrupt checkpoint is written anew when its step is trained again.
    assert_same_run(run, straight)


def test_a_finished_run_or_one_with_other_settings_is_left_alone(
    straight, make_settings, tmp_path, monkeypatch, capsys
):
    settings = make_settings(*SETTINGS)
    stop_after(monkeypatch, 6)
    assert train(settings) == STOPPED_BY_SIGNAL
    stop_after(monkeypatch, 1)
    assert train(make_settings(*SETTINGS, "optim.learning_rate=0.02")) == STOPPED_BY_SIGNAL
    assert "was run with another optim.learning_rate: starting a new run" in capsys.readouterr().out.replace("\n", "")
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["run", "run-2"]
    assert (tmp_path / "runs" / "run-2" / "checkpoints" / "step_00000001").is_dir()


def test_other_data_under_a_checkpoint_is_refused(make_settings, monkeypatch, tmp_path):
    stop_after(monkeypatch, 3)
    assert train(make_settings()) == STOPPED_BY_SIGNAL
    monkeypatch.setattr("moetrain.data.corpus.FORMAT", 10**6)  # as if data were prepared in another format
    with pytest.raises(CheckpointError, match="trained on other data or another tokenizer"):
        train(make_settings())
