"""Data parallelism: DDP, or FSDP2 (`fully_shard`) with every weight, gradient and moment sharded over ranks.

With expert parallelism (`moetrain.distributed.expert_parallel`) all of this is about the other weights.

Under FSDP2 a layer's weights are gathered while it is computed, in the dtype that matmuls read. Routers and norms read
float32, so they are gathered separately in float32, and a sharded run computes what an unsharded one does. Gradients
are reduced in float32.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from moetrain.distributed.expert_parallel import shard_experts, split_experts
from moetrain.distributed.mesh import ParallelLayout
from moetrain.dtensor import full_tensor
from moetrain.models.router import Router
from moetrain.models.transformer import RMSNorm, Transformer


def replicate(model: Transformer, layout: ParallelLayout) -> nn.Module:
    """The model in DDP where each rank holds a replica of it; one that is sharded, or alone, is returned as it is."""
    if layout.mesh is None or layout.sharded:
        return model
    split = [name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, split)
    with warnings.catch_warnings():  # torch 2.13 has another name for it, which 2.11 does not know
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        # Without device_ids, DDP moves no inputs: those that the model reads on the host stay there.
        return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)


def parallelize(model: Transformer, layout: ParallelLayout) -> None:
    """Leave this rank its part of the weights of a model on the meta device, in place."""
    if layout.expert_ranks > 1:
        split_experts(model, layout)
    if layout.sharded:
        shard(model, layout)


def shard(model: Transformer, layout: ParallelLayout) -> None:
    """Shard the model's weights in place over the layout's ``shard`` group, with a replica for each ``data`` rank.

    A model on the meta device stays there.
    """
    assert layout.mesh is not None
    mesh = layout.mesh["shard"] if layout.replicas == 1 else layout.mesh["data", "shard"]
    exact = MixedPrecisionPolicy(cast_forward_inputs=False)
    cast = MixedPrecisionPolicy(param_dtype=model.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    layers = model.model.layers
    # The root group first: it takes the embeddings, the head and all routers and norms. Those in the layers are few.
    # In groups of their own their hooks would run inside the layers, and break the graphs of compiled ones.
    cast_parameters = {p for layer in layers for p in layer.parameters()} - read_in_float32(layers)
    fully_shard(model, mesh=mesh, mp_policy=exact, ignored_params=cast_parameters)
    if layout.expert_ranks > 1:
        shard_experts(model, layout, cast)

    def placement(parameter: nn.Parameter) -> Shard:
        return Shard(sharded_dimension(tuple(parameter.shape), layout.shards))

    for layer in layers:
        of_norms = read_in_float32(layer)
        fully_shard(layer, mesh=mesh, mp_policy=cast, ignored_params=of_norms, shard_placement_fn=placement)
    register_fsdp_forward_method(model, "hidden_states")


def sharded_dimension(shape: tuple[int, ...], shards: int) -> int:
    """The dimension along which `fully_shard` splits a parameter of a layer.

    Experts are not split by number where the ranks do not divide it: each rank would have room for a whole expert, and
    with more ranks than experts most of what is sent would be padding. The first other dimension that the ranks divide
    is split instead; the remaining ones cannot be padded.
    """
    if len(shape) < 3 or shape[0] % shards == 0:
        return 0
    return next((number for number in range(1, len(shape)) if shape[number] % shards == 0), 0)


def read_in_float32(module: nn.Module) -> set[nn.Parameter]:
    """Parameters of routers and norms."""
    modules = [each for each in module.modules() if isinstance(each, Router | RMSNorm)]
    return {parameter for each in modules for parameter in each.parameters()}


@torch.no_grad()
def materialize(model: Transformer, device: torch.device, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Give a model on the meta device, sharded or not, its memory on ``device`` and its weights, in place.

    Args:
        weights: name and unsharded value of each parameter, the same on all ranks. A rank holds one at a time.
    """
    model.to_empty(device=device)
    if model.settings.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    for name, weight in weights:
        copy_unsharded(model.get_parameter(name), weight)
    for buffer in model.buffers():  # the selection bias
        buffer.zero_()


@contextmanager
def accumulate(model: nn.Module, last: bool) -> Iterator[None]:
    """Forward and backward of one micro-batch; gradients are reduced over ranks after the ``last`` one only.

    Under `fully_shard` each rank keeps the step's unsharded float32 gradients until then.
    """
    if isinstance(model, FSDPModule):
        model.set_is_last_backward(last)
        model.set_requires_gradient_sync(last)
        yield
    elif isinstance(model, DistributedDataParallel) and not last:
        with model.no_sync():
            yield
    else:
        yield


def inner_model(model: nn.Module) -> Transformer:
    """The model itself, without the wrapper of DDP."""
    inner = getattr(model, "module", model)
    assert isinstance(inner, Transformer)
    return inner


@contextmanager
def evaluation(model: nn.Module) -> Iterator[Transformer]:
    """The model itself for passes without gradient, without the wrapper of DDP.

    Where it is sharded, passes are collectives: all ranks must make the same number of them, see
    `moetrain.distributed.mesh.ParallelLayout.passes`.
    """
    try:
        yield inner_model(model)
    finally:
        if isinstance(model, FSDPModule):
            model.reshard()  # the root group: after a forward pass it stays gathered for the backward pass


@contextmanager
def unsharded_copy(model: nn.Module) -> Iterator[Transformer]:
    """An uncompiled copy of the whole model on every rank, for forward passes whose number differs between ranks.

    All ranks must call this. The copy holds the weights in the dtypes in which they are gathered. A model of which each
    rank has all weights is returned as it is.
    """
    sharded = inner_model(model)
    if not any(isinstance(parameter, DTensor) for parameter in sharded.parameters()):
        yield sharded
        return
    groups = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for group in groups:
        group.unshard()
    try:
        gathered = {name: full_tensor(weight) for name, weight in sharded.named_parameters(remove_duplicate=False)}
        state = {**gathered, **dict(sharded.named_buffers())}
        yield Transformer.from_state(sharded.settings, sharded.lm_head.out_features, sharded.dtype, state)
    finally:
        for group in groups:
            group.reshard()


@torch.no_grad()
def copy_unsharded(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Copy an unsharded value, which is the same on all ranks, into a tensor that may be sharded; no communication."""
    if isinstance(tensor, DTensor):
        on_device = value.to(tensor.device)
        value = distribute_tensor(on_device, tensor.device_mesh, tensor.placements, src_data_rank=None)
    tensor.copy_(value)
