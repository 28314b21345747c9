"""A model with split experts against one of a single rank, run on each of several gloo ranks:

    python -m tests.distributed.expert_parallel VARIANT[,VARIANT ...] [section.key=value ...]

The main rank prints the largest differences on any rank as one line of JSON, by variant.
"""

import sys

import torch

from moetrain.config import load_settings
from moetrain.distributed.mesh import ParallelLayout
from moetrain.distributed.sharding import unsharded_copy
from moetrain.dtensor import full_tensor
from moetrain.training.step import forward_backward
from tests.distributed.sharded_model import Model, run_checks

VARIANTS = {
    "plain": [],
    "loop": ["model.experts=loop"],
    "recomputed": ["train.activation_checkpointing=true", "train.micro_batch_rows=2"],
    "bias": ["model.balancing=bias", "model.num_shared_experts=1", "model.norm_topk_prob=true"],
    "micro_batch": ["model.balance_scope=micro_batch", "model.tie_word_embeddings=true"],
    "muon": ["optim.name=muon"],
    "compiled": ["train.compile=true"],
    "bf16": ["train.precision=bf16"],
    "starved": ["model.num_experts_per_tok=1", "model.balancing=bias", "model.bias_update_rate=0"],
}
STEPS = 3


class Recorded(Model):
    """A model whose routing by sample is kept."""

    def gradients(self, step):
        self.counts, self.sums, self.layout.progress.step = [], [], step
        return forward_backward(self.layout, self.model, self.stream, step, self.balancing, self.settings, self.keep)

    def keep(self, batch, output):
        self.counts.append(output.routing.counts_LBRE)
        self.sums.append(output.routing.sums_LBRE)


def difference(found, expected):
    """Euclidean, relative to what is expected."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-12))


def compare(variant, overrides, layout, corpus):
    settings = load_settings(None, [*overrides, *VARIANTS[variant]])
    split = Recorded(settings, layout, corpus)
    alone_settings = load_settings(None, [*overrides, *VARIANTS[variant], "train.micro_batch_rows=null"])
    alone = Recorded(alone_settings, ParallelLayout(), corpus)
    if settings.model.balance_scope == "micro_batch":  # of the same rows
        rows = layout.row_range(settings.train.batch_rows)[1]
        alone.settings = load_settings(None, [*overrides, *VARIANTS[variant], f"train.micro_batch_rows={rows}"])
    if variant == "starved":  # all tokens go to the experts of the last rank
        for model in (split, alone):
            for layer in model.inner.model.layers:
                layer.mlp.gate.selection_bias[-1] = 10.0
    if settings.train.compile:
        for model in (split, alone):
            model.inner.compile_layers(backend="eager")
    first, count = layout.row_range(settings.train.batch_rows)
    worst = {"loss": 0.0, "gradients": 0.0, "norm": 0.0, "sums": 0.0, "load": 0.0, "counts": 0.0}

    def note(name, found, expected):
        worst[name] = max(worst[name], difference(found, expected))

    for step in range(STEPS):
        statistics, expected = split.gradients(step), alone.gradients(step)
        note("loss", statistics.loss, expected.loss)
        note("load", statistics.load_LE, expected.load_LE)
        own = slice(first, first + count)
        note("counts", torch.cat(split.counts, 1), torch.cat(alone.counts, 1)[:, own])
        note("sums", torch.cat(split.sums, 1), torch.cat(alone.sums, 1)[:, own])
        for (name, one), (same, other) in zip(
            split.inner.named_parameters(), alone.inner.named_parameters(), strict=True
        ):
            assert name == same
            note("gradients", full_tensor(one.grad), other.grad)
        norms = [model.layout.clip_gradients(model.inner.parameters(), 0.5) for model in (split, alone)]
        note("norm", *norms)
        for model, reached in ((split, statistics), (alone, expected)):
            for group in model.optimizer.param_groups:
                group["lr"] = 1e-3
            model.optimizer.step()
            model.optimizer.zero_grad()
            model.balancing.after_step(reached.load_LE, torch.tensor(True))
    with unsharded_copy(split.model) as copy:
        worst["weights"] = max(
            difference(weight, alone.inner.get_parameter(name)) for name, weight in copy.named_parameters()
        )
    worst["held"] = sum(p.to_local().numel() for p in split.inner.model.layers[0].mlp.experts.parameters())
    worst["of"] = sum(p.numel() for p in alone.inner.model.layers[0].mlp.experts.parameters())
    everyone = layout.all_gather_objects(worst)
    return {key: max(each[key] for each in everyone) for key in worst}


def check(name, settings, layout, corpus):
    return compare(name, sys.argv[2:], layout, corpus)


if __name__ == "__main__":
    run_checks(check)
