"""The benchmarks on tiny shapes: what they measure and write, and how ratios are calculated."""

import os
from contextlib import ExitStack, contextmanager
from statistics import median

import bench
import pytest
import torch
from benchmarks import (
    backends,
    flops,
    monitor,
    monitor_costs,
    peers,
    steps,
    subprocess_bench,
    timing,
    transformers_peers,
)

from moetrain.monitoring.monitor import Monitor
from moetrain.trainer import Trainer
from tests.tools.benchmark import run, settings_of


def test_ratios_are_of_medians_and_sides_alternate():
    seconds = {"slow": [9.0, 2.0, 4.0], "fast": [1.0, 1.0, 8.0]}
    assert timing.ratio(seconds["slow"], seconds["fast"])["ratio"] == 4.0  # of means: 1.5
    share = timing.share_with_interval([1.1, 1.2, 1.3], [1.0, 1.0, 9.0])
    assert share["share"] == pytest.approx(0.2)
    assert share["low"] <= share["share"] <= share["high"]
    with pytest.raises(ValueError, match="same turns"):
        timing.ratio([1.0], [1.0, 2.0])
    order = []
    sides = {name: lambda turn, name=name: order.append((turn, name)) for name in "ab"}
    timings = timing.take_turns(sides, turns=2, device=torch.device("cpu"), warmup=1)
    assert order == [(0, "a"), (0, "b"), (1, "b"), (1, "a"), (2, "a"), (2, "b")]
    assert all(len(timings[name].wall) == len(timings[name].cpu) == 2 for name in "ab")
    assert timings["a"].seconds == median(timings["a"].wall)


def test_monitor_overhead_and_panel_reading(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    asked = ("--parts", "share", "sums", "panel", "--pairs", "2", "--steps", "2")
    result = run(tmp_path, "monitor", *config, "train.max_steps=null", *asked)
    share, panel = result["share"]["small"], result["panel"]["small"]
    for by in ("wall", "cpu"):
        assert share[by]["low"] <= share[by]["share"] <= share[by]["high"]
    assert 0 < share["inside"] < 1
    assert share["with"]["turns"] == share["without"]["turns"] == 2
    assert share["wall"]["share"] == pytest.approx(share["with"]["seconds"] / share["without"]["seconds"] - 1)
    assert (share["domains"], share["window"], share["steps_between_readings"]) == (2, 8, 2)
    inside = result["sums"]["small"]
    assert inside["with"]["turns"] == 4
    assert inside["cpu"]["low"] <= inside["cpu"]["share"] <= inside["cpu"]["high"]
    assert panel["samples"] > 16
    assert 0 < panel["training_waits_seconds"] <= panel["until_shown_seconds"]
    assert "by CPU time" in capsys.readouterr().out


def test_a_block_without_the_monitor_records_nothing(config, monkeypatch):
    blocks = []
    measure, train_step = Monitor.measure_stream, Trainer.train_step

    def measured(self, model, step):
        blocks[-1].append("measured")
        measure(self, model, step)

    def stepped(self, step):
        before = self.clock.spent("record")
        train_step(self, step)
        assert (self.clock.spent("record") > before) == self.settings.monitor.enabled
        blocks.append([self.settings.monitor.enabled])

    monkeypatch.setattr(Monitor, "measure_stream", measured)
    monkeypatch.setattr(Trainer, "train_step", stepped)
    monitor.share(settings_of([*config, "train.max_steps=null"]), pairs=2, steps=2)
    with_measurement = [enabled for enabled, *measured in blocks if measured]
    assert with_measurement == [True, True]
    assert [enabled for enabled, *_ in blocks[-8:]] == [True] * 2 + [False] * 4 + [True] * 2


def test_costs_and_distances(tmp_path):
    pytest.importorskip("matplotlib")
    found = monitor_costs.costs({"samples": (8, 256), "layers": (2,), "experts": (4,)}, seconds=0.02)
    assert [(row["samples"], row["layers"], row["experts"]) for row in found] == [
        (8, 16, 64),
        (256, 16, 64),
        (64, 2, 64),
        (64, 16, 4),
    ]
    assert found[1]["reading_seconds"] > found[0]["reading_seconds"] > 0
    assert all(row["record_seconds"] > 0 for row in found)
    monitor_costs.draw(found, tmp_path / "costs.png")
    assert (tmp_path / "costs.png").read_bytes().startswith(b"\x89PNG")
    result = run(tmp_path, "monitor", "--parts", "distances", "--samples", "30")["distances"]
    sharp, flat = result["sharp"], result["flat"]
    assert sharp["symbols"] < flat["symbols"]
    assert sharp["ratio_to_cdist"]["ratio"] == pytest.approx(sharp["d_path"]["seconds"] / sharp["cdist"]["seconds"])


def test_errors_are_one_line(config, capsys):
    never_full = ("monitor.window=9999", "train.batch_rows=1", "--pairs", "1", "--steps", "1")
    for words, message in (
        (("monitor", *config, "--parts", "share", "--steps", "100000"), "the data suffices for"),
        (("monitor", *config, "monitor.enabled=false"), "no routing to monitor"),
        (("monitor", *config, *never_full), "lower monitor.window"),
        (("monitor", "--parts", "distances", "--samples", "4", "--figure", "x.png"), "add costs to --parts"),
        (("monitor", *config, "model.expert=3"), "unknown key"),
        (("plan", *config, "--tokens-per-second", "9", "--gpus", "3"), "does not divide over 3 devices"),
        (("plan", *config, "--measured", config[0]), "not a result of train or peers"),
    ):
        assert bench.main(list(words)) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert message in error


@contextmanager
def _ready(side):
    yield lambda turn: side.append((turn, os.getpid()))


@contextmanager
def _broken():
    raise RuntimeError("no such model")
    yield


def test_sides_run_in_subprocesses_and_their_errors_are_raised():
    cpu, here = torch.device("cpu"), []
    with subprocess_bench.in_subprocesses({"one": (_ready, (here,))}, cpu) as sides:
        wall, cpu_seconds = sides["one"](0)
        assert 0 < wall < 10
        assert cpu_seconds >= 0
    assert here == []  # the side ran in another process
    assert subprocess_bench.call_in_subprocess(os.getpid) != os.getpid()
    with (
        pytest.raises(RuntimeError, match="no such model"),
        subprocess_bench.in_subprocesses({"one": (_broken, ())}, cpu),
    ):
        pass


@contextmanager
def _together(makers, device):
    """As `in_subprocesses`, but in this process: starting five subprocesses takes half a minute."""
    with ExitStack() as opened:
        yield {
            name: timing.clocked(opened.enter_context(maker(*arguments)), device)
            for name, (maker, arguments) in makers.items()
        }


def test_peers_compares_medians_of_steps_on_the_same_data(config, tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "in_subprocesses", _together)
    monkeypatch.setattr(peers, "call_in_subprocess", lambda work, *arguments: work(*arguments))
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    figure = tmp_path / "peers.png"
    result = run(
        tmp_path,
        "peers",
        *config,
        "train.precision=bf16",
        "train.batch_rows=4",
        "--turns",
        "2",
        "--warmup",
        "1",
        "--figure",
        str(figure),
    )
    assert figure.read_bytes().startswith(b"\x89PNG")
    sides = result["sides"]
    dense = next(name for name in sides if name.startswith("transformers dense"))
    olmoe = [name for name in sides if name.startswith("transformers ") and name != dense]
    assert len(olmoe) == 2
    assert result["transformers_fastest"] == min(olmoe, key=lambda name: sides[name]["seconds"])
    assert sum("float32 weights" in name for name in olmoe) == 1
    for key, side in (
        ("ratio_to_transformers", result["transformers_fastest"]),
        ("ratio_to_transformers_float32_weights", next(name for name in olmoe if "float32 weights" in name)),
        ("ratio_to_dense", "moetrain dense"),
        ("ratio_to_transformers_dense", dense),
    ):
        assert result[key] == pytest.approx(sides[side]["seconds"] / sides["moetrain"]["seconds"])
        low, high = result["quartiles_by_turn"][key]
        assert 0 < low <= high
    assert {len(side["seconds_quartiles"]) + side["turns"] for side in sides.values()} == {4}
    assert {try_["name"].split()[1].strip(",") for try_ in result["tried"]} == {"dense", *transformers_peers.EXPERTS}
    assert all(try_["seconds"] > 0 for try_ in result["tried"])  # none is skipped where memory is enough
    achieved = result["utilization"]["6n"] * result["matrix_flops"] * sides["moetrain"]["seconds"]
    # 6 per token and active parameter except the embeddings
    assert achieved == pytest.approx(6 * 4 * 64 * (result["parameters"]["moetrain"]["active"] - 320 * 32))
    assert result["utilization"]["with_attention"] > result["utilization"]["6n"]


def test_transformers_models_have_our_size(config):
    pytest.importorskip("transformers")
    settings = settings_of(config)
    counts = {}
    for experts in ("grouped_mm", transformers_peers.DENSE):
        model = transformers_peers.make_model(transformers_peers.Variant(experts, "sdpa", "float32"), settings, 320)
        counts[experts] = sum(p.numel() for p in model.parameters())
    ours = flops.Transformer(settings.model, 320, torch.float32)
    assert counts["grouped_mm"] == ours.parameter_counts()[0]
    assert counts["dense"] == ours.parameter_counts()[1] - 3 * 8 * 32  # without routers


def test_batched_mm_is_skipped_where_its_copies_exceed_memory(config):
    settings = settings_of([*config, "train.batch_rows=1000000"])
    refusals = [
        transformers_peers.memory_refusal(
            transformers_peers.Variant(experts, "sdpa", "float32"), settings, torch.device("cpu")
        )
        for experts in ("batched_mm", "eager")
    ]
    assert "GiB of copied weights" in refusals[0]
    assert refusals[1] is None


def test_flops_are_counted_per_pair_of_tokens(config):
    settings = settings_of(config).model
    model = flops.Transformer(settings, 320, torch.float32)
    found = flops.step_flops(model, 7, torch.tensor([[0, 4], [4, 3]]))
    pairs = sum(query >= key for length in (4, 3) for query in range(length) for key in range(length))
    # forward 4 per pair and feature (scores and weighted values), backward twice that; 3 layers of width 32
    assert found.attention == 12 * pairs * 3 * 32
    products = sum(p.numel() for name, p in model.named_parameters() if "embed" not in name and "experts" not in name)
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    assert found.parameters == 6 * 7 * (products + experts * 2 / 8)


def test_a_step_by_component_and_a_plan_with_its_throughput(config, tmp_path):
    pytest.importorskip("matplotlib")
    figure = tmp_path / "steps.png"
    few = ("train.precision=bf16", "--turns", "3", "--operators", "5")
    result = run(tmp_path, "train", *config, *few, "--figure", str(figure))
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert result["tokens_per_second"] == pytest.approx(16 * 64 / result["step"]["seconds"])
    assert list(result["parts_seconds"]) == list(steps.PARTS)
    assert all(seconds > 0 for seconds in result["parts_seconds"].values())
    # parameters and two moments each; and a step count of 4 bytes per tensor
    assert result["memory_bytes"]["state"] == pytest.approx(12 * result["parameters"]["all"], rel=0.01)
    assert result["memory_bytes"]["peak"] > result["memory_bytes"]["state"]
    own = [row["seconds"] for row in result["operators"]]
    assert own == sorted(own, reverse=True)
    assert len(own) == 5
    (tmp_path / "result.json").rename(tmp_path / "train.json")
    planned = run(tmp_path, "plan", *config, "--measured", str(tmp_path / "train.json"))
    # Rows of several samples have slightly less attention than planned.
    assert planned["one_gpu_tokens_per_second"] == pytest.approx(result["tokens_per_second"], rel=0.05)
    assert "the same shape" in planned["assumptions"][0]


def test_an_instrumented_step_trains_like_an_unmodified_one(config):
    settings = settings_of(config)
    weights = []
    for take in (Trainer.train_step, steps.instrumented_step):
        with steps.open_run(settings, 3) as made:
            take(made, 1)
            weights.append([p.detach().clone() for p in made.model.parameters()])
    for plain, instrumented in zip(*weights, strict=True):
        torch.testing.assert_close(plain, instrumented, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "runs", "missing"),
    [
        ("experts", {"grouped_mm", "loop"}, {"megablocks"}),
        ("attention", {"batched", "sdpa"}, {"flash_attn", "varlen"}),
    ],
)
def test_backends_run_or_give_the_reason(config, tmp_path, name, runs, missing):
    result = run(tmp_path, name, *config, "--turns", "2", "--tokens", "200")
    assert runs <= set(result["backends"])
    assert set(result["backends"]) | set(result["left_out"]) == runs | missing
    assert all(reason for reason in result["left_out"].values())
    rows = result["backends"]
    assert rows[result["fastest"]]["times_the_fastest"] == 1
    assert all(row["times_the_fastest"] >= 1 and row["turns"] == 2 for row in rows.values())


def test_samples_and_routing_are_valid_and_differ_between_turns(config):
    spans = [backends.draw_spans(200, 64, turn) for turn in range(4)]
    for drawn in spans:
        starts, lengths = drawn.T.tolist()
        assert starts == [sum(lengths[:i]) for i in range(len(lengths))]
        assert sum(lengths) == 200
        assert min(lengths) >= 1
        assert {64, 128, 192} <= {*starts}  # no sample crosses the end of a row
    assert len({tuple(drawn.flatten().tolist()) for drawn in spans}) == 4
    model = settings_of(config).model
    (first, weights), (second, _) = (backends.draw_routing(model, 50, turn) for turn in range(2))
    assert first.shape == weights.shape == (50, 2)
    assert (first[:, 0] != first[:, 1]).all()
    assert not torch.equal(first, second)
