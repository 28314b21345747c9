"""A sharded model against an unsharded one: initial weights, collectives, graphs, and what is read of it."""

import json

import pytest

from tests.conftest import MARKED_ANSWERS, small_run
from tests.distributed.ranks import run_ranks


@pytest.fixture
def check(corpus_folder, tmp_path, tmp_path_factory):
    base = [*small_run(corpus_folder, tmp_path, tmp_path_factory.getbasetemp()), "train.sharding=fsdp"]

    def run(name, *overrides, ranks=2):
        said = run_ranks(["-m", "tests.distributed.sharded_model", name, *base, *overrides], ranks)
        return json.loads(said[0].splitlines()[-1])

    return run


@pytest.mark.parametrize("tied", ["true", "false"])
def test_initial_weights_are_those_of_one_rank_and_each_rank_holds_its_shard(check, tied):
    found = check("initial_weights", f"model.tie_word_embeddings={tied}", "model.balancing=bias")
    assert found["equal"]
    assert found["held"] < 0.55 * found["all"]


@pytest.mark.parametrize(("sharding", "kind"), [("fsdp", "reduce_scatter"), ("none", "allreduce")])
def test_gradients_are_reduced_once_per_step(check, sharding, kind):
    found = check("collectives", f"train.sharding={sharding}", "train.batch_rows=12")
    counts = [sum(n for name, n in found[micro].items() if kind in name) for micro in ("1", "3")]
    assert counts[0] == counts[1] > 0, found


def test_a_sharded_layer_has_no_more_graphs_than_an_unsharded_one(check):
    found = check("graphs")
    assert found["sharded"]["graphs"] == found["alone"]["graphs"] > 0
    assert found["sharded"]["losses"] == pytest.approx(found["alone"]["losses"], rel=1e-4)


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_sharded_model_is_read_as_an_unsharded_one_whatever_the_share_of_each_rank(check, ranks):
    """Ranks have unequal numbers of batches of each kind, some none, and training goes on in between."""
    probes = ("probes.tasks=[quiz.jsonl]", "probes.generate=true", "train.compile=false")
    found = check("evaluations", *MARKED_ANSWERS, *probes, "train.eval_tokens=200", ranks=ranks)
    sharded, alone = found["sharded"], found["alone"]
    assert sharded["answers"] == alone["answers"] > 0
    assert {"adding", "owners"} <= set(sharded["probes"])
    assert "exact_match" in sharded["probes"]["owners"]
    for key in ("losses", "heldout", "panel", "probes", "embeddings"):
        assert_close(sharded[key], alone[key])


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
