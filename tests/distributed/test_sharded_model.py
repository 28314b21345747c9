"""A sharded model against an unsharded one: initial weights, collectives, graphs, and what is read of it."""

import json

import pytest

from tests.conftest import MARKED_ANSWERS, small_run
from tests.distributed.ranks import run_ranks


@pytest.fixture(scope="module")
def check(corpus_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    base = [*small_run(corpus_folder, folder, tmp_path_factory.getbasetemp()), "train.batch_rows=12"]

    def run(*checks, overrides=(), sharding="fsdp", ranks=2):
        command = ["-m", "tests.distributed.sharded_model", ",".join(checks), *base, f"train.sharding={sharding}"]
        return json.loads(run_ranks([*command, *overrides], ranks)[0].splitlines()[-1])

    return run


@pytest.fixture(scope="module")
def found(check):
    """What one launch finds of the checks that need the same settings."""
    # The ranks do not divide the experts, which are then sharded along their rows.
    overrides = ("model.tie_word_embeddings=true", "model.balancing=bias", "model.num_experts=5")
    return check("initial_weights", "collectives", "graphs", overrides=overrides)


def assert_sharded(weights):
    assert weights["equal"]
    assert weights["held"] < 0.55 * weights["all"]


def test_initial_weights_are_those_of_one_rank_and_each_rank_holds_its_shard(found):
    assert_sharded(found["initial_weights"])


@pytest.mark.slow
def test_initial_weights_without_tied_embeddings_too(check):
    assert_sharded(check("initial_weights")["initial_weights"])


def collectives(counts, kind):
    """Collectives of a kind with one and with three micro-batches."""
    return [sum(n for name, n in counts[micro].items() if kind in name) for micro in ("1", "3")]


def test_sharded_gradients_are_reduced_once_per_step(found):
    one, three = collectives(found["collectives"], "reduce_scatter")
    assert one == three == 4, found["collectives"]  # the layers, and the rest


@pytest.mark.slow
def test_replicated_gradients_are_reduced_once_per_step(check):
    one, three = collectives(check("collectives", sharding="none")["collectives"], "allreduce")
    assert one == three > 0


def test_a_sharded_layer_has_no_more_graphs_than_an_unsharded_one(found):
    sharded, alone = found["graphs"]["sharded"], found["graphs"]["alone"]
    assert sharded["graphs"] == alone["graphs"] > 0
    assert sharded["losses"] == pytest.approx(alone["losses"], rel=1e-4)


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (2, ()),
        pytest.param(2, ("model.num_experts=5", "optim.name=muon"), marks=pytest.mark.slow),
        pytest.param(4, (), marks=pytest.mark.slow),
        pytest.param(2, ("train.sharding=none", "train.expert_parallel=2"), marks=pytest.mark.slow),
        pytest.param(4, ("train.expert_parallel=2",), marks=pytest.mark.slow),
    ],
)
def test_a_sharded_model_is_read_as_an_unsharded_one_whatever_the_share_of_each_rank(check, ranks, layout):
    """Ranks have unequal numbers of batches of each kind, some none, and training goes on in between."""
    probes = ("probes.tasks=[quiz.jsonl]", "probes.generate=true", "train.compile=false")
    overrides = (*MARKED_ANSWERS, *probes, "train.eval_tokens=200", *layout)
    found = check("evaluations", overrides=overrides, ranks=ranks)["evaluations"]
    sharded, alone = found["sharded"], found["alone"]
    assert sharded["answers"] == alone["answers"] > 0
    assert {"adding", "owners"} <= set(sharded["probes"])
    assert "exact_match" in sharded["probes"]["owners"]
    for key in ("losses", "heldout", "panel", "probes", "embeddings"):
        assert_close(sharded[key], alone[key])


@pytest.mark.slow
def test_a_sharded_dense_model_in_blocks_is_read_as_an_unsharded_one(check):
    blocks = ("model.experts=dense", "model.dense_experts=8", "probes.tasks=[quiz.jsonl]")
    found = check("evaluations", overrides=(*MARKED_ANSWERS, *blocks, "train.eval_tokens=200"))["evaluations"]
    assert found["sharded"]["answers"] == found["alone"]["answers"] > 0
    for key in ("losses", "panel"):
        assert_close(found["sharded"][key], found["alone"][key])


def assert_close(value, expected):
    if isinstance(expected, dict):
        assert value.keys() == expected.keys()
        for key in expected:
            assert_close(value[key], expected[key])
    elif isinstance(expected, list):
        assert len(value) == len(expected)
        for one, other in zip(value, expected, strict=True):
            assert_close(one, other)
    else:
        assert value == pytest.approx(expected, rel=1e-3, abs=1e-3)
