"""Experts split over ranks: losses, gradients, norms and routing are those of one rank that holds all of them."""

import json

import pytest
import torch

from moetrain.config import SettingsError
from moetrain.distributed.expert_parallel import check_expert_shards
from moetrain.distributed.launch import start_ranks
from moetrain.distributed.mesh import make_expert_mesh
from tests.conftest import small_run
from tests.distributed.ranks import run_ranks

EXACT = ("plain", "loop", "recomputed", "bias", "micro_batch", "muon", "compiled", "starved")
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
    variants = EXACT if "sharding" not in str(overrides) else ("recomputed", "bias", "muon")
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


@pytest.mark.parametrize(
    ("experts", "sharding", "ranks", "machine", "said"),
    [
        (3, "none", 4, 4, "expert_parallel=3 does not divide 4 processes: launch a multiple of 3, or set"),
        (2, "none", 1, 1, "expert_parallel=2 does not divide 1 process: launch a multiple of 2, or set"),
        (8, "fsdp", 4, 4, "expert_parallel=8 does not divide 4 processes that share a replica of the model"),
        (4, "hybrid", 4, 2, "expert_parallel=4 does not divide 2 processes that share a replica of the model"),
    ],
)
def test_ranks_that_do_not_split_are_refused(experts, sharding, ranks, machine, said):
    with pytest.raises(SettingsError, match=f"train.{said}"):
        make_expert_mesh(experts, sharding, ranks, machine, torch.device("cpu"))


@pytest.mark.parametrize(("setting", "size"), [("hidden_size", 36), ("intermediate_size", 30)])
def test_experts_that_cannot_be_sharded_further_are_refused(make_settings, setting, size):
    settings = make_settings("model.hidden_size=40", "model.intermediate_size=20", f"model.{setting}={size}")
    check_expert_shards(make_settings().model, 8)
    with pytest.raises(SettingsError, match=rf"model.{setting}: .* over 8 ranks, which do not divide \d+: raise train"):
        check_expert_shards(settings.model, 8)


def test_a_single_process_that_should_split_experts_is_refused(make_settings):
    with pytest.raises(SettingsError, match=r"train.expert_parallel=2 does not divide 1 process: launch a multiple"):
        start_ranks(make_settings("train.expert_parallel=2"))
