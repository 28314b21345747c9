"""One, two and four processes train the same model on the same rows."""

import functools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import moetrain
from moetrain.checkpoint.manager import checkpoint_folder
from moetrain.config import SettingsError
from moetrain.distributed.launch import start_ranks
from tests.conftest import small_run
from tests.trainer.reading import scalars, states

TRAIN = Path(moetrain.__file__).parent / "train.py"
STEPS = 20


def start(processes, overrides, machines=1, port=0):
    """One machine's launcher, as a process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    command += ["--nnodes", str(machines), "--rdzv_backend", "c10d", "--rdzv_endpoint", f"localhost:{port}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*command, str(TRAIN), *overrides], env=environment, **pipes)


def launch(processes, overrides, machines=1):
    """Train with so many processes on each of some machines, all of them this one."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launchers = [start(processes, overrides, machines, port if machines > 1 else 0) for _ in range(machines)]
    for launcher in launchers:
        said, _ = launcher.communicate(timeout=240)
        assert launcher.returncode == 0, said[-3000:]


SEVERAL = pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])


@pytest.fixture(scope="module")
def run_of(corpus_folder, tmp_path_factory):
    """The same run on a number of processes, by that number; trained when it is first asked for."""
    cache = tmp_path_factory.getbasetemp()
    folder = tmp_path_factory.mktemp("processes")
    (folder / "empty.yaml").write_text("")
    often = ["train.checkpoint_every=1", "train.keep_checkpoints=99", "monitor.every=5"]
    steps = [f"train.max_steps={STEPS}", "train.micro_batch_rows=2", "optim.learning_rate=0.003"]

    @functools.cache
    def train(processes):
        overrides = [*small_run(corpus_folder, folder, cache), *often, *steps, f"run.name=p{processes}"]
        launch(processes, [str(folder / "empty.yaml"), *overrides])
        return folder / "runs" / f"p{processes}"

    return train


@SEVERAL
def test_the_same_samples_come_in_the_same_order(run_of, processes):
    for step in (1, 7, STEPS):
        one, many = (states(checkpoint_folder(run_of(p), step)) for p in (1, processes))
        keys = [key for key in one if key.startswith("monitor/") and key.endswith((".sample", ".order", ".domain"))]
        assert len(keys) == 6
        for key in keys:
            assert torch.equal(one[key], many[key]), key


@SEVERAL
@pytest.mark.parametrize(("step", "tolerance"), [(1, 1e-5), (STEPS, 1e-3)])
def test_weights_agree(run_of, processes, step, tolerance):
    one, many = (states(checkpoint_folder(run_of(p), step)) for p in (1, processes))
    for key in one:
        if key.startswith("model/"):
            torch.testing.assert_close(
                many[key], one[key], rtol=tolerance, atol=tolerance, msg=lambda m, k=key: f"{k}: {m}"
            )


@SEVERAL
def test_losses_and_metrics_agree_over_all_ranks(run_of, processes):
    one, many = scalars(run_of(1)), scalars(run_of(processes))
    assert one.keys() == many.keys()
    for tag, points in one.items():
        assert [step for step, _ in many[tag]] == [step for step, _ in points]
        for (step, value), (_, theirs) in zip(points, many[tag], strict=True):
            discrete = tag.startswith(("stream/", "experts/"))
            tolerance = 0.02 if discrete else 1e-5 if step <= 1 else 1e-3
            assert theirs == pytest.approx(value, rel=tolerance, abs=1e-3), (tag, step)


@SEVERAL
def test_only_one_process_writes(run_of, processes):
    for run in (run_of(1), run_of(processes)):
        assert len(list(run.glob("events.out.tfevents.*"))) == 1
        types = [json.loads(line)["type"] for line in (run / "events.jsonl").read_text().splitlines()]
        assert types == ["checkpoint"] * STEPS + ["memorized"] * 2  # by the finished run's rule, a domain each


def test_a_launch_whose_processes_did_not_join_is_refused(make_settings, monkeypatch):
    # What accelerate launch --cpu --num_processes 2 comes to: a process that is alone and does not know it.
    monkeypatch.setattr("moetrain.distributed.launch.PartialState", lambda **_: type("One", (), {"num_processes": 1})())
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SettingsError, match="2 processes were launched but 1 joined: on CPU launch them with torchrun"):
        start_ranks(make_settings())


def test_a_batch_that_does_not_split_is_refused(make_settings):
    settings = make_settings("train.batch_rows=8", "train.micro_batch_rows=8")
    start_ranks(settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moetrain.distributed.launch.PartialState", lambda **_: type("Three", (), {"num_processes": 3})())
        patch.setenv("WORLD_SIZE", "3")
        with pytest.raises(SettingsError, match=r"8 does not split over 3 processes.*multiple of 24"):
            start_ranks(settings)
