"""Scalars on their way to trackers: the same points as TensorBoard's, and no harm from a tracker that fails."""

import json
import posixpath
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as settings_of
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moetrain import train as training
from moetrain import trainer, training_loop, training_run
from moetrain.atomic_io import write_file
from moetrain.config import SettingsError, load_settings
from moetrain.distributed.signals import STOPPED_BY_SIGNAL
from moetrain.loggers import tracker_backends, trackers
from moetrain.loggers.tracker_backends import tracker_name
from moetrain.loggers.trackers import Points, check_trackers, plain_settings
from tests.loggers import fake_trackers
from tests.trainer.reading import scalars
from tests.trainer.test_resume import StopAt


class Kept:
    """A tracker that keeps what it is given."""

    def __init__(self, broken_from=None):
        self.points, self.images, self.files, self.finished, self.broken_from = [], {}, [], 0, broken_from

    def log(self, values, step=None):
        if self.broken_from is not None and step >= self.broken_from:
            raise ConnectionError("the server is gone")
        self.points += [(tag, step, value) for tag, value in values.items()]

    def log_image(self, name, pixels, step):
        self.images[name] = step, pixels

    def log_file(self, path):
        self.files.append(path)

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

    monkeypatch.setattr(trackers, "start", refuse)
    with pytest.raises(SettingsError, match=r"wandb cannot be started \(RuntimeError: log in first\)$"):
        trackers.start_trackers(make_settings("run.trackers=[wandb]"), tmp_path)


def test_a_stopped_and_resumed_run_is_one_run_at_each_tracker(make_settings, monkeypatch):
    monkeypatch.setattr(training_run, "check_trackers", lambda names: None)
    monkeypatch.setattr(
        training_loop, "report_or_say_why", lambda folder, terminal: write_file(folder / "report.html", "<p>")
    )
    services = fake_trackers.put(monkeypatch)
    folder, _ = stopped_and_resumed(make_settings, monkeypatch, ",".join(services))
    shown = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    expected = {(tag, point.step): point.value for tag in shown.Tags()["scalars"] for point in shown.Scalars(tag)}
    for service in services.values():
        (run,) = service.runs.values()
        assert (run.starts, run.ends, run.project) == (2, 2, "moetrain")
        assert run.name.startswith("run")
        assert run.settings["model.num_experts"] in (8, "8")
        assert {(tag, step): value for tag, step, value in run.points} == pytest.approx(expected, rel=1e-6, nan_ok=True)
        assert len(run.points) == len(expected)
        assert {name.removeprefix("figures/").removesuffix(".png") for name in run.images} == images_of(folder)
        assert all(pixels.dtype == np.uint8 and pixels.shape[2] == 3 for pixels in run.images.values())
        assert list(run.files.values()) == [(folder / "report.html").read_text()]


@pytest.mark.parametrize("name", ["mlflow", "trackio"])
def test_a_run_that_its_tracker_no_longer_has_is_one_line_and_the_remedy_helps(
    make_settings, tmp_path, monkeypatch, name
):
    service = fake_trackers.put(monkeypatch)[name]
    settings = make_settings(f"run.trackers=[{name}]")
    trackers.start_trackers(settings, tmp_path)[name].finish()
    service.runs.clear()
    with pytest.raises(SettingsError, match=rf"run.trackers: {name} cannot be resumed \(.*\): remove ") as caught:
        trackers.start_trackers(settings, tmp_path)
    assert "\n" not in str(caught.value)
    file = Path(re.search(r"remove (\S+) to start", str(caught.value))[1])
    assert file.parent == tmp_path
    file.unlink()
    trackers.start_trackers(settings, tmp_path)
    assert len(service.runs) == 1


def test_a_damaged_list_of_runs_is_one_line(make_settings, tmp_path):
    (tmp_path / "trackers.json").write_text("[")
    with pytest.raises(SettingsError, match=r"trackers.json cannot be read .*: remove it to start new runs$"):
        trackers.start_trackers(make_settings("run.trackers=[wandb]"), tmp_path)


def test_images_are_sent_once_at_the_end_and_then_the_files(tmp_path):
    kept = Kept()
    points = Points({"one": kept}, print)
    for step in (1, 2):
        points.add_image("layers/load", np.full((2, 3, 3), step, np.uint8), step)
        points.send()
    assert kept.images == {}
    points.finish([tmp_path / "report.html"])
    (step, pixels) = kept.images.pop("layers/load")
    assert (step, pixels.max(), kept.files, kept.finished) == (2, 2, [tmp_path / "report.html"], 1)


@pytest.mark.parametrize(
    ("tag", "name"),
    [
        ("loss/train/code", "loss/train/code"),
        ("probe/a.b-c_d/accuracy", "probe/a.b-c_d/accuracy"),
        ("probe/f(x)=1,+[a]%/accuracy", "probe/f_x__1___a__/accuracy-"),
        ("/loss//train/", "loss/train-"),
        ("loss/../train", "loss/train-"),
        ("_wandb", "wandb-"),
        ("loss/\u00e9t\u00e9", "loss/_t_-"),
        ("...", "unnamed-"),
        ("a" * 400, "a" * 241 + "-"),
    ],
)
def test_names_that_a_tracker_refuses_are_rewritten(tag, name):
    rewritten = tracker_name(tag)
    assert rewritten.startswith(name)
    assert (rewritten == tag) == (not name.endswith("-"))
    assert tracker_name(rewritten) == rewritten


fuzz = settings_of(max_examples=300, deadline=None)


@fuzz
@given(st.text(st.sampled_from("ab/._- ()=,+[]%é\n"), max_size=12) | st.text(max_size=300))
def test_a_rewritten_name_is_valid_and_stays_apart_from_others(tag):
    name = tracker_name(tag)
    assert re.fullmatch(r"[A-Za-z0-9_. /-]+", name)
    assert len(name) <= 250
    assert not name.startswith(("_", "/"))
    assert posixpath.normpath(name) == name
    assert name != "."
    assert tracker_name(tag + "(") != tracker_name(tag + ")")


def test_settings_reach_trackers_flat_and_plain(make_settings):
    found = plain_settings(make_settings())
    assert found["train.max_steps"] == 12
    assert found["data.domains.sums.path"] == "sums.jsonl"
    assert found["probes.tasks"] == "[]"
    assert all(value is None or isinstance(value, bool | int | float | str) for value in found.values())


# The packages themselves, offline


def stopped_and_resumed(make_settings, monkeypatch, name):
    """Train a run with a tracker in two parts; returns its folder and its points of one curve."""
    pytest.importorskip("matplotlib")
    settings = make_settings(f"run.trackers=[{name}]", "run.report=true")
    monkeypatch.setattr("moetrain.training_loop.StopSignals", StopAt(7))
    assert training.train(settings) == STOPPED_BY_SIGNAL
    folder = Path(settings.run.output_dir) / settings.run.name
    (checkpoint,) = folder.glob("checkpoints/step_*7")
    monkeypatch.setattr("moetrain.training_loop.StopSignals", StopAt(10**9))
    again = make_settings(f"run.trackers=[{name}]", "run.report=true", f"train.resume={checkpoint}")
    assert training.train(again) == 0
    return folder, dict(scalars(folder)["loss/train/sums"])


def images_of(folder):
    return set(EventAccumulator(str(folder), size_guidance={"images": 0}).Reload().Tags()["images"])


@pytest.mark.slow
def test_mlflow_holds_one_run_with_figures_and_report(make_settings, tmp_path, monkeypatch):
    available("mlflow")
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")  # its folders of files hold no metric whose name begins as another's
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'mlflow.db'}")
    folder, points = stopped_and_resumed(make_settings, monkeypatch, "mlflow")
    client = mlflow.MlflowClient()
    (experiment,) = client.search_experiments(filter_string=f"name = '{tracker_backends.PROJECT}'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    assert run.data.params["model.num_experts"] == "8"
    history = client.get_metric_history(run.info.run_id, "loss/train/sums")
    assert {point.step: point.value for point in history} == pytest.approx(points)
    assert len(history) == len(points)
    kept = Path(run.info.artifact_uri.removeprefix("file://"))
    assert (kept / "report.html").read_text() == (folder / "report.html").read_text()
    figures = {path.relative_to(kept / "figures").with_suffix("").as_posix() for path in kept.rglob("*.png")}
    assert figures == images_of(folder)


@pytest.mark.slow
@fuzz
@given(st.text(st.sampled_from("ab/._- ()=,+[]%é\n"), max_size=12) | st.text(max_size=300))
def test_mlflow_takes_every_rewritten_name(tag):
    validation = pytest.importorskip("mlflow.utils.validation")
    validation._validate_metric_name(tracker_name(tag))


@pytest.mark.slow
def test_trackio_holds_one_run_with_figures_and_report(make_settings, tmp_path, monkeypatch):
    available("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    folder, points = stopped_and_resumed(make_settings, monkeypatch, "trackio")
    (run,) = [run for run in SQLiteStorage.get_run_records(tracker_backends.PROJECT) if run["name"].startswith("run-")]
    logs = SQLiteStorage.get_logs(tracker_backends.PROJECT, run["name"], run_id=run["id"])
    found = {row["step"]: row["loss/train/sums"] for row in logs if "loss/train/sums" in row}
    assert found == pytest.approx(points)
    assert images_of(folder) == {key for row in logs for key, value in row.items() if isinstance(value, dict)}


@pytest.mark.slow
def test_wandb_holds_one_run_offline_with_figures_and_report(make_settings, monkeypatch):
    available("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder, points = stopped_and_resumed(make_settings, monkeypatch, "wandb")
    logs = list(folder.glob("wandb/offline-run-*/*.wandb"))
    found, names, ids, media = {}, set(), set(), set()
    for data in (record for log in logs for record in leveldb_records(log.read_bytes(), head=7)):
        record = wandb_internal_pb2.Record.FromString(data)
        if record.HasField("run"):
            names.add(record.run.display_name)
            ids.add(record.run.run_id)
        if record.HasField("history"):
            row = {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            if "loss/train/sums" in row:
                found[row["step"]] = row["loss/train/sums"]
            media |= {item.nested_key[0] for item in record.history.item if item.nested_key[-1] == "_type"}
    assert (names, len(ids)) == ({"run"}, 1)  # `wandb sync` joins the parts of an id
    assert found == pytest.approx(points)
    assert media == images_of(folder) | {"report"}
    (page,) = folder.glob("wandb/offline-run-*/files/media/html/report_*.html")
    assert page.read_text() == (folder / "report.html").read_text()


def available(name):
    try:
        check_trackers([name])
    except SettingsError as missing:
        pytest.skip(str(missing))


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
