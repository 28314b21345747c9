"""A rank that dies or freezes ends the run within a minute with a message that names it."""

import os
import signal
import socket
import time
from pathlib import Path

import pytest

from moetrain.checkpoint.manager import list_checkpoints
from tests.conftest import small_run
from tests.distributed.ranks import TRAIN, alone, start

pytestmark = pytest.mark.fault
LIMIT = 60.0


@pytest.fixture
def overrides(corpus_folder, tmp_path, tmp_path_factory):
    (tmp_path / "empty.yaml").write_text("run: {name: run}")
    run = small_run(corpus_folder, tmp_path, tmp_path_factory.getbasetemp())
    return [str(tmp_path / "empty.yaml"), *run, "train.max_steps=100", "train.checkpoint_every=1"]


def wait_for_training(folder):
    end = time.monotonic() + 120
    while not list_checkpoints(folder):
        assert time.monotonic() < end, "no step was ever saved"
        time.sleep(0.05)


def workers(launcher):
    """Process ids of a launcher by rank."""
    found = {}
    for child in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        rank = next((entry for entry in environment if entry.startswith(b"RANK=")), None)
        if rank is not None:
            found[int(rank.removeprefix(b"RANK="))] = int(child)
    return found


@pytest.mark.parametrize("sharding", ["none", "fsdp"])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_launch_and_is_named(overrides, tmp_path, victim, sharding):
    launcher = start(2, [*overrides, f"train.sharding={sharding}"])
    wait_for_training(tmp_path / "runs" / "run")
    pid = workers(launcher)[victim]
    os.kill(pid, signal.SIGKILL)
    begin = time.monotonic()
    said, _ = launcher.communicate(timeout=LIMIT)
    assert time.monotonic() - begin < LIMIT
    assert launcher.returncode != 0
    assert f"rank {victim} (pid {pid} on {socket.gethostname()}) is gone" in said
    assert "run the same command again to resume from the last checkpoint" in said


@pytest.mark.parametrize(
    ("damage", "said"), [(signal.SIGSTOP, "has not been heard of for"), (signal.SIGKILL, "is gone")]
)
@pytest.mark.parametrize("victim", [0, 1])
def test_without_a_launcher_the_other_rank_ends_by_itself(overrides, tmp_path, victim, damage, said):
    both = list(alone([str(TRAIN), *overrides]))
    try:
        wait_for_training(tmp_path / "runs" / "run")
        both[victim].send_signal(damage)
        begin = time.monotonic()
        printed, _ = both[1 - victim].communicate(timeout=LIMIT)
        assert time.monotonic() - begin < LIMIT
    finally:
        for process in both:
            process.send_signal(signal.SIGCONT)
            process.kill()
    assert both[1 - victim].returncode == 1
    assert f"rank {victim} (pid {both[victim].pid} on {socket.gethostname()}) {said}" in printed
