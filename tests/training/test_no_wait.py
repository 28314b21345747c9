"""A training step never waits for the device: it runs as well on one that has no data to wait for.

Tensors on the meta device have shapes and gradients but no content; whatever would read one (a number to branch on, a
copy to the host) is an error there. `tests/gpu` asks CUDA itself the same.
"""

import sys
from types import SimpleNamespace

import pytest
import torch

from moetrain.data.corpus import prepare_corpus
from moetrain.data.stream import training_stream
from moetrain.distributed.mesh import ParallelLayout
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
    ],
    ids=["plain", "recomputed", "bias"],
)
def test_a_step_reads_nothing_off_the_device(make_settings, more):
    settings = make_settings("model.num_attention_heads=2", "model.num_key_value_heads=1", *more)
    corpus = prepare_corpus(settings)
    stream = training_stream(corpus, settings)
    recompute = settings.train.activation_checkpointing
    model = Transformer(settings.model, corpus.tokenizer.vocab_size, torch.bfloat16, recompute).to(META)
    optimizer = make_optimizer(model, settings.optim)
    balancing, interval = Balancing(model, settings.model), TrainMetrics(list(settings.data.domains))
    monitor = StreamMonitor(list(settings.data.domains), settings.monitor.window, settings.monitor.tau)
    layout = ParallelLayout(device=META)
    recorded = []
    statistics = forward_backward(
        layout, model, stream, 0, balancing, settings, lambda batch, output: recorded.append((batch, output))
    )
    assert all(parameter.grad is not None and parameter.grad.is_meta for parameter in model.parameters())
    norm, made = update(layout, model, optimizer, 1e-3, 1.0, statistics.loss)
    balancing.after_step(statistics.load_LE, made)
    interval.add(statistics, norm, made)
    guards = Guards(settings.guard)
    assert guards.check(1, made, statistics.loss, statistics.load_LE, recorded) == []
    for batch, output in recorded:
        routing = output.routing
        coming = start_record(
            routing.sums_LBRE, routing.counts_LBRE, batch.samples_BS, batch.domains_BS, batch.compared_BS, 0
        )
        coming.copy._arrived = SimpleNamespace(query=lambda: False)  # on CUDA it would still be on its way
        monitor.add(coming)
    assert len(monitor._coming) == len(recorded)
