"""The resource plan: predicted memory, saved tensors and disk space against measured ones."""

import pytest
import torch
from benchmarks import communication, memory, plan, steps
from benchmarks.communication import Collective
from benchmarks.links import Links

from moetrain.config import SettingsError
from moetrain.distributed.mesh import ParallelLayout
from moetrain.grokking import gram_blocks
from moetrain.models.experts_grouped import grouped_experts
from moetrain.models.transformer import Transformer
from moetrain.monitoring.monitor import router_rows
from moetrain.routing.panel import most_samples, read_panel
from moetrain.routing.store import to_stored, write_reading
from tests.tools.benchmark import run, settings_of
from tests.tools.test_prepare_data import load_tool

WIDE = ("model.hidden_size=64", "model.intermediate_size=64", "model.num_hidden_layers=4", "model.attention=sdpa")


@pytest.mark.parametrize("more", [(), ("train.micro_batch_rows=4",), ("train.activation_checkpointing=true",)])
def test_predicted_memory_matches_a_step(config, more, monkeypatch):
    # The plan assumes the GPU's experts; those of the CPU save less.
    monkeypatch.setattr("moetrain.models.experts.cpu_experts", grouped_experts)
    settings = settings_of([*config, *WIDE, "train.batch_rows=32", "train.precision=bf16", *more])
    with steps.open_run(settings, 3) as made:
        planned = memory.predict(settings, 320, logits_held=2**21)
        assert planned.parameters == sum(p.nbytes for p in made.model.parameters())
        made.train_step(1)  # the optimizer's state is there from the first step on
        assert planned.parameters + planned.optimizer == pytest.approx(steps.state_bytes(made), rel=0.001)
        batch = made.stream.batch(1, 0, settings.train.micro_batch_rows or 32)
        if not settings.train.activation_checkpointing:
            kept = memory.kept_by(made.model, lambda: made.model(batch.model_input()))
            assert planned.kept == pytest.approx(kept, rel=0.1)
        peak = memory.measure_peak(lambda: made.train_step(2))
    assert planned.peak - planned.parameters - planned.optimizer == pytest.approx(peak, rel=0.2)


@pytest.mark.slow
def test_predicted_saved_tensors_of_a_compiled_model_match_inductor(config):
    settings = settings_of([*config, "train.precision=bf16", "model.num_shared_experts=1"])
    kept = []
    with steps.open_run(settings, 1) as made:
        batch = made.stream.batch(0, 0, 4)
        for backend in (memory.as_compiled(), "inductor"):
            torch.compiler.reset()
            made.model.compile_layers(backend=backend)
            kept.append(memory.kept_by(made.model, lambda: made.model(batch.model_input())))
        torch.compiler.reset()
    assert kept[0] == pytest.approx(kept[1], rel=0.01)


def test_a_compiled_layer_saves_less(config):
    plain, compiled = (
        memory.count_kept(settings_of([*config, f"train.compile={compile}"]), 320, 4, torch.bfloat16)
        for compile in ("false", "true")
    )
    assert compiled.layer < plain.layer  # queries and keys before their norms in bf16 instead of float32


def test_measured_peak_counts_live_tensors():
    def work():
        first = torch.empty(1000)
        second = torch.empty(500)
        del first, second
        return torch.empty(1200)

    assert memory.measure_peak(work) == 4 * 1500


def layout_of(result, sharding, place=0):
    return result["plans"][place]["layouts"][sharding]


def test_a_plan_has_memory_throughput_time_network_and_disk(config, tmp_path):
    pytest.importorskip("matplotlib")
    figure = tmp_path / "plan.png"
    words = ("--gpus", "4", "--tokens", "1e6", "--tokens-per-second", "1000", "--network", "1e-6")
    words += ("--gpus-per-machine", "1")
    result = run(tmp_path, "plan", *config, *words, "--figure", str(figure))
    assert figure.read_bytes().startswith(b"\x89PNG")
    none, fsdp = (layout_of(result, name) for name in ("none", "fsdp"))
    for part in ("parameters", "optimizer", "gradients"):
        assert fsdp["memory"][part] == none["memory"][part] // 4
    assert none["memory"]["fits"]
    gradients, *others = none["collectives"]
    assert gradients["sent"] == 2 * 3 / 4 * 4 * result["parameters"]
    assert {each["purpose"] for each in others} == {"losses and loads of experts", "stop signals"}
    compute, network = 16 * 64 / 4 / 1000, none["sent_a_step"] / 1000
    hidden = min(gradients["sent"] / 1000, compute * 2 / 3)
    expected = [1024 / (compute + network), 1024 / (compute + network - hidden)]
    assert none["tokens_per_second"] == pytest.approx(expected, rel=1e-3)  # steps of rings take microseconds more
    assert none["days"] == pytest.approx([1e6 / rate / 86400 for rate in expected[::-1]], rel=1e-3)
    assert none["network_share"] == pytest.approx([1 - compute * rate / 1024 for rate in expected[::-1]], rel=1e-3)
    assert any("given on the command line" in line for line in result["assumptions"])


def test_a_plan_for_several_numbers_of_gpus_and_many_domains(config, tmp_path):
    words = ("--gpus", "8", "64", "--rows-per-gpu", "2", "--domains", "50", "--tokens-per-second", "1000")
    split = ("model.num_experts=16", "train.expert_parallel=16", "--gpus", "64", *words[3:])
    result = run(tmp_path, "plan", *config, *split)
    assert "does not divide 8 processes" in layout_of(result, "hybrid")["impossible"]
    assert "memory" in layout_of(result, "none")
    result = run(tmp_path, "plan", *config, *words)
    assert [plan["tokens_a_step"] for plan in result["plans"]] == [2 * 64 * 8, 2 * 64 * 64]
    assert result["domains"] == 50
    few, many = (plan["monitor"] for plan in result["plans"])
    assert few["received_bytes"] == many["received_bytes"]
    assert few["panel_seconds"] == pytest.approx(8 * many["panel_seconds"])


def test_a_plan_splits_experts(config, tmp_path):
    words = ("--gpus", "4", "--tokens", "1e6", "--tokens-per-second", "1000")
    whole = run(tmp_path, "plan", *config, *words)
    split = run(tmp_path, "plan", *config, "train.expert_parallel=2", *words)
    settings = settings_of(config)
    routed = memory.routed_parameters(settings)
    with torch.device("meta"):
        model = Transformer(settings.model, 320, torch.float32)
    assert routed == sum(p.numel() for name, p in model.named_parameters() if ".experts." in name) > 0
    none = [layout_of(each, "none")["memory"] for each in (whole, split)]
    for part, size in (("parameters", 4), ("gradients", 4), ("optimizer", 8)):
        assert none[0][part] - none[1][part] == size * routed // 2
        assert layout_of(whole, "fsdp")["memory"][part] == layout_of(split, "fsdp")["memory"][part]
    assert none[1]["kept"] > none[0]["kept"]
    sent = {each["purpose"]: each["sent"] for each in layout_of(split, "none")["collectives"]}
    assert sent["gradients"] == 2 * 4 * 3 / 4 * (whole["parameters"] - routed)
    assert sent["gradients of experts"] == 2 * 4 * 1 / 2 * routed / 2
    assert sent["tokens to experts and back"] == communication.exchanged_bytes(settings, 16 * 64 // 4, 1) / 2
    options = ["plan", *config, "train.expert_parallel=2", "--gpus", "3", "--tokens-per-second", "1"]
    with pytest.raises(SettingsError, match=r"train.expert_parallel 2 does not divide 3 GPUs"):
        plan.run(load_tool("bench").parse(options))


def test_links_share_the_network_among_the_gpus_of_a_machine():
    links = Links(machine=8, within=400e9, between=50e9)

    def seconds(kind, group, stride=1, nbytes=1e12):
        return links.seconds(Collective("", kind, nbytes, 1, group, stride))

    assert seconds("all_reduce", 8) == pytest.approx(2 * 7 / 8 * 1e12 / 400e9, rel=1e-4)
    assert seconds("all_reduce", 64) == pytest.approx(2 * 63 / 64 * 1e12 / 400e9, rel=1e-3)  # eight links at 50
    assert seconds("all_reduce", 8, stride=8) == pytest.approx(2 * 7 / 8 * 1e12 / 50e9, rel=1e-4)  # one of each machine
    assert seconds("all_gather", 4, stride=8) == pytest.approx(3 * 1e12 / 50e9, rel=1e-4)
    assert seconds("all_to_all", 16) == pytest.approx(8 / 16 * 1e12 / 50e9, rel=1e-4)  # half of it leaves the machine
    small = seconds("all_reduce", 4096, nbytes=8)
    assert 2 * 9 * 14e-6 < small < 1e-3  # a tree, not a ring of 511 machines
    assert seconds("reduce_scatter", 4096, nbytes=8) > 511 * 14e-6


def test_only_what_overlaps_is_hidden():
    links = Links(machine=1, within=1e9, between=1e9)

    def waits(overlap, seconds, compute=30.0, micro_batches=2):
        nbytes = seconds * 1e9 * 2 / 1  # half of a reduce-scatter of two ranks is sent
        each = Collective("", "reduce_scatter", nbytes, 1, 2, 1, overlap)
        return links.exposed([each], compute, micro_batches)

    assert waits("none", 12) == pytest.approx(12, rel=1e-3)
    assert waits("backward", 12) == pytest.approx(2, rel=1e-3)  # the last micro-batch's backward pass takes 10
    assert waits("step", 12) == pytest.approx(0)
    assert waits("step", 40) == pytest.approx(10, rel=1e-3)


def test_predicted_disk_bytes_match_a_reading(config, tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    settings = settings_of(config)
    with steps.open_run(settings, 1) as made:
        panel = made.state.monitor.panel
        members = panel.panel
        reading = read_panel(made.model, members, 0, ParallelLayout())
        stored = to_stored(members, reading, panel.domains, gram_blocks(router_rows(made.model)))
        pieces = write_reading(tmp_path, stored)
    planned = plan.reading_bytes(settings, len(members))
    assert planned == pytest.approx(sum(pq.read_table(path).nbytes for path in pieces), rel=0.1)
    assert planned > sum(pq.ParquetFile(path).metadata.row_group(0).total_byte_size for path in pieces)
    full = plan.reading_bytes(settings, 2 * most_samples(settings.panel.samples))
    assert plan.disk_bytes(settings, 1000, 8000, 1e6)["panel"] == settings.panel.readings * full
