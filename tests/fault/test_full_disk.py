"""A disk that fills up costs checkpoints and readings, not the run, and leaves nothing broken."""

import pytest

from moetrain import faults
from moetrain.train import train
from moetrain.training.checkpoint import checkpoint_folder, list_checkpoints
from tests.run.reading import events, scalars, states


@pytest.fixture
def fill(monkeypatch):
    """Lets fault points fail as on a full disk."""

    def switch(spec):
        faults._passed.clear()
        monkeypatch.setenv("MOETRAIN_FAULT", spec)

    return switch


def test_points_and_events_wait_for_room_and_none_is_lost(make_settings, fill, tmp_path, capsys):
    settings = make_settings("train.checkpoint_every=4")
    assert train(settings) == 0
    straight = tmp_path / "runs" / "run"
    fill("full:20:10")  # from before the first checkpoint, for a while
    assert train(settings) == 0
    run = tmp_path / "runs" / "run-2"
    assert scalars(run) == scalars(straight)
    said = capsys.readouterr().out.replace("\n", "")
    assert said.count("points and events wait in memory until there is room") >= 1
    assert "no checkpoint was written" in said
    kept = [event for event in events(run) if event["type"] != "guard"]
    steps = [event["step"] for event in kept if event["type"] == "checkpoint"]
    assert steps[-1] == 12
    assert len(steps) < 3
    theirs = [event for event in events(straight) if event["type"] != "checkpoint"]
    assert [event for event in kept if event["type"] != "checkpoint"] == theirs
    assert [folder.name for folder in list_checkpoints(run)] == [f"step_{step:08d}" for step in steps]
    mine, whole = states(checkpoint_folder(run, 12)), states(checkpoint_folder(straight, 12))
    assert [name for name in whole if mine[name].numpy().tobytes() != whole[name].numpy().tobytes()] == []
