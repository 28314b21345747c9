"""Killed anywhere and run again, a run is the straight run, bit for bit.

Plain ``pytest`` kills a few times; ``pytest -m fault`` kills at every fault point, and at random moments.
"""

import json
import random
import re
import signal
import time

import pytest

from moetrain.checkpoint.manager import checkpoint_folder
from tests.conftest import small_run
from tests.fault.launch import Launched, run
from tests.fault.sameness import different, left_behind

# Everything that keeps a state is on: stream, panel, probes, routing of each sample, accumulation, the balancing's
# bias, guards, dropped checkpoints.
SETTINGS = (
    "probes.tasks=[items.jsonl]",
    "probes.readings=3",
    "monitor.store_top=2",
    "train.micro_batch_rows=4",
    "data.domains.sums.panel_tokens=12",
    "model.balancing=bias",
    "train.keep_checkpoints=1",
    "train.keep_every=10",
)
KILLED = -signal.SIGKILL


class Runs:
    """Runs of one configuration in folders of their own; the straight one first, with its fault points noted."""

    def __init__(self, corpus, folder, cache):
        self._corpus, self._folder, self._cache, self._count = corpus, folder, cache, 0
        (corpus / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in _items()))
        run([*self.overrides(folder), "--check"], folder / "check.log")  # prepares the data
        begin = time.monotonic()
        assert run(self.overrides(folder / "straight"), folder / "straight.log", f"trace:{folder / 'points'}") == 0
        self.seconds = time.monotonic() - begin
        self.straight = folder / "straight" / "runs" / "run"
        self.points = [_without_names(line) for line in (folder / "points").read_text().splitlines()]

    def overrides(self, output):
        return [*small_run(self._corpus, output, self._cache), *SETTINGS]

    def fresh(self):
        """Overrides of a run in a folder of its own, and its log."""
        self._count += 1
        output = self._folder / str(self._count)
        return self.overrides(output), self._folder / f"{self._count}.log", output / "runs"

    def finish(self, overrides, log, runs):
        """Run on to the end; the run must be the straight one."""
        assert run(overrides, log) == 0, log.read_text()
        newest = max(runs.iterdir(), key=lambda path: (len(path.name), path.name))  # before a checkpoint: a new one
        assert different(newest, self.straight) == []


def _items():
    """Additions whose terms are larger than those of the training text."""
    for number in range(8):
        terms = 21 + number, 30 - number
        choices = [f"{sum(terms) + shift}." for shift in (0, 1, -3)]
        question = {"prompt": f"{terms[0]} plus {terms[1]} is", "sep": " ", "choices": choices, "answer": 0}
        yield {"domain": "sums", "task": "add", "id": str(number), **question}


def _without_names(point):
    """A fault point without the step, the time and the process's number that a name ends in."""
    return re.sub(r"(_|\.)\d{8,}.*", r"\1", point)


@pytest.fixture(scope="module")
def runs(corpus_folder, tmp_path_factory):
    return Runs(corpus_folder, tmp_path_factory.mktemp("kill"), tmp_path_factory.getbasetemp())


def test_the_straight_run_learns_and_leaves_everything(runs):
    left = left_behind(runs.straight)
    losses = [float(value) for _, value in left["point loss/train"]]
    assert losses[-1] < losses[0] - 0.5
    assert {"events", "summary/domains", "routing/panel_00000004.parquet"} <= left.keys()
    assert {"point stream/d_path/sums", "point pathway/spread/sums", "point loss/validation/sums"} <= left.keys()
    assert {"point probe/add/accuracy", "routing/probe_00000012.parquet", "summary/probes"} <= left.keys()
    assert any(name.startswith("routing/samples_") for name in left)
    for state in ("model/lm_head.weight", "optimizer/lm_head.weight.exp_avg", "interval/loss_D", "balancing/share_LE"):
        assert f"step_00000010/{state}" in left
    assert len(left["step_00000012/record"]["guards"]["losses"]) == 12
    assert len([name for name in left if name.startswith("step_00000012/monitor/")]) == 12


# The fault points of a run's saves, in order; the straight run shows whether the list is complete.
_TENSORS = (
    "model",
    "optimizer",
    "balancing",
    "interval",
    "monitor",
    "exposures",
    "panel",
    "probes",
    "repeats",
    "relations",
)
POINTS = (
    *("write config.yaml", "sync config.yaml.partial", "rename config.yaml", "sync run"),
    *("write tokenizer.model", "sync tokenizer.model.partial", "rename tokenizer.model"),
    *(f"{done} {piece}_" for piece in ("router", "panel", "probe", "samples") for done in ("write", "sync", "rename")),
    "sync routing",
    *("write events.out.tfevents.", "sync events.out.tfevents.", "write events.jsonl", "sync events.jsonl"),
    *(f"write {name}.safetensors" for name in _TENSORS),
    *(f"sync {name}.safetensors" for name in _TENSORS),
    *("write record.json", "sync record.json", "write manifest.json", "sync manifest.json"),
    *("sync step_", "rename checkpoint", "sync checkpoints"),
    *("rename pruned checkpoint", "remove pruned checkpoint"),
    *("write summary.json", "sync summary.json.partial", "rename summary.json"),
)
SHORT = ("write optimizer.safetensors", "rename checkpoint", "rename pruned checkpoint")


def test_the_list_of_points_is_complete(runs):
    assert set(POINTS) == set(runs.points)


@pytest.mark.parametrize(
    "point", [pytest.param(point, marks=[] if point in SHORT else pytest.mark.fault) for point in POINTS]
)
def test_killed_in_a_save_it_resumes_as_the_straight_run(runs, point):
    """At the second time that it reaches the point, where it reaches it twice."""
    overrides, log, folder = runs.fresh()
    times = min(2, runs.points.count(point))
    assert run(overrides, log, f"KILL:{times}:{point}") == KILLED, log.read_text()
    if point == "rename summary.json":  # the run is done
        assert different(folder / "run", runs.straight) == []
    else:
        runs.finish(overrides, log, folder)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.fault) for seed in range(1, 20))])
def test_killed_at_a_random_moment_it_resumes_as_the_straight_run(runs, seed):
    killed_at_random(runs, random.Random(seed), 1)


@pytest.mark.fault
@pytest.mark.parametrize("seed", range(5))
def test_killed_at_three_random_moments_it_resumes_as_the_straight_run(runs, seed):
    killed_at_random(runs, random.Random(100 + seed), 3)


def killed_at_random(runs, rng, kills):
    overrides, log, folder = runs.fresh()
    for _ in range(kills):
        if Launched(overrides, log).kill_after(rng.uniform(0.1, 0.9) * runs.seconds) != KILLED:
            overrides, log, folder = runs.fresh()  # it had ended before: once more, from the start
    runs.finish(overrides, log, folder)


def test_killed_while_it_resumes_from_an_older_checkpoint_it_repeats_nothing(runs):
    overrides, log, folder = runs.fresh()
    assert run(overrides, log, "KILL:1:rename summary.json") == KILLED
    (folder / "run" / "summary.json").unlink()
    older = [*overrides, f"train.resume={checkpoint_folder(folder / 'run', 10)}"]
    for point in ("rename superseded checkpoint", "cut file", "sync record.json"):
        assert run(older, log, f"KILL:1:{point}") == KILLED, log.read_text()
    runs.finish(overrides, log, folder)
