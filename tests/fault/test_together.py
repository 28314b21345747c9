"""Two ranks that share the weights: killed in a save, stopped by a signal, diverging; each time as one rank would.

Plain ``pytest`` kills once; ``pytest -m fault`` at each point of a save of both ranks.
"""

import json
import random
import signal
import socket
import time

import pytest
import torch

from moetrain.checkpoint.manager import list_checkpoints, load_checkpoint
from moetrain.distributed.signals import STOPPED_BY_SIGNAL
from moetrain.routing.sample_store import read_samples
from tests.conftest import small_run
from tests.fault.launch import Launched, launch, run
from tests.fault.sameness import different, left_behind
from tests.trainer.reading import events, scalars
from tools import replay_step

SETTINGS = (
    "train.sharding=fsdp",
    "train.micro_batch_rows=4",
    "train.keep_checkpoints=1",
    "train.keep_every=10",
    "model.balancing=bias",
    "monitor.store_top=2",
    "probes.tasks=[quiz.jsonl]",
    "probes.readings=3",
)
KILLED = -signal.SIGKILL
ENDED = 1  # by the loss of another


class Runs:
    """Runs of two ranks in folders of their own; the straight one first."""

    def __init__(self, corpus, folder, cache):
        self._corpus, self._folder, self._cache, self._count = corpus, folder, cache, 0
        run([*self.overrides(folder), "--check"], folder / "check.log")  # prepares the data
        begin = time.monotonic()
        points = folder / "points"
        assert both(self.overrides(folder / "straight"), folder / "straight.log", f"trace:{points}") == [0, 0]
        self.seconds = time.monotonic() - begin
        self.straight = folder / "straight" / "runs" / "run"
        self.points = points.read_text().splitlines()

    def overrides(self, output):
        return [*small_run(self._corpus, output, self._cache), *SETTINGS]

    def fresh(self):
        """Overrides of a run in a folder of its own, its log and where it is."""
        self._count += 1
        output = self._folder / str(self._count)
        return self.overrides(output), self._folder / f"{self._count}.log", output / "runs"

    def finish(self, overrides, log, runs):
        """Run to the end; the run must be the straight one."""
        assert both(overrides, log) == [0, 0], log.read_text()
        newest = max(runs.iterdir(), key=lambda path: (len(path.name), path.name))  # without a checkpoint: a new one
        assert different(newest, self.straight) == []


def both(overrides, log, fault=""):
    """Exit statuses of a run's two ranks."""
    return statuses(launch(2, overrides, log, fault))


def statuses(launched: list[Launched]):
    return [process.wait() for process in launched]


@pytest.fixture(scope="module")
def runs(corpus_folder, tmp_path_factory):
    return Runs(corpus_folder, tmp_path_factory.mktemp("together"), tmp_path_factory.getbasetemp())


# Fault points of a save, and the rank that reaches them.
SHARD = "shard-0000{}-model-00001-of-00001.safetensors"
POINTS = (
    *((rank, f"write {owner}/{SHARD.format(rank + 1)}") for owner in ("model", "optimizer") for rank in (0, 1)),
    *((rank, f"sync {SHARD.format(rank + 1)}") for rank in (0, 1)),
    *((0, f"sync {owner}") for owner in ("model", "optimizer")),
    *((0, f"{done} {name}") for name in ("record.json", "manifest.json") for done in ("write", "sync")),
    *((0, f"{done} monitor.safetensors") for done in ("write", "sync")),
    *((0, point) for point in ("sync step_", "rename checkpoint", "sync checkpoints")),
    *((0, point) for point in ("rename pruned checkpoint", "remove pruned checkpoint", "rename summary.json")),
)
SHORT = (1, f"write optimizer/{SHARD.format(2)}")


@pytest.mark.parametrize(
    ("rank", "point"), [pytest.param(*point, marks=[] if point == SHORT else pytest.mark.fault) for point in POINTS]
)
def test_killed_in_a_save_they_resume_as_the_straight_run(runs, rank, point):
    assert any(name.startswith(point) for name in runs.points)
    overrides, log, folder = runs.fresh()
    times = min(2, sum(name.startswith(point) for name in runs.points))
    launched = launch(2, overrides, log, f"KILL:{times}:{point}")
    found = statuses(launched)
    assert found == ([KILLED, ENDED] if rank == 0 else [ENDED, KILLED]), log.read_text()
    assert f"rank {rank} (pid {launched[rank].pid} on " in log.read_text()
    if point == "rename summary.json":  # the run is done
        assert different(folder / "run", runs.straight) == []
    else:
        runs.finish(overrides, log, folder)


@pytest.mark.fault
@pytest.mark.parametrize("seed", range(10))
def test_one_killed_at_a_random_moment_they_resume_as_the_straight_run(runs, seed):
    rng = random.Random(seed)
    overrides, log, folder = runs.fresh()
    launched = launch(2, overrides, log)
    victim = rng.randrange(2)
    launched[victim].kill_after(rng.uniform(0.1, 0.9) * runs.seconds)
    if KILLED not in statuses(launched):
        pytest.skip("it had ended before")
    runs.finish(overrides, log, folder)


@pytest.mark.fault
def test_a_signal_to_any_rank_saves_and_ends_both(runs):
    overrides, log, folder = runs.fresh()
    stopped = [STOPPED_BY_SIGNAL] * 2
    assert both(overrides, log, f"TERM:1:write model/{SHARD.format(2)}") == stopped, log.read_text()
    assert steps(folder / "run") == [6]  # sent in the save of step 5: the step in progress is the next
    assert both(overrides, log, "INT:1:rename panel_00000008") == stopped, log.read_text()
    assert steps(folder / "run") == [8]
    said = log.read_text().replace("\n", "")
    assert "SIGTERM: saved at step 6; run the same command again to resume" in said
    assert "SIGINT: saved at step 8; run the same command again to resume" in said
    assert both(overrides, log) == [0, 0], log.read_text()
    # Two more saves have events of their own, and divide routing into more files, which a record lists.
    different_names = different(folder / "run", runs.straight)
    kept = [name for name in different_names if name.startswith(("point", "step_", "summary")) and "record" not in name]
    assert kept == []


def steps(folder):
    return [int(path.name.removeprefix("step_")) for path in list_checkpoints(folder)]


@pytest.mark.fault
def test_diverging_they_skip_the_same_updates_and_write_one_dump(runs, tmp_path):
    diverging = ["optim.learning_rate=1e30", "optim.warmup_steps=0", "guard.skipped=4", "guard.samples=3"]
    diverging += ["train.log_every=1", "train.checkpoint_every=2", "train.keep_checkpoints=9"]
    overrides, log, folder = runs.fresh()
    assert both([*overrides, *diverging], log) == [1, 1]
    assert run([*runs.overrides(tmp_path), *diverging], tmp_path / "one.log") == 1
    sharded, one = folder / "run", tmp_path / "runs" / "run"
    said = log.read_text().replace("\n", "")
    assert "step 5: the loss or the gradient was not finite in 4 steps in a row; see why with" in said
    incidents = [[(e["step"], e["kind"]) for e in events(each) if "samples" in e] for each in (sharded, one)]
    assert incidents[0] == incidents[1] == [(step, "not_finite") for step in (2, 3, 4, 5)]
    # Skipped updates leave the optimizer as the first update left it.
    for step in (2, 4):
        skipped = load_checkpoint(sharded / "checkpoints" / f"step_{step:08d}", owners=("optimizer",)).states[
            "optimizer"
        ]
        assert {float(value) for name, value in skipped.items() if name.endswith(".step")} == {1.0}
    dumps = [each / "dumps" / "step_00000005" for each in (sharded, one)]
    found = [replay_step.replay(dump, torch.device("cpu")) for dump in dumps]
    assert found[0]["first"] == found[1]["first"]
    assert [sample[:2] for sample in found[0]["samples"]] == [sample[:2] for sample in found[1]["samples"]]


@pytest.mark.fault
def test_gradients_are_clipped_by_the_norm_over_all_ranks(runs, tmp_path):
    overrides, log, folder = runs.fresh()
    clipped = ["optim.grad_clip=0.05", "train.log_every=1"]
    assert both([*overrides, *clipped], log) == [0, 0]
    assert run([*runs.overrides(tmp_path), *clipped], tmp_path / "one.log") == 0
    sharded, one = (scalars(each)["optim/grad_norm"] for each in (folder / "run", tmp_path / "runs" / "run"))
    assert min(value for _, value in one) > 0.05
    assert [value for _, value in sharded] == pytest.approx([value for _, value in one], rel=1e-3)


@pytest.mark.fault
@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_of_one_rank_costs_the_checkpoint_and_not_the_run(runs, rank):
    overrides, log, folder = runs.fresh()
    assert both(overrides, log, f"full:1:1:write optimizer/{SHARD.format(rank + 1)}") == [0, 0], log.read_text()
    said = log.read_text().replace("\n", "")
    assert f"no checkpoint was written (optimizer could not be written: rank {rank}: " in said
    assert "No space left on device" in said
    assert steps(folder / "run") == [10, 12]
    unlike = [name for name in different(folder / "run", runs.straight) if not name.endswith("/record")]
    assert unlike == ["events"]


@pytest.mark.fault
def test_what_the_other_rank_could_not_store_is_reported_and_stored_later(runs):
    overrides, log, folder = runs.fresh()
    assert both(overrides, log, "full:1:1:write samples_00000005_001.parquet") == [0, 0], log.read_text()
    incidents = [event for event in events(folder / "run") if event["type"] == "guard"]
    assert [(event["step"], event["kind"]) for event in incidents] == [(5, "storage")]
    assert incidents[0]["problem"].startswith("rank 1: routing of training samples was not stored ([Errno 28]")
    sharded, straight = (sorted_samples(each) for each in (folder / "run", runs.straight))
    assert sharded == straight


def sorted_samples(run):
    rows = [row for table in read_samples(run) for row in table.to_pylist()]
    return sorted(rows, key=lambda row: row["order"])


def test_the_straight_run_saved_shards_and_scored_probes(runs):
    left = left_behind(runs.straight)
    assert {"point probe/adding/accuracy", "routing/probe_00000012.parquet", "summary/probes"} <= left.keys()
    folder = list_checkpoints(runs.straight)[-1]
    assert json.loads((folder / "manifest.json").read_text())["files"].keys() >= {
        f"{owner}/{SHARD.format(number)}" for owner in ("model", "optimizer") for number in (1, 2)
    }


@pytest.mark.fault
def test_a_rank_whose_peer_never_joins_ends_with_a_reason(runs):
    overrides, log, _ = runs.fresh()
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "RANK": "0", "LOCAL_RANK": "0"}
    with socket.socket() as free:
        free.bind(("localhost", 0))
        place["MASTER_PORT"] = str(free.getsockname()[1])
    begin = time.monotonic()
    assert Launched(overrides, log, place=place).wait() == 2
    assert time.monotonic() - begin < 100
    assert "error: not all of 2 processes joined within 60 s" in log.read_text()
