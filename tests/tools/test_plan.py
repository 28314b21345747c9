"""The resource plan: predicted memory, saved tensors and disk space against measured ones."""

import pytest
import torch
from benchmarks import memory, plan, steps

from moetrain.config import SettingsError
from moetrain.distributed.mesh import ParallelLayout
from moetrain.grokking import gram_blocks
from moetrain.models.experts_grouped import grouped_experts
from moetrain.models.transformer import Transformer
from moetrain.monitoring.monitor import router_rows
from moetrain.routing.panel import most_samples, read_panel
from moetrain.routing.store import to_stored, write_reading
from tests.tools.benchmark import run, settings_of

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


def test_a_plan_has_memory_throughput_time_network_and_disk(config, tmp_path):
    pytest.importorskip("matplotlib")
    figure = tmp_path / "plan.png"
    words = ("--gpus", "4", "--tokens", "1e6", "--tokens-per-second", "1000", "--network", "1e-6")
    result = run(tmp_path, "plan", *config, *words, "--figure", str(figure))
    assert figure.read_bytes().startswith(b"\x89PNG")
    replicated, sharded = (result["memory"][name] for name in ("replicated", "sharded"))
    for part in ("parameters", "optimizer", "gradients"):
        assert sharded[part] == replicated[part] // 4
    assert replicated["fits"]
    speed = result["speed"]["replicated"]
    sent = 2 * 3 / 4 * 4 * result["parameters"]
    assert speed["network_bytes_a_step"] == sent
    compute, network = 16 * 64 / 4 / 1000, sent / 1000
    assert speed["tokens_per_second"] == pytest.approx([1024 / (compute + network), 1024 / max(compute, network)])
    assert speed["days"] == pytest.approx([1e6 / rate / 86400 for rate in speed["tokens_per_second"][::-1]])
    assert any("given on the command line" in line for line in result["assumptions"])


def test_a_plan_splits_experts(config, tmp_path):
    words = ("--gpus", "4", "--tokens", "1e6", "--tokens-per-second", "1000")
    whole = run(tmp_path, "plan", *config, *words)
    split = run(tmp_path, "plan", *config, "train.expert_parallel=2", *words)
    settings = settings_of(config)
    routed = memory.routed_parameters(settings)
    with torch.device("meta"):
        model = Transformer(settings.model, 320, torch.float32)
    assert routed == sum(p.numel() for name, p in model.named_parameters() if ".experts." in name) > 0
    for part, size in (("parameters", 4), ("gradients", 4), ("optimizer", 8)):
        assert whole["memory"]["replicated"][part] - split["memory"]["replicated"][part] == size * routed // 2
        assert whole["memory"]["sharded"][part] == split["memory"]["sharded"][part]
    assert split["memory"]["replicated"]["kept"] > whole["memory"]["replicated"]["kept"]
    sent = [each["speed"]["replicated"]["network_bytes_a_step"] for each in (whole, split)]
    rest = whole["parameters"] - routed
    travelling = plan.exchanged_bytes(settings, 16 * 64 // 4, 1) / 2
    assert sent[0] == 2 * 4 * 3 / 4 * (rest + routed)
    assert sent[1] == 2 * 4 * (3 / 4 * rest + 1 / 2 * routed / 2) + travelling
    with pytest.raises(SettingsError, match=r"train.expert_parallel 2 does not divide 3 GPUs"):
        plan.make_plan(settings_of([*config, "train.expert_parallel=2"]), 320, plan.Rate(1, ""), 3, 1e6, 1e9, 1e9)


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
