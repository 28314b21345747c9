"""SIGTERM and SIGINT save and end with an exit status of their own; a second one ends at once."""

import signal

import pytest

from moetrain.checkpoint.manager import list_checkpoints
from moetrain.distributed.signals import STOPPED_BY_SIGNAL
from tests.conftest import small_run
from tests.fault.launch import Launched, run
from tests.fault.sameness import different


@pytest.fixture(scope="module")
def straight(corpus_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("signals")
    overrides = small_run(corpus_folder, folder, tmp_path_factory.getbasetemp())
    assert run(overrides, folder / "log") == 0
    return folder / "runs" / "run"


def steps(folder):
    return [int(path.name.removeprefix("step_")) for path in list_checkpoints(folder)]


def test_signals_save_and_end_and_the_same_command_resumes(straight, corpus_folder, tmp_path, tmp_path_factory):
    overrides = small_run(corpus_folder, tmp_path, tmp_path_factory.getbasetemp())
    folder, log = tmp_path / "runs" / "run", tmp_path / "log"
    # A second signal during the save that the first one caused ends the run there; nothing of that save is left.
    second = "TERM:1:rename panel_00000004;INT:1:write model.safetensors"
    assert run(overrides, log, second) == -signal.SIGINT
    assert steps(folder) == []
    folder = tmp_path / "runs" / "run-2"  # there was no checkpoint to resume from
    assert run(overrides, log, "INT:1:rename panel_00000004") == STOPPED_BY_SIGNAL
    assert steps(folder) == [4]
    assert run(overrides, log, "TERM:1:rename panel_00000008") == STOPPED_BY_SIGNAL
    assert steps(folder) == [5, 8]
    said = log.read_text().replace("\n", "")
    assert said.count("SIGINT received; waiting for: the reading of the panel, then the run is saved") == 1
    assert said.count("SIGTERM received; waiting for: the reading of the panel, then the run is saved") == 2
    assert "SIGINT: saved at step 4; run the same command again to resume" in said
    assert "SIGTERM: saved at step 8; run the same command again to resume" in said
    assert run(overrides, log) == 0
    unlike = [name for name in different(folder, straight) if name.startswith(("point", "step_00000012", "summary"))]
    assert unlike == []


def test_interrupted_before_the_first_step_it_says_so(corpus_folder, tmp_path):
    overrides = small_run(corpus_folder, tmp_path, tmp_path)
    assert run(overrides, tmp_path / "log", "INT:1:write config.yaml") == 130
    said = (tmp_path / "log").read_text()
    assert "SIGINT received\nerror: interrupted" in said
    assert "Traceback" not in said


def test_interrupted_while_it_prepares_it_says_what_it_waits_for(corpus_folder, tmp_path):
    launched = Launched(small_run(corpus_folder, tmp_path, tmp_path), tmp_path / "log")
    launched.wait_for("training the tokenizer")
    launched.signal(signal.SIGINT)
    assert launched.wait() == 130
    *before, said, _ = (tmp_path / "log").read_text().splitlines()
    assert said.partition("SIGINT received; waiting for: ")[2] in before
