"""Muon on two ranks, with a replica each and sharded, gives what it gives on one rank."""

import pytest

from moetrain.checkpoint.manager import checkpoint_folder
from moetrain.config import load_settings
from moetrain.train import train
from tests.distributed.test_sharding import STEPS, Runs, resumable
from tests.trainer.reading import assert_close, scalars, states

MUON = ("optim.name=muon", "model.num_shared_experts=1")


@pytest.fixture(scope="module")
def runs(corpus_folder, tmp_path_factory):
    return Runs(corpus_folder, tmp_path_factory.mktemp("muon"), tmp_path_factory.getbasetemp())


def assert_same(run, one, step, tolerance):
    actual, expected = (states(checkpoint_folder(each, step)) for each in (run, one))
    assert sum("momentum_buffer" in key for key in expected) == 3 * 8  # projections, experts and the shared expert
    assert_close(actual, expected, ("model/", "optimizer/"), tolerance)


def test_sharded_matrices_and_experts_move_as_on_one_rank(runs):
    sharded, one = runs.sharded("fsdp-2", *MUON), runs.one(*MUON)
    for step, tolerance in ((1, 1e-5), (STEPS, 1e-3)):
        assert_same(sharded, one, step, tolerance)
    copy = resumable(sharded, "muon-two-to-one", 5)
    assert train(load_settings(None, runs.overrides("muon-two-to-one", *MUON))) == 0
    assert_same(copy, one, STEPS, 1e-3)


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.fault)])
def test_split_experts_move_as_on_one_rank(runs, ranks):
    """On four ranks, the experts of each are also sharded within their matrices."""
    split = ["train.expert_parallel=2", *(["train.sharding=fsdp"] if ranks == 4 else [])]
    name = f"muon-split-{ranks}"
    runs.launch(1, ranks, runs.overrides(name, *MUON, *split))
    for step, tolerance in ((1, 1e-5), (STEPS, 1e-3)):
        assert_same(runs.folder / "runs" / name, runs.one(*MUON), step, tolerance)


def test_replicas_move_as_on_one_rank(runs):
    one = runs.one(*MUON)
    runs.launch(1, 2, runs.overrides("muon-replicated", *MUON))
    replicated = runs.folder / "runs" / "muon-replicated"
    for step, tolerance in ((1, 1e-5), (STEPS, 1e-3)):
        assert_same(replicated, one, step, tolerance)
    losses = [[value for _, value in scalars(run)["loss/train"]] for run in (replicated, one)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
