"""A training step never synchronizes host and device.

It runs on the meta device, where tensors have shapes and gradients but no content. To read one, in order to branch
on it or to copy it to the host, is an error there. `tests/gpu` checks the same on CUDA.
"""

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives  # collectives on the meta device
from torch.distributed.fsdp._fully_shard import _fsdp_param_group, _fully_shard
from torch.distributed.utils import _to_kwargs
from torch.testing._internal.distributed.fake_pg import FakeStore

from moetrain.data.corpus import prepare_corpus
from moetrain.data.stream import training_stream
from moetrain.distributed.mesh import ParallelLayout, make_mesh
from moetrain.distributed.sharding import shard
from moetrain.models.backends import Backends
from moetrain.models.transformer import Transformer
from moetrain.optim.builder import make_optimizer
from moetrain.routing.recorder import start_record
from moetrain.routing.stream import StreamMonitor
from moetrain.training.balancing import Balancing
from moetrain.training.guards import Guards
from moetrain.training.step import forward_backward, update
from moetrain.training.train_metrics import TrainMetrics

META = torch.device("meta")


@pytest.fixture
def on_meta(monkeypatch):
    monkeypatch.setattr(Transformer, "backends", lambda self, device: Backends("varlen", "grouped_mm", ()))
    # AdamW asks where its parameters are before it takes its fused way.
    adam = sys.modules["torch.optim.adam"]
    monkeypatch.setattr(adam, "_device_dtype_check_for_fused", lambda *_, **__: None)


@pytest.fixture
def two_ranks(monkeypatch):
    """The first of two ranks whose collectives do nothing, on the meta device, which FSDP otherwise refuses."""
    monkeypatch.setattr(torch, "meta", torch.cpu, raising=False)  # where FSDP finds a device's streams
    monkeypatch.setattr(_fully_shard, "_get_device_from_mesh", lambda mesh: META)
    monkeypatch.setattr(_fsdp_param_group.FSDPParamGroup, "_validate_no_meta_params", lambda self: None)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield ParallelLayout(0, 2, 2, META, make_mesh("fsdp", 2, 2, torch.device("cpu")))
    dist.destroy_process_group()


def test_ddp_and_fsdp_leave_the_inputs_where_they_are(make_settings):
    """They would copy every tensor that they find in a forward pass's arguments to the device, and wait for it."""
    settings = make_settings()
    inputs = training_stream(prepare_corpus(settings), settings).batch(0, 0, 2).model_input()
    moved, _ = _to_kwargs((inputs,), None, META, False)
    assert moved[0][0] is inputs


def test_reading_a_tensor_without_content_is_an_error():
    something = torch.zeros((), device=META)
    for read in (bool, float, torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.cpu):
        with pytest.raises((RuntimeError, NotImplementedError)):
            read(something)


@pytest.mark.usefixtures("on_meta")
@pytest.mark.parametrize(
    "more",
    [
        [],
        ["train.micro_batch_rows=4", "train.activation_checkpointing=true"],
        ["model.balancing=bias", "model.num_shared_experts=1", "model.norm_topk_prob=true"],
        ["train.sharding=fsdp", "train.micro_batch_rows=4", "model.balancing=bias"],
        ["train.sharding=fsdp", "train.activation_checkpointing=true", "model.tie_word_embeddings=true"],
        ["optim.name=muon", "model.num_shared_experts=1"],
        ["optim.name=muon", "train.sharding=fsdp"],
    ],
    ids=["plain", "recomputed", "bias", "sharded", "sharded and recomputed", "muon", "muon sharded"],
)
def test_a_step_reads_nothing_off_the_device(make_settings, request, more):
    settings = make_settings("model.num_attention_heads=2", "model.num_key_value_heads=1", *more)
    corpus = prepare_corpus(settings)
    stream = training_stream(corpus, settings)
    recompute = settings.train.activation_checkpointing
    with META:
        model = Transformer(settings.model, corpus.tokenizer.vocab_size, torch.bfloat16, recompute)
    layout = ParallelLayout(device=META)
    if settings.train.sharding == "fsdp":
        layout = request.getfixturevalue("two_ranks")
        shard(model, layout)
    optimizer = make_optimizer(model, settings.optim)
    balancing, interval = Balancing(model, settings.model), TrainMetrics(list(settings.data.domains))
    monitor = StreamMonitor(list(settings.data.domains), settings.monitor.window, settings.monitor.tau)
    recorded = []
    statistics = forward_backward(
        layout, model, stream, 0, balancing, settings, lambda batch, output: recorded.append((batch, output))
    )
    assert all(parameter.grad is not None and parameter.grad.is_meta for parameter in model.parameters())
    norm, applied = update(layout, model, optimizer, 1e-3, 1.0, statistics.loss)
    balancing.after_step(statistics.load_LE, applied)
    interval.add(statistics, norm, applied)
    guards = Guards(settings.guard)
    assert guards.check(1, applied, statistics.loss, statistics.load_LE, recorded) == []
    for batch, output in recorded:
        coming = start_record(output.routing, batch, first_order=0)
        coming.copy._arrived = SimpleNamespace(query=lambda: False)  # on CUDA it would still be on its way
        monitor.add(coming)
    assert len(monitor._coming) == len(recorded)
