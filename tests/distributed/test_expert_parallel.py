"""Experts split over ranks: losses, gradients, norms and routing are those of one rank that holds all of them."""

import json

import pytest

from tests.conftest import small_run
from tests.distributed.ranks import run_ranks

EXACT = ("plain", "loop", "recomputed", "bias", "micro_batch", "compiled", "starved")
LAYOUTS = {
    "2": (2, ["train.expert_parallel=2"]),
    "2, sharded": (2, ["train.expert_parallel=2", "train.sharding=fsdp"]),
    "4": (4, ["train.expert_parallel=4"]),
    "2 of 4": (4, ["train.expert_parallel=2"]),
    "2 of 4, sharded": (4, ["train.expert_parallel=2", "train.sharding=fsdp"]),
    "4, sharded": (4, ["train.expert_parallel=4", "train.sharding=fsdp"]),
}
EACH = [pytest.param(name, marks=pytest.mark.fault if ranks > 2 else ()) for name, (ranks, _) in LAYOUTS.items()]


@pytest.fixture(scope="module")
def check(corpus_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("expert_parallel")
    base = [*small_run(corpus_folder, folder, tmp_path_factory.getbasetemp()), "train.batch_rows=8"]

    def run(name, *variants):
        ranks, overrides = LAYOUTS[name]
        command = ["-m", "tests.distributed.expert_parallel", ",".join(variants), *base, *overrides]
        return json.loads(run_ranks(command, ranks)[0].splitlines()[-1])

    return run


@pytest.mark.parametrize("name", EACH)
def test_three_steps_are_those_of_one_rank(check, name):
    ranks, overrides = LAYOUTS[name]
    variants = EXACT if "sharding" not in str(overrides) else ("plain", "recomputed", "bias")
    found = check(name, *variants, "bf16")
    for variant in variants:
        worst = found[variant]
        assert worst["counts"] == worst["load"] == 0, (variant, worst)
        for key in ("loss", "gradients", "norm", "sums"):
            assert worst[key] < 1e-5, (variant, worst)
        assert worst["weights"] < 1e-3, (variant, worst)
        held = ranks if "sharding" in str(overrides) else int(overrides[0].rpartition("=")[2])
        assert worst["held"] * held == worst["of"]
    assert found["bf16"]["loss"] < 1e-3
    assert found["bf16"]["norm"] < 0.02
