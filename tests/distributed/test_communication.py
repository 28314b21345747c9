"""The collectives that the resource plan expects are those of running steps, to the byte."""

import json
from collections import Counter

import pytest
from benchmarks.communication import RankLayout, step_collectives
from benchmarks.monitor_traffic import monitor_bytes

from moetrain.routing.panel import most_samples
from tests.conftest import small_run
from tests.distributed.counted_collectives import MONITOR, VARIANTS
from tests.distributed.ranks import run_ranks

EXPERTS = "train.expert_parallel=2"
SHARDED = "train.sharding=fsdp"
LAYOUTS = {
    "replicas": (2, 2, []),
    "sharded": (2, 2, [SHARDED]),
    "experts": (2, 2, [EXPERTS]),
    "experts, sharded": (2, 2, [EXPERTS, SHARDED]),
    "machines": (4, 2, ["train.sharding=hybrid"]),
    "machines, experts": (4, 2, ["train.sharding=hybrid", EXPERTS]),
    "replicas of experts": (4, 4, [EXPERTS]),
    "shards of experts": (4, 4, [EXPERTS, SHARDED]),
}


def marked(name):
    if LAYOUTS[name][0] > 2:
        return pytest.param(name, marks=pytest.mark.fault)
    return name if name == "experts, sharded" else pytest.param(name, marks=pytest.mark.slow)


@pytest.mark.parametrize("name", [marked(name) for name in LAYOUTS])
def test_the_plan_knows_every_collective_of_a_step(name, corpus_folder, tmp_path_factory, make_settings):
    ranks, machine, overrides = LAYOUTS[name]
    folder = tmp_path_factory.mktemp("communication")
    # 30 rows of the gate and 36 columns do not divide over the ranks: shards are padded.
    more = [*overrides, "model.intermediate_size=12", "model.hidden_size=36", "model.num_attention_heads=3"]
    base = [*small_run(corpus_folder, folder, tmp_path_factory.getbasetemp()), *more]
    variants = [each for each in VARIANTS if not (each in ("dense", "uneven") and EXPERTS in overrides)]
    command = ["-m", "tests.distributed.counted_collectives", ",".join(variants), *base]
    counted = json.loads(run_ranks(command, ranks, machine=machine)[0].splitlines()[-1])
    for variant in variants:
        settings = make_settings(*more, *VARIANTS[variant])
        layout = RankLayout(ranks, machine, settings.train.sharding, settings.train.expert_parallel)
        number, size = Counter(), Counter()
        for each in step_collectives(settings, 320, layout, itemsize=2 if variant == "bf16" else 4):
            if each.purpose != "stop signals":  # the loop over steps exchanges them
                number[each.kind] += each.count
                size[each.kind] += each.nbytes
        assert size == {kind: nbytes for kind, (_, nbytes) in counted[variant].items()}, variant
        if layout.shards > 1:  # how many buckets DDP makes of gradients is its own affair
            assert number == {kind: count for kind, (count, _) in counted[variant].items()}, variant


@pytest.mark.slow
def test_the_plan_knows_what_the_monitor_sends(corpus_folder, tmp_path_factory, make_settings):
    """Pickling adds to it, and each rank sends as much as the one with the most."""
    folder = tmp_path_factory.mktemp("communication")
    wide = ["model.num_experts=64", "panel.samples=24", "monitor.window=32", "monitor.exposure_window=64"]
    base = [*small_run(corpus_folder, folder, tmp_path_factory.getbasetemp()), *wide]
    command = ["-m", "tests.distributed.counted_collectives", MONITOR, *base]
    found = json.loads(run_ranks(command, 2)[0].splitlines()[-1])[MONITOR]
    planned = monitor_bytes(make_settings(*wide))
    members, seen = found.pop("members")
    # The plan is for a corpus with samples enough for each cell, and windows that are full.
    planned["panel"] *= members / (2 * most_samples(24))
    planned["claims"] *= seen / (2 * 24)
    planned["exposures"] *= found.pop("exposed") / (2 * 64)
    for name, sent in found.items():
        # With so few rows and samples, one of the two ranks has up to a quarter more than the mean.
        assert planned[name] <= sent["gather"] < 1.3 * planned[name] + 4000, (name, planned[name])
    agreed = found["stream"]["all_reduce"] + found["exposures"]["all_reduce"]
    assert 0 < agreed <= planned["agreement"]
