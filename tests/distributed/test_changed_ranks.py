"""Everything that a run measures is the same on one rank and on two, also where it goes on with another number."""

import json
import random
import shutil

import pytest
import torch

from moetrain.checkpoint.manager import checkpoint_folder
from moetrain.config import load_settings
from moetrain.train import train
from tests.conftest import sentences, small_run
from tests.distributed.ranks import launch
from tests.trainer.reading import assert_close, assert_same_scalars, events, scalars, states

pytestmark = pytest.mark.slow
STEPS, STOPPED = 12, 5
MEASURED = (
    "data.domains.sums.repeats=4",
    "data.domains.sums.limit=200",
    "data.domains.stories.limit=200",
    "data.heldout_share=0.3",
    "panel.samples=32",
    "panel.repeat_every=1",
    "probes.tasks=[quiz.jsonl]",
    "probes.readings=3",
    "monitor.exposure_window=24",  # a few steps fill it
    "optim.schedule=constant",
    "optim.learning_rate=0.003",
    "train.micro_batch_rows=4",
    "train.checkpoint_every=1",
    "train.keep_checkpoints=99",
)


class Runs:
    """Runs in one folder by name, each on a number of ranks."""

    def __init__(self, corpus, folder, cache):
        self.folder, self._base = folder / "runs", small_run(corpus, folder, cache)
        self._empty = folder / "empty.yaml"
        self._empty.write_text("")

    def run(self, name, ranks, *settings):
        """Train, or go on with, the run of this name; returns its folder."""
        overrides = [*self._base, *settings, f"run.name={name}"]
        if ranks == 1:
            torch.set_num_threads(1)
            assert train(load_settings(None, overrides)) == 0
        else:
            launch(ranks, [str(self._empty), *overrides])
        return self.folder / name

    def unfinished(self, run, name, step):
        """A copy of a run as it was after a step, for `run` to go on with."""
        copy = shutil.copytree(run, self.folder / name)
        (copy / "summary.json").unlink()
        for folder in (copy / "checkpoints").iterdir():
            if int(folder.name.removeprefix("step_")) > step:
                shutil.rmtree(folder)


@pytest.fixture(scope="module")
def runs(corpus_folder, tmp_path_factory):
    return Runs(corpus_folder, tmp_path_factory.mktemp("changed"), tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def one(runs):
    return runs.run("one", 1, *MEASURED)


@pytest.fixture(scope="module")
def two(runs):
    return runs.run("two", 2, *MEASURED)


def assert_same_run(actual, expected, steps):
    """The same samples in all windows, and the same losses, weights, verdicts and curves up to rounding."""
    for step in steps:
        mine, other = (states(checkpoint_folder(run, step)) for run in (actual, expected))
        assert_close(mine, other, ("model/", "exposures/loss", "panel/losses", "repeats/"), 2e-3)
        entropy = (each["exposures/entropy"] for each in (mine, other))  # NaN where a step did not compute it
        torch.testing.assert_close(*entropy, rtol=2e-3, atol=2e-3, equal_nan=True)
        for key, value in other.items():
            if key.startswith(("monitor/", "exposures/")) and not value.is_floating_point():
                assert torch.equal(mine[key], value), (step, key)
        assert {"exposures/order", "exposures/document", "monitor/0.order", "monitor/1.sample"} <= other.keys()
    assert_same_scalars(scalars(actual), scalars(expected))


def test_two_ranks_measure_what_one_does(one, two):
    assert {"probe/adding/accuracy", "repeat/worth/sums", "loss/exposure_1/sums"} <= scalars(one).keys()
    assert_same_run(two, one, (1, STEPS))


def test_two_that_share_the_weights_too(runs, one):
    assert_same_run(runs.run("fsdp", 2, *MEASURED, "train.sharding=fsdp"), one, (1, STEPS))


@pytest.mark.parametrize(("before", "ranks"), [("two", 1), ("one", 2)])
def test_a_run_that_goes_on_with_another_number_of_ranks_is_the_same(runs, one, before, ranks, request):
    name = f"{before}-to-{ranks}"
    runs.unfinished(request.getfixturevalue(before), name, STOPPED)
    run = runs.run(name, ranks, *MEASURED)
    assert [event["step"] for event in events(run) if event["type"] == "resume"] == [STOPPED]
    assert_same_run(run, one, (STOPPED + 1, STEPS))


def test_an_added_domain_is_read_before_it_is_trained_on_by_other_ranks_too(runs, one, two, tmp_path):
    rng = random.Random(5)
    lines = [json.dumps({"text": f"New {number}. " + sentences(rng, rng.randint(2, 12))}) for number in range(150)]
    (tmp_path / "more.jsonl").write_text("\n".join(lines) + "\n")
    added = (*MEASURED, f"data.domains.more.path={tmp_path / 'more.jsonl'}", "train.max_steps=16")

    def go_on(name, ranks, first):
        return runs.run(name, ranks, *added, f"train.resume={checkpoint_folder(first, STOPPED)}")

    expected = go_on("one-wider", 1, one)
    initial = states(checkpoint_folder(expected, 16))["panel/initial"]
    assert initial.isfinite().all()
    assert len(initial) > len(states(checkpoint_folder(one, STEPS))["panel/initial"])
    for name, ranks, first in (("one-wider-on-two", 2, one), ("two-wider-on-one", 1, two)):
        run = go_on(name, ranks, first)
        torch.testing.assert_close(states(checkpoint_folder(run, 16))["panel/initial"], initial, rtol=1e-3, atol=1e-3)
        assert_same_run(run, expected, (STOPPED + 1, 16))


EVERY = 10
NOISE = (
    "data.domains.stories.limit=30",
    "data.domains.stories.repeats=2",
    "data.domains.sums.limit=20",
    "data.domains.noise.limit=60",
    "data.domains.noise.repeats=auto",
    "data.domains.noise.most_repeats=64",
    "data.heldout_share=0.4",
    "data.least_worth=0.4",
    "panel.samples=32",
    "panel.tokens=8",
    "panel.readings=9",
    "panel.repeat_every=1",
    "train.max_steps=null",
    "train.batch_rows=4",
    f"train.checkpoint_every={EVERY}",
    "train.keep_checkpoints=99",
    "monitor.every=50",
)


def stops(run):
    """After which steps repeats were left out, and what was said of it."""
    said = [(event["step"], event["sentence"]) for event in events(run) if event["type"] == "repeat"]
    return [(step, sentence) for step, sentence in said if "is not repeated any more" in sentence]


@pytest.fixture(scope="module")
def noise(runs, tmp_path_factory):
    """Settings of a run on random letters, which can only be learned by heart, and the run on one rank.

    A pass over them is worth little once that is done.
    """
    path, rng = tmp_path_factory.mktemp("noise") / "noise.jsonl", random.Random(7)
    texts = [" ".join("".join(rng.choices("abcdefghijklmnop", k=4)) for _ in range(6)) for _ in range(300)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    settings = (f"data.domains.noise.path={path}", *NOISE)
    return settings, runs.run("noise", 1, *settings)


@pytest.mark.parametrize("sharding", ["none", "fsdp"])
@pytest.mark.parametrize("after", [False, True])
def test_repeats_stop_at_the_same_step_and_stay_stopped(runs, noise, sharding, after):
    """Resumed just before or after the stop: from the first step on, rounding would grow until then."""
    settings, one = noise
    ((step, sentence),) = stops(one)
    begin = step + EVERY if after else step - EVERY
    begin -= begin % EVERY
    name = f"noise-{sharding}-{begin}"
    runs.unfinished(one, name, begin)
    two = runs.run(name, 2, *settings, f"train.sharding={sharding}")  # without sharding rank 1 measures the noise
    assert [event["step"] for event in events(two) if event["type"] == "resume"] == [begin]
    assert stops(two) == [(step, sentence)]
    curves = [scalars(run) for run in (two, one)]
    measured, expected = ([point for point in each["repeat/worth/noise"] if point[0] <= step] for each in curves)
    assert [at for at, _ in measured] == [at for at, _ in expected]
    assert expected[-1][1] < 0.4 <= min(value for _, value in expected[:-1])
    assert [value for _, value in measured] == pytest.approx([value for _, value in expected], abs=0.02)
    for tag in ("repeat/passes/noise", "optim/learning_rate", "data/tokens/noise"):
        assert curves[0][tag] == curves[1][tag]
    mine, other = (json.loads((run / "summary.json").read_text()) for run in (two, one))
    for key in ("steps", "data"):
        assert mine[key] == other[key]
