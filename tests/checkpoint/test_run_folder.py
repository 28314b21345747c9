import subprocess
import sys

import pytest

from moetrain.checkpoint.manager import checkpoint_folder, save_checkpoint
from moetrain.checkpoint.run_folder import open_run_folder
from moetrain.config import SettingsError


def opened(settings):
    folder = open_run_folder(settings)
    folder.release()
    return folder


def test_nothing_is_overwritten(make_settings):
    settings = make_settings("train.resume=never")
    assert [opened(settings).path.name for _ in range(3)] == ["run", "run-2", "run-3"]


def test_auto_resumes_an_unfinished_run_and_starts_a_new_one_after_a_finished_one(make_settings):
    settings = make_settings()
    first = opened(settings).path
    second = opened(settings)
    assert second.path.name == "run-2"
    assert "has no checkpoint to continue from" in second.notes[0]
    save_checkpoint(second.path, 4, {}, {}, {})
    third = opened(settings)
    assert third.path == second.path
    assert third.checkpoint == checkpoint_folder(second.path, 4)
    (second.path / "summary.json").write_text("{}")
    assert opened(settings).path.name == "run-3"
    assert first.exists()


def test_settings_that_do_not_change_the_run_may_differ(make_settings):
    run = opened(make_settings()).path
    save_checkpoint(run, 4, {}, {}, {})
    assert opened(make_settings("train.keep_checkpoints=7")).path == run
    other = opened(make_settings("train.log_every=7"))
    assert other.path != run
    assert "was run with another train.log_every" in other.notes[0]


def test_a_run_in_use_is_left_alone(make_settings):
    settings = make_settings()
    held = open_run_folder(settings)
    save_checkpoint(held.path, 4, {}, {}, {})
    code = "import fcntl, sys; f = open(sys.argv[1]);fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)"
    taken = subprocess.run([sys.executable, "-c", code, held.path / ".lock"], capture_output=True, check=False)
    assert taken.returncode != 0
    other = opened(settings)
    assert other.path.name == "run-2"
    assert "is being written by another process" in other.notes[0]
    with pytest.raises(SettingsError, match="is being written by another process: stop it first"):
        open_run_folder(make_settings(f"train.resume={checkpoint_folder(held.path, 4)}"))
    held.release()


def test_a_given_checkpoint_must_belong_to_a_run_with_these_settings(make_settings, tmp_path):
    run = opened(make_settings()).path
    folder = save_checkpoint(run, 4, {}, {}, {})
    assert opened(make_settings(f"train.resume={folder}")).checkpoint == folder
    with pytest.raises(SettingsError, match=r"was run with another optim\.eps"):
        open_run_folder(make_settings(f"train.resume={folder}", "optim.eps=1e-6"))
    (run / "summary.json").write_text("{}")
    with pytest.raises(SettingsError, match=r"is finished: to go on from step_00000004, set a larger train\.max_steps"):
        open_run_folder(make_settings(f"train.resume={folder}"))
    with pytest.raises(SettingsError, match="is in no run: give auto, never or RUN/checkpoints/step_XXXXXXXX"):
        open_run_folder(make_settings(f"train.resume={tmp_path / 'elsewhere' / 'x'}"))


def test_auto_finds_the_newest_run_that_can_be_resumed_behind_others(make_settings, tmp_path):
    interrupted = opened(make_settings()).path
    save_checkpoint(interrupted, 4, {}, {}, {})
    assert opened(make_settings("optim.eps=1e-6")).path.name == "run-2"
    (tmp_path / "runs" / "run-3").mkdir()  # killed before its settings were written
    found = opened(make_settings())
    assert found.path == interrupted
    assert found.checkpoint == checkpoint_folder(interrupted, 4)


def test_a_name_that_ends_in_a_number_counts_from_there(make_settings):
    settings = make_settings("run.name=exp-5", "train.resume=never")
    assert [opened(settings).path.name for _ in range(2)] == ["exp-5", "exp-5-2"]
