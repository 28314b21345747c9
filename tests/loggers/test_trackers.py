"""Scalars on their way to trackers: the same points as TensorBoard's, and no harm from a tracker that fails."""

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moetrain import train as training
from moetrain import trainer, training_run
from moetrain.config import SettingsError, load_settings
from moetrain.loggers import trackers
from moetrain.loggers.trackers import Points, check_trackers, plain_settings
from tests.trainer.reading import scalars


class Kept:
    """A tracker that keeps what it is given."""

    def __init__(self, broken_from=None):
        self.points, self.finished, self.broken_from = [], 0, broken_from

    def log(self, values, step=None):
        if self.broken_from is not None and step >= self.broken_from:
            raise ConnectionError("the server is gone")
        self.points += [(tag, step, value) for tag, value in values.items()]

    def finish(self):
        self.finished += 1


def test_a_tracker_gets_every_point_of_tensorboard(make_settings, monkeypatch):
    kept = Kept()
    monkeypatch.setattr(training_run, "check_trackers", lambda names: None)
    monkeypatch.setattr(trainer, "start_trackers", lambda settings, folder: {"wandb": kept})
    settings = make_settings("run.trackers=[wandb]")
    assert training.train(settings) == 0
    run = f"{settings.run.output_dir}/{settings.run.name}"
    shown = EventAccumulator(run, size_guidance={"scalars": 0}).Reload()
    expected = {(tag, point.step): point.value for tag in shown.Tags()["scalars"] for point in shown.Scalars(tag)}
    assert len(expected) > 100
    found = {(tag, step): value for tag, step, value in kept.points}
    assert found == pytest.approx(expected, rel=1e-6, nan_ok=True)
    assert len(found) == len(kept.points)
    assert kept.finished == 1


def test_what_waits_is_sent_by_step_in_order():
    kept = Kept()
    points = Points({"one": kept}, print)
    for tag, step in (("a", 2), ("b", 1), ("c", 2)):
        points.add(tag, 0.5, step)
    assert kept.points == []
    points.send()
    points.send()
    assert kept.points == [("b", 1, 0.5), ("a", 2, 0.5), ("c", 2, 0.5)]


def test_a_tracker_that_fails_is_left_and_told_of_once_and_the_others_go_on():
    told, broken, whole = [], Kept(broken_from=2), Kept()
    points = Points({"broken": broken, "whole": whole}, told.append)
    for step in (1, 2, 3):
        points.add("loss", 1.0, step)
        points.send()
    points.finish()
    assert [step for _, step, _ in broken.points] == [1]
    assert [step for _, step, _ in whole.points] == [1, 2, 3]
    assert (broken.finished, whole.finished) == (0, 1)
    assert len(told) == 1
    assert "broken is dropped from step 2 on (ConnectionError: the server is gone)" in told[0]


def test_nothing_is_kept_without_a_tracker():
    points = Points({}, print)
    points.add("loss", 1.0, 1)
    assert points._waiting == {}


def test_a_tracker_that_is_not_installed_is_told_before_any_work(make_settings, monkeypatch):
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", list)
    monkeypatch.setattr(trainer.Trainer, "build", lambda *_: pytest.fail("the run was built"))
    with pytest.raises(SettingsError, match=r"run.trackers: comet_ml is not installed: pip install comet-ml"):
        training.train(make_settings("run.trackers=[comet_ml]"))


def test_a_tracker_that_nobody_knows_is_told_with_those_that_are_known():
    with pytest.raises(SettingsError, match=r"run.trackers.*'wandb', 'mlflow'"):
        load_settings(None, ["data.domains.code.builtin=code", "run.trackers=[wandbb]"])


def test_a_tracker_that_cannot_start_is_told(make_settings, tmp_path, monkeypatch):
    def refuse(*arguments):
        raise RuntimeError("log in first")

    monkeypatch.setattr(trackers, "_start", refuse)
    with pytest.raises(SettingsError, match=r"wandb cannot be started \(RuntimeError: log in first\)"):
        trackers.start_trackers(make_settings("run.trackers=[wandb]"), tmp_path)


def test_settings_reach_trackers_flat_and_plain(make_settings):
    found = plain_settings(make_settings())
    assert found["train.max_steps"] == 12
    assert found["data.domains.sums.path"] == "sums.jsonl"
    assert found["probes.tasks"] == "[]"
    assert all(value is None or isinstance(value, bool | int | float | str) for value in found.values())


def available(name):
    try:
        check_trackers([name])
    except SettingsError as missing:
        pytest.skip(str(missing))


@pytest.mark.slow
def test_mlflow_holds_the_run_offline(make_settings, tmp_path, monkeypatch):
    available("mlflow")
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")  # its folders of files hold no metric whose name begins as another's
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'mlflow.db'}")
    settings = make_settings("run.trackers=[mlflow]")
    assert training.train(settings) == 0
    client = mlflow.MlflowClient()
    (experiment,) = client.search_experiments(filter_string=f"name = '{trackers.PROJECT}'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == settings.run.name
    assert run.data.params["model.num_experts"] == "8"
    shown = scalars(f"{settings.run.output_dir}/{settings.run.name}")
    history = client.get_metric_history(run.info.run_id, "loss/train/sums")
    assert {point.step: point.value for point in history} == pytest.approx(dict(shown["loss/train/sums"]))


@pytest.mark.slow
def test_wandb_holds_the_run_offline(make_settings, tmp_path, monkeypatch):
    available("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    settings = make_settings("run.trackers=[wandb]")
    assert training.train(settings) == 0
    (log,) = (tmp_path / "runs" / settings.run.name).glob("wandb/offline-run-*/*.wandb")
    found, names = {}, set()
    for data in leveldb_records(log.read_bytes(), head=7):
        record = wandb_internal_pb2.Record.FromString(data)
        if record.HasField("run"):
            names.add(record.run.display_name)
        if record.HasField("history"):
            row = {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            if "loss/train/sums" in row:
                found[row["step"]] = row["loss/train/sums"]
    assert names == {settings.run.name}
    shown = scalars(tmp_path / "runs" / settings.run.name)
    assert found == pytest.approx(dict(shown["loss/train/sums"]))


def leveldb_records(data, head):
    """What W&B's file holds, one record after the other: LevelDB's log format, whose first block begins with a head."""
    place, whole, block = head, b"", 32_768
    while place + 7 <= len(data):
        if block - place % block < 7:
            place += block - place % block
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield whole
            whole = b""
