"""A full disk costs checkpoints and readings, not the run, and leaves no corrupt file."""

import os
import subprocess

import pytest

from moetrain import fault_injection as faults
from moetrain.checkpoint.manager import checkpoint_folder, list_checkpoints, load_checkpoint
from moetrain.train import train
from tests.conftest import small_run
from tests.fault.launch import run
from tests.fault.sameness import different
from tests.trainer.reading import events, scalars, states


@pytest.fixture
def fill(monkeypatch):
    """Makes fault points fail as on a full disk."""

    def switch(spec):
        faults._passed.clear()
        monkeypatch.setenv("MOETRAIN_FAULT", spec)

    return switch


def test_points_and_events_stay_buffered_and_none_is_lost(make_settings, fill, tmp_path, capsys):
    settings = make_settings("train.checkpoint_every=4")
    assert train(settings) == 0
    straight = tmp_path / "runs" / "run"
    fill("full:20:10")  # from before the first checkpoint, for a while
    assert train(settings) == 0
    second = tmp_path / "runs" / "run-2"
    assert scalars(second) == scalars(straight)
    said = capsys.readouterr().out.replace("\n", "")
    assert said.count("points and events stay in memory until there is space") >= 1
    assert "no checkpoint was written" in said
    kept = [event for event in events(second) if event["type"] != "guard"]
    steps = [event["step"] for event in kept if event["type"] == "checkpoint"]
    assert steps[-1] == 12
    assert len(steps) < 3
    expected_events = [event for event in events(straight) if event["type"] != "checkpoint"]
    assert [event for event in kept if event["type"] != "checkpoint"] == expected_events
    assert [folder.name for folder in list_checkpoints(second)] == [f"step_{step:08d}" for step in steps]
    actual, expected = states(checkpoint_folder(second, 12)), states(checkpoint_folder(straight, 12))
    assert [name for name in expected if actual[name].numpy().tobytes() != expected[name].numpy().tobytes()] == []


@pytest.fixture
def disk(tmp_path):
    """A disk of 24 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(place)], check=False)
    if mounted.returncode:
        pytest.skip("a small disk can be mounted by root alone")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.fault
def test_a_disk_that_is_really_full_costs_no_more_than_the_steps_since_the_last_checkpoint(
    corpus_folder, tmp_path, tmp_path_factory, disk
):
    cache = tmp_path_factory.getbasetemp()
    assert run(small_run(corpus_folder, tmp_path, cache), tmp_path / "straight.log") == 0
    straight = tmp_path / "runs" / "run"
    size = sum(path.stat().st_size for path in checkpoint_folder(straight, 12).iterdir())
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    with open(disk / "filler", "wb") as filler:
        os.posix_fallocate(filler.fileno(), 0, free - 7 * size // 4)  # room for one checkpoint and not for two
    overrides, log = small_run(corpus_folder, disk, cache), tmp_path / "full.log"
    assert run(overrides, log) == 1
    said = log.read_text().replace("\n", "")
    assert "no checkpoint was written" in said
    assert "No space left on device" in said
    assert "the last step could not be saved: free some space and run the same command again to resume" in said
    assert "Traceback" not in said
    full = disk / "runs" / "run"
    assert [folder.name for folder in (full / "checkpoints").iterdir()] == ["step_00000005"]
    load_checkpoint(checkpoint_folder(full, 5))
    (disk / "filler").unlink()
    assert run(overrides, log) == 0
    assert different(full, straight) == []
