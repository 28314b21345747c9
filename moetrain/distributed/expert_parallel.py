"""Expert parallelism: the experts of each layer are split over ranks, beside data parallelism for all other weights.

Every rank reads rows of its own, as without it. Each rank of an ``expert`` group (see
`moetrain.distributed.mesh.make_expert_mesh`) holds a share of every layer's experts, and the tokens of the whole group
travel to them: `moetrain.models.experts_exchange`. What follows from that:

- **Weights** of experts are DTensors, split along their first dimension over ``expert``. Initial weights, moments and
  checkpoints need no code of their own: a DTensor knows its place in the whole, so any layout loads any other's.
- **Gradients** of other weights are averaged over all ranks. Those of a rank's experts come from the tokens of its
  group. They are summed over ``expert_data`` (and ``expert_shard``), and divided by the number of all ranks too.
- **The gradient norm** counts each expert once: `ParallelLayout.clip_gradients` joins the norms of both kinds.
- **Forward passes** are collectives, in evaluations too: `ParallelLayout.passes_together`.
- **Routing** is recorded by the rank that reads a token, so it does not depend on where the experts are.

Without sharding, DDP replicates the other weights and ignores the experts. With it, each layer's experts are a
`fully_shard` group of their own, sharded along their second dimension.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from moetrain.config import ModelSettings, SettingsError
from moetrain.distributed.mesh import ParallelLayout
from moetrain.models.transformer import Experts, Transformer


def split_experts(model: Transformer, layout: ParallelLayout) -> None:
    """Leave this rank its share of the experts of a model on the meta device, in place."""
    assert layout.expert_mesh is not None
    mesh, ranks = layout.expert_mesh["expert"], layout.expert_ranks
    for experts in expert_modules(model):
        for name, parameter in list(experts.named_parameters()):
            own = torch.empty(len(parameter) // ranks, *parameter.shape[1:], device="meta")
            experts.register_parameter(name, nn.Parameter(DTensor.from_local(own, mesh, [Shard(0)], run_check=False)))


def shard_experts(model: Transformer, layout: ParallelLayout, policy: MixedPrecisionPolicy) -> None:
    """Shard this rank's experts further, in place, each layer's as a group of `fully_shard` of their own."""
    mesh = layout.expert_mesh
    assert mesh is not None
    shards, replicas = mesh["expert_shard"].size(), mesh["expert_data"].size()
    ranks = mesh["expert_data", "expert_shard"] if replicas > 1 else mesh["expert_shard"]
    for experts in expert_modules(model):
        fully_shard(experts, mesh=ranks, mp_policy=policy, shard_placement_fn=lambda parameter: Shard(1))
        assert isinstance(experts, FSDPModule)
        experts.set_gradient_divide_factor(layout.world_size)
        # Sum, then divide: only NCCL can scale while it reduces. With a single shard FSDP would divide twice.
        experts.set_force_sum_reduction_for_comms(shards > 1)


def check_expert_shards(settings: ModelSettings, shards: int) -> None:
    """Check that the second dimensions of experts split over so many ranks.

    Raises:
        SettingsError: they do not.
    """
    for name, size in (("hidden_size", settings.hidden_size), ("intermediate_size", 2 * settings.intermediate_size)):
        if size % shards:
            raise SettingsError(
                f"model.{name}: each rank's experts are sharded over {shards} ranks, which do not divide {size}: "
                "raise train.expert_parallel, or set train.sharding=none"
            )


@torch.no_grad()
def reduce_expert_gradients(model: nn.Module, layout: ParallelLayout) -> None:
    """Average the gradients of experts after a step's last backward pass, in place; `fully_shard` does so by itself.

    Others are averaged by DDP.
    """
    if layout.expert_mesh is None or layout.sharded:
        return
    replicas = layout.expert_mesh["expert_data"].size()
    group = layout.expert_mesh.get_group("expert_data")
    reducing = []
    for experts in expert_modules(model):
        for parameter in experts.parameters():
            assert isinstance(parameter.grad, DTensor)
            gradient = parameter.grad.to_local()
            gradient /= layout.world_size
            if replicas > 1:
                reducing.append(dist.all_reduce(gradient, group=group, async_op=True))
    for each in reducing:
        each.wait()


def expert_modules(model: nn.Module) -> list[Experts]:
    """The routed experts of each layer."""
    return [module for module in model.modules() if isinstance(module, Experts)]
