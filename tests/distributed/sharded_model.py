"""Checks of a sharded model, run on each of several gloo ranks:

    python -m tests.distributed.sharded_model CHECK[,CHECK ...] [section.key=value ...]

The main rank prints the results as one line of JSON, by check.
"""

import json
import os
import sys
from collections import Counter

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from moetrain.config import load_settings
from moetrain.data.corpus import prepare_corpus
from moetrain.data.stream import training_stream, validation_streams
from moetrain.distributed.exit import leave
from moetrain.distributed.launch import compute_dtype, end_processes, start_ranks
from moetrain.distributed.mesh import ParallelLayout
from moetrain.distributed.sharding import evaluation, replicate
from moetrain.dtensor import full_tensor
from moetrain.optim.builder import make_optimizer
from moetrain.probes.embeddings import end_embed, help_embed, mean_hidden_states
from moetrain.probes.probe_monitor import load_probes
from moetrain.probes.scoring import score
from moetrain.routing.panel import draw_panel, read_panel
from moetrain.training.balancing import Balancing
from moetrain.training.evaluation import heldout_losses
from moetrain.training.initialize import initial_model
from moetrain.training.step import forward_backward, update


class CollectiveCounts(TorchDispatchMode):
    """Counts collectives by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace in ("c10d", "_c10d_functional"):
            self.counts[str(operator)] += 1
        return operator(*args, **kwargs or {})


class Model:
    """A model of some settings, and its training steps."""

    def __init__(self, settings, layout, corpus):
        self.settings, self.layout = settings, layout
        torch.manual_seed(settings.run.seed)
        self.inner = initial_model(settings, corpus.tokenizer, compute_dtype(settings, layout.device), layout)
        self.model = replicate(self.inner, layout)
        self.stream = training_stream(corpus, settings)
        self.optimizer = make_optimizer(self.inner, settings.optim)
        self.balancing = Balancing(self.inner, settings.model)

    def gradients(self, step):
        args = (self.stream, step, self.balancing, self.settings)
        return forward_backward(self.layout, self.model, *args, lambda batch, output: None)

    def train(self, step):
        statistics = self.gradients(step)
        update(self.layout, self.model, self.optimizer, 1e-2, 1.0, statistics.loss)
        return statistics


def initial_weights(settings, layout, corpus):
    """Whether sharded initial weights are those of one rank, bit for bit, and how much of them this rank holds."""
    sharded, alone = Model(settings, layout, corpus), Model(settings, ParallelLayout(), corpus)
    expected = dict(alone.inner.named_parameters())
    assert dict(sharded.inner.named_parameters()).keys() == expected.keys()
    equal = all(torch.equal(full_tensor(p), expected[name]) for name, p in sharded.inner.named_parameters())
    held = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in sharded.inner.parameters())
    return {"equal": equal, "held": held, "all": sum(p.numel() for p in alone.inner.parameters())}


def collectives(settings, layout, corpus):
    """Collectives of a step's gradients, by kind, with one and with three micro-batches."""
    model = Model(settings, layout, corpus)
    counts = {}
    for micro_batches in (1, 3):
        rows = layout.row_range(settings.train.batch_rows)[1] // micro_batches
        train = settings.train.model_copy(update={"micro_batch_rows": rows})
        model.settings = settings.model_copy(update={"train": train})
        model.train(0)  # the first pass sets FSDP up
        with CollectiveCounts() as mode:
            model.gradients(1)
        model.optimizer.zero_grad()
        counts[micro_batches] = mode.counts
    return counts


def graphs(settings, layout, corpus):
    """Graphs that torch.compile makes of a sharded model's layers, and of an unsharded one's."""
    found = {}
    for name, where in (("sharded", layout), ("alone", ParallelLayout())):
        torch.compiler.reset()
        count = []

        def backend(graph, _, count=count):
            count.append(1)
            return graph.forward

        model = Model(settings, where, corpus)
        model.inner.compile_layers(backend=backend)
        losses = [float(model.train(step).loss) for step in range(2)]
        found[name] = {"graphs": len(count), "losses": losses}
    return found


def evaluations(settings, layout, corpus):
    """What is read of a sharded model and of an unsharded one, between training steps."""
    found = {}
    for name, where in (("sharded", layout), ("alone", ParallelLayout())):
        model = Model(settings, where, corpus)
        validation = validation_streams(corpus, settings, 2)
        panel = draw_panel(corpus, model.stream, settings, 20, 2)
        prepared = load_probes(settings, corpus, lambda *_: None).prepared
        token_bytes = torch.from_numpy(corpus.tokenizer.token_bytes()).long()
        texts = [corpus.tokenizer.encode(text) for text in ("Ada has a drum", "3 plus 4 is 7.", "so " * 20)]
        losses = []
        for step in range(2):
            losses.append(float(model.train(step).loss))
            with evaluation(model.model) as inner:
                heldout = heldout_losses(where, inner, validation, token_bytes)
                reading = read_panel(inner, panel, step, where, inputs=True)
                scores = score(inner, prepared, where, max_new_tokens=4)
                if where.is_main:
                    means = mean_hidden_states(inner, texts, corpus.tokenizer, where, 64, 16)
                    end_embed(where)
                else:
                    help_embed(inner, corpus.tokenizer, where, 64)
        found[name] = {
            "losses": losses,
            "heldout": {domain: [each.loss, each.tokens] for domain, each in heldout.items()},
            "panel": where.is_main
            and [float(x) for x in (reading.loss.sum(), reading.even[:, 0].std(), reading.inputs.std())],
            "answers": where.is_main and len(reading.answers),
            "probes": {task: {k: m.value for k, m in each.metrics.items()} for task, each in scores.items()},
            "embeddings": means.astype(float).tolist() if where.is_main else None,
        }
    return found


def run_checks(check):
    """Call ``check`` with each check's name, settings, layout and corpus; the main rank prints the results."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    settings = load_settings(None, sys.argv[2:])
    layout = start_ranks(settings)
    torch.set_num_threads(1)
    with layout.main_first():
        corpus = prepare_corpus(settings)
    results = {name: check(name, settings, layout, corpus) for name in sys.argv[1].split(",")}
    if layout.is_main:
        print(json.dumps(results))
    end_processes()
    leave(0)


if __name__ == "__main__":
    run_checks(lambda name, *args: globals()[name](*args))
