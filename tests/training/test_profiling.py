"""``profile.start`` and ``profile.steps``: a trace of these steps in the run's folder."""

import json

import pytest

from moetrain.config import ProfileSettings
from moetrain.distributed.mesh import ParallelLayout
from moetrain.train import train
from moetrain.training.profiling import StepProfiler
from tests.trainer.reading import states


def marked_steps(path):
    events = json.loads(path.read_text())["traceEvents"]
    names = {event["name"] for event in events if event.get("ph") == "X"}
    return sorted(int(name.removeprefix("ProfilerStep#")) for name in names if name.startswith("ProfilerStep#")), names


def test_the_trace_has_the_steps_and_training_is_the_same(make_settings, tmp_path, capsys):
    short = ("train.max_steps=6", "panel.readings=2", "train.checkpoint_every=6")
    assert train(make_settings(*short)) == 0
    assert train(make_settings(*short, "profile.start=3", "profile.steps=2", "run.name=traced")) == 0
    run = tmp_path / "runs" / "traced"
    (path,) = (run / "profile").iterdir()
    assert path.name == "step_00000003_rank_0.pt.trace.json"
    steps, names = marked_steps(path)
    assert steps == [3, 4]
    assert any(name.startswith("aten::") for name in names)
    assert any("Backward" in name for name in names)
    assert "profile of steps 3 to 4: in" in capsys.readouterr().out.replace("\n", "")
    assert not (tmp_path / "runs" / "run" / "profile").exists()
    actual, expected = (states(each / "checkpoints" / "step_00000006") for each in (run, tmp_path / "runs" / "run"))
    assert all(actual[name].numpy().tobytes() == value.numpy().tobytes() for name, value in expected.items())


def profiler(folder, notes, **settings):
    return StepProfiler(ProfileSettings(**settings), folder, ParallelLayout(), notes.append)


def test_a_run_that_ends_within_the_steps_writes_what_it_has(tmp_path):
    notes = []
    with profiler(tmp_path, notes, start=2, steps=5) as each:
        for step in range(1, 4):
            with each.step(step):
                pass
    assert marked_steps(tmp_path / "profile" / "step_00000002_rank_0.pt.trace.json")[0] == [2, 3]
    assert len(notes) == 1


@pytest.mark.parametrize("settings", [{}, {"start": 9}])
def test_no_step_in_the_range_writes_nothing(tmp_path, settings):
    notes = []
    with profiler(tmp_path, notes, **settings) as each, each.step(1):
        pass
    assert notes == []
    assert not (tmp_path / "profile").exists()


@pytest.mark.parametrize(
    ("settings", "done", "steps", "said"),
    [
        ({"start": 13, "steps": 2}, 0, 12, "profile.start=13: no trace is written, for steps 1 to 12 are trained now"),
        ({"start": 3, "steps": 2}, 4, 12, "profile.start=3: no trace is written, for steps 5 to 12 are trained now"),
        ({"start": 3, "steps": 3}, 4, 12, None),
        ({"start": 12}, 0, 12, None),
        ({}, 0, 12, None),
    ],
)
def test_steps_that_a_launch_does_not_reach_are_told(tmp_path, settings, done, steps, said):
    line = profiler(tmp_path, [], **settings).unreached(done, steps)
    assert line is None if said is None else line.startswith(said)


def test_a_trace_that_is_there_is_not_asked_for_again(tmp_path):
    (tmp_path / "profile").mkdir()
    assert profiler(tmp_path, [], start=3, steps=2).unreached(4, 12) is None


def test_a_folder_that_cannot_be_made_is_told_and_training_goes_on(tmp_path):
    notes = []
    (tmp_path / "profile").write_text("a file in its place")
    with profiler(tmp_path, notes, start=1, steps=1) as each, each.step(1):
        pass
    assert len(notes) == 1
    assert "not written" in notes[0]
    assert "training goes on" in notes[0]
