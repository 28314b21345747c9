"""One, two and four ranks train the same model on the same rows."""

import functools

import pytest
import torch

from moetrain.checkpoint.manager import checkpoint_folder
from moetrain.config import SettingsError
from moetrain.distributed.launch import start_ranks
from tests.conftest import small_run
from tests.distributed.ranks import TRAIN, alone, launch
from tests.trainer.reading import assert_close, assert_same_scalars, assert_types_of_events, scalars, states

STEPS = 20


SEVERAL = pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])


@pytest.fixture(scope="module")
def run_of(corpus_folder, tmp_path_factory):
    """The same run on a number of ranks, by that number; trained when it is first needed."""
    cache = tmp_path_factory.getbasetemp()
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "empty.yaml").write_text("")
    often = ["train.checkpoint_every=1", "train.keep_checkpoints=99", "monitor.every=5"]
    steps = [f"train.max_steps={STEPS}", "train.micro_batch_rows=2", "optim.learning_rate=0.003"]

    @functools.cache
    def train(ranks):
        overrides = [*small_run(corpus_folder, folder, cache), *often, *steps, f"run.name=p{ranks}"]
        launch(ranks, [str(folder / "empty.yaml"), *overrides])
        return folder / "runs" / f"p{ranks}"

    return train


@SEVERAL
def test_the_same_samples_come_in_the_same_order(run_of, ranks):
    for step in (1, 7, STEPS):
        one, many = (states(checkpoint_folder(run_of(p), step)) for p in (1, ranks))
        keys = [key for key in one if key.startswith("monitor/") and key.endswith((".sample", ".order", ".domain"))]
        assert len(keys) == 6
        for key in keys:
            assert torch.equal(one[key], many[key]), key


@SEVERAL
@pytest.mark.parametrize(("step", "tolerance"), [(1, 1e-5), (STEPS, 1e-3)])
def test_weights_agree(run_of, ranks, step, tolerance):
    one, many = (states(checkpoint_folder(run_of(p), step)) for p in (1, ranks))
    assert_close(many, one, "model/", tolerance)


@SEVERAL
def test_losses_and_metrics_agree_over_all_ranks(run_of, ranks):
    assert_same_scalars(scalars(run_of(ranks)), scalars(run_of(1)))


def test_a_dense_model_in_blocks_is_recorded_alike_on_two_ranks(corpus_folder, tmp_path, tmp_path_factory):
    (tmp_path / "empty.yaml").write_text("")
    dense = ["model.experts=dense", "model.dense_experts=8", "train.micro_batch_rows=2", "train.max_steps=6"]
    base = [*small_run(corpus_folder, tmp_path, tmp_path_factory.getbasetemp()), *dense, "optim.learning_rate=0.003"]
    for ranks in (1, 2):
        launch(ranks, [str(tmp_path / "empty.yaml"), *base, f"run.name=p{ranks}"])
    one, two = (scalars(tmp_path / "runs" / f"p{ranks}") for ranks in (1, 2))
    assert {"stream/cosine/sums", "pathway/d_path_norm/sums", "kernel/effective_rank/sums"} <= one.keys()
    assert_same_scalars(two, one)


@SEVERAL
def test_only_the_main_rank_writes(run_of, ranks):
    for run in (run_of(1), run_of(ranks)):
        assert len(list(run.glob("events.out.tfevents.*"))) == 1
        # `memorized` by the finished run's rule, a domain each.
        assert_types_of_events(run, ["checkpoint"] * STEPS + ["memorized"] * 2)


def test_a_launch_whose_ranks_did_not_join_is_refused(make_settings, monkeypatch):
    # What accelerate launch --cpu --num_processes 2 comes to: a rank that is alone and does not know it.
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


def test_ranks_with_other_settings_are_refused(corpus_folder, tmp_path, tmp_path_factory):
    run = small_run(corpus_folder, tmp_path, tmp_path_factory.getbasetemp())
    (tmp_path / "empty.yaml").write_text("")
    processes = list(
        alone([str(TRAIN), str(tmp_path / "empty.yaml"), *run, "train.max_steps={rank}9", "run.name=r{rank}"])
    )
    for process in processes:
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 2, said
        assert "run.name: rank 1 and rank 0 have other values: start all ranks with the same settings" in said
    assert not (tmp_path / "runs").exists()
