"""Training on CUDA: no synchronization within a step, the same recorded routing as on CPU, and a falling loss."""

import json
import math

import numpy as np
import pytest
import torch

from moetrain.checkpoint.manager import checkpoint_folder
from moetrain.data.corpus import prepare_corpus
from moetrain.data.stream import training_stream
from moetrain.device_transfer import HostCopy, to_device
from moetrain.routing.recorder import start_record
from moetrain.train import train
from moetrain.trainer import Trainer
from tests.distributed.mesh_of_one import check_training
from tests.gpu.common import DEVICE, GPU
from tests.models.test_transformer import make_model
from tests.trainer.reading import scalars, states

pytestmark = GPU

CUDA_MODEL = ["train.precision=bf16", "model.hidden_size=64", "model.intermediate_size=32", "model.experts=grouped_mm"]


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["train.micro_batch_rows=4", "train.activation_checkpointing=true"],
        ["model.balancing=bias", "optim.state_precision=bf16"],
        ["train.compile=true"],
    ],
    ids=["eager", "recomputed", "bias, small state", "compiled"],
)
def test_a_step_never_synchronizes_with_the_device(make_settings, more):
    torch.compiler.reset()
    run = Trainer.build(make_settings(*CUDA_MODEL, "model.attention=varlen", "train.deterministic=false", *more))
    for step in range(1, 6):  # the first steps may synchronize: allocation, handles, compilation
        run.train_step(step)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(6, 10):
            run.train_step(step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert math.isfinite(run.state.train_metrics.points()["loss/train"])
    assert all(len(window) for window in run.state.monitor.stream.windows().values())


def test_routing_recorded_on_cuda_equals_that_recorded_on_cpu(make_settings):
    settings = make_settings("data.seq_len=256", "panel.tokens=64")
    batch = training_stream(prepare_corpus(settings), settings).batch(0, 0, 8)
    found = []
    for device in (torch.device("cpu"), DEVICE):
        model = make_model(attention="sdpa", experts="grouped_mm").to(device)
        with torch.no_grad():
            routing = model(batch.to(device).model_input()).routing
        found.append(start_record(routing, batch, first_order=0).wait())
    cpu, cuda = found
    assert len(cpu) > 8
    for name in ("order", "sample", "domain"):
        assert np.array_equal(getattr(cpu, name), getattr(cuda, name)), name
    for name in ("even_SLE", "odd_SLE"):
        np.testing.assert_allclose(getattr(cuda, name), getattr(cpu, name), rtol=1e-3, atol=1e-3)
    # Float32 sums in another order: nearly equal experts may change places in the top k.
    moved = np.abs(cuda.counts_SLE - cpu.counts_SLE).sum() / cpu.counts_SLE.sum()
    assert moved < 0.002


def test_host_copies_are_complete_and_overlap_with_queued_work():
    host = torch.arange(1 << 20)
    tensor = to_device(host, DEVICE)
    busy = torch.randn(4096, 4096, device=DEVICE)
    for _ in range(20):
        busy = busy @ busy / 4096
    copy = HostCopy([tensor * 2, tensor.view(1024, 1024).T])
    del tensor
    filler = torch.zeros(1 << 21, device=DEVICE)  # would overwrite memory that was freed too early
    first, second = copy.wait()
    assert torch.equal(first, host * 2)
    assert torch.equal(second, host.view(1024, 1024).T)
    assert copy.arrived
    assert float(filler.sum()) == 0


def test_the_loss_falls_within_200_steps(make_settings, tmp_path):
    settings = make_settings(
        *CUDA_MODEL, "train.max_steps=200", "train.log_every=10", "train.checkpoint_every=100", "optim.warmup_steps=20"
    )
    assert train(settings) == 0
    folder = tmp_path / "runs" / "run"
    losses = [value for _, value in scalars(folder)["loss/train"]]
    assert losses[-1] < 0.6 * losses[0]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["skipped_updates"] == 0
    assert 0 < summary["monitor_share"] < 1


def test_a_compiled_model_sharded_over_a_mesh_of_one_trains_like_a_whole_one(make_settings):
    base = [*CUDA_MODEL, "train.micro_batch_rows=4"]
    # Fused kernels round elsewhere in bf16; AdamW's first steps may turn that into a whole step of 0.01.
    check_training(make_settings(*base), make_settings(*base, "train.compile=true"), 0.02, 0.03)


def test_deterministic_runs_are_equal_bit_for_bit(make_settings, tmp_path):
    weights = []
    for name in ("one", "two"):
        settings = make_settings(
            *CUDA_MODEL, "train.deterministic=true", "train.max_steps=20", f"run.name={name}", "optim.warmup_steps=5"
        )
        try:
            assert train(settings) == 0
        finally:
            torch.use_deterministic_algorithms(False)
        weights.append(states(checkpoint_folder(tmp_path / "runs" / name, 20)))
    one, two = weights
    for key, value in two.items():
        if not key.startswith("panel/"):  # NaN where nothing was recorded
            assert torch.equal(one[key], value), key
