"""A rank that dies or freezes ends the run within a minute with a message that names it."""

import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest

from moetrain.checkpoint.manager import list_checkpoints
from tests.conftest import small_run
from tests.distributed.ranks import TRAIN, alone, free_port, start

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


@pytest.mark.parametrize("victim", [0, 1])
def test_a_launcher_that_restarts_lost_ranks_continues_from_the_newest_checkpoint(overrides, tmp_path, victim):
    words = [*overrides, "train.max_steps=12"]
    launcher = start(2, words, restarts=1)
    wait_for_training(tmp_path / "runs" / "run")
    os.kill(workers(launcher)[victim], signal.SIGKILL)
    said, _ = launcher.communicate(timeout=280)
    assert launcher.returncode == 0, said[-3000:]
    assert "continuing" in said
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["run"]
    events = [json.loads(line) for line in (tmp_path / "runs" / "run" / "events.jsonl").read_text().splitlines()]
    assert [event["type"] for event in events].count("resume") == 1
    assert list_checkpoints(tmp_path / "runs" / "run")[-1].name == "step_00000012"


def test_launchers_of_two_machines_restart_a_lost_rank(overrides, tmp_path):
    port, words = free_port(), [*overrides, "train.max_steps=12"]
    launchers = [start(1, words, machines=2, port=port, restarts=2) for _ in range(2)]
    wait_for_training(tmp_path / "runs" / "run")
    lost = next(pid for launcher in launchers for rank, pid in workers(launcher).items() if rank == 1)
    os.kill(lost, signal.SIGKILL)
    said = [launcher.communicate(timeout=280)[0] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], "".join(said)[-3000:]
    assert "continuing" in "".join(said)
    assert list_checkpoints(tmp_path / "runs" / "run")[-1].name == "step_00000012"


LOST = """
import os, signal, sys
from moetrain.models import experts_exchange
from moetrain.train import main

original, calls = experts_exchange._Route._exchange, 0

def exchange(self, *args):
    global calls
    calls += 1
    if calls == 400 and os.environ["RANK"] == sys.argv[1]:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, *args)

experts_exchange._Route._exchange = exchange
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize(("ranks", "victim"), [(2, 0), (2, 1), (4, 3)])
def test_a_rank_killed_in_the_middle_of_an_all_to_all_ends_the_others_with_one_line(overrides, tmp_path, ranks, victim):
    """Also those of another group of experts, which do not exchange tokens with it."""
    (tmp_path / "lost.py").write_text(LOST)
    command = [str(tmp_path / "lost.py"), str(victim), *overrides, "train.expert_parallel=2"]
    everyone = list(alone(command, ranks))
    try:
        everyone[victim].wait(timeout=240)
        begin = time.monotonic()
        said = {rank: each.communicate(timeout=LIMIT)[0] for rank, each in enumerate(everyone) if rank != victim}
        assert time.monotonic() - begin < LIMIT
    finally:
        for each in everyone:
            each.kill()
    assert everyone[victim].returncode == -signal.SIGKILL
    assert list_checkpoints(tmp_path / "runs" / "run")
    for rank, printed in said.items():
        assert everyone[rank].returncode == 1
        errors = [line for line in printed.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        assert "Traceback" not in printed
        assert "run the same command again to resume from the last checkpoint" in errors[0]
    assert any(f"rank {victim} (pid {everyone[victim].pid} on " in printed for printed in said.values())


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
