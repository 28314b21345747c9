"""Data parallelism: DDP, or FSDP2 (`fully_shard`) with every weight, gradient and moment sharded over ranks.

Under FSDP2 a layer's weights are gathered while it is computed, in the dtype that matmuls read. Routers and norms read
float32, so they are gathered separately in float32, and a sharded run computes what an unsharded one does. Gradients
are reduced in float32.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from moetrain.distributed.mesh import ParallelLayout
from moetrain.models.router import Router
from moetrain.models.transformer import RMSNorm, Transformer


def distribute(model: Transformer, layout: ParallelLayout) -> nn.Module:
    """The model as all ranks train it: sharded in place where the layout has shards, else a replica on each rank."""
    if layout.mesh is None:
        return model
    if layout.shards > 1:
        shard(model, layout)
        return model
    with warnings.catch_warnings():  # torch 2.13 has another name for it, which 2.11 does not know
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        # Without device_ids, DDP moves no inputs: those that the model reads on the host stay there.
        return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)


def shard(model: Transformer, layout: ParallelLayout) -> None:
    """Shard the model's weights in place over the layout's ``shard`` group, with a replica for each ``data`` rank."""
    assert layout.mesh is not None
    mesh = layout.mesh["shard"] if layout.replicas == 1 else layout.mesh["data", "shard"]
    exact = MixedPrecisionPolicy(cast_forward_inputs=False)
    small = MixedPrecisionPolicy(param_dtype=model.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in model.model.layers:
        read_in_float32: list[nn.Module] = [m for m in layer.modules() if isinstance(m, Router | RMSNorm)]
        fully_shard(read_in_float32, mesh=mesh, mp_policy=exact)
        fully_shard(layer, mesh=mesh, mp_policy=small)
    fully_shard(model, mesh=mesh, mp_policy=exact)  # embeddings, which stay float32 too, the last norm and the head


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
def unsharded_copy(model: nn.Module) -> Iterator[Transformer]:
    """An unsharded, uncompiled copy of the model on every rank, for forward passes whose number differs between ranks.

    All ranks must call this. Passes through the sharded model itself are collectives. The copy holds the weights in the
    dtypes in which they are gathered. A model that is not sharded is returned as it is.
    """
    if not isinstance(model, FSDPModule):
        yield inner_model(model)
        return
    sharded = inner_model(model)
    groups = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for group in groups:
        group.unshard()
    try:
        state = {**dict(sharded.named_parameters(remove_duplicate=False)), **dict(sharded.named_buffers())}
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


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor that may be sharded; if it is, all ranks must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
