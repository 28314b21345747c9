"""The model shared out over processes: FSDP2, as torch has it.

Each process keeps a part of every weight, gradient and moment; a layer's weights come together while it is computed.
Products read them in the compute type, so in that type they travel. Routers and norms read float32: they travel apart,
and a sharded run computes what an unsharded one does. Gradients are summed in float32.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from moetrain.config import Settings, SettingsError
from moetrain.models.router import Router
from moetrain.models.transformer import RMSNorm, Transformer


def distribute(model: Transformer, settings: Settings, accelerator: Accelerator) -> nn.Module:
    """The model as the launch's processes train it together: whole on each of them, or sharded by ``train.sharding``.

    Raises:
        SettingsError: ``hybrid``, and machines with unequal numbers of processes.
    """
    if settings.train.sharding == "none" or accelerator.num_processes == 1:
        with warnings.catch_warnings():  # accelerate passes on a name that torch 2.13 calls by another
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            return accelerator.prepare_model(model)
    shard(model, settings.train.sharding, accelerator.device)
    return model


def shard(model: Transformer, sharding: Literal["fsdp", "hybrid"], device: torch.device) -> None:
    """Leave this process its part of the model's weights.

    ``fsdp`` shares them out over all processes, ``hybrid`` over those of a machine, with a whole copy on each machine.

    Raises:
        SettingsError: a launch whose machines have unequal numbers of processes.
    """
    mesh = _mesh(sharding, device)
    exact = MixedPrecisionPolicy(cast_forward_inputs=False)
    small = MixedPrecisionPolicy(param_dtype=model.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in model.model.layers:
        read_in_float32: list[nn.Module] = [m for m in layer.modules() if isinstance(m, Router | RMSNorm)]
        fully_shard(read_in_float32, mesh=mesh, mp_policy=exact)
        fully_shard(layer, mesh=mesh, mp_policy=small)
    fully_shard(model, mesh=mesh, mp_policy=exact)  # embeddings, which stay float32 too, the last norm and the head


def _mesh(sharding: Literal["fsdp", "hybrid"], device: torch.device) -> DeviceMesh:
    processes, local = dist.get_world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if sharding == "fsdp":
        return init_device_mesh(device.type, (processes,), mesh_dim_names=("shard",))
    if processes % local:
        raise SettingsError(
            f"train.sharding=hybrid: {processes} processes are not machines of {local} each: launch as many on each"
        )
    return init_device_mesh(device.type, (processes // local, local), mesh_dim_names=("copy", "shard"))


def bare(model: nn.Module) -> Transformer:
    """The model itself, without what a launch wraps around it."""
    inner = getattr(model, "module", model)
    assert isinstance(inner, Transformer)
    return inner


@contextmanager
def unsharded_copy(model: nn.Module) -> Iterator[Transformer]:
    """A model with all weights on every process, for forward passes of which processes make unequal numbers.

    All of them have to come here. The model is one apart, not compiled: passes through the sharded one are noted by
    torch, which guesses from them what backward fetches next, so that processes which made others would wait for each
    other for ever. A copy of the weights, in the types in which they travel, takes its room on each device. One that
    is not sharded is given as it is.
    """
    if not isinstance(model, FSDPModule):
        yield bare(model)
        return
    sharded = bare(model)
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.unshard()
    try:
        state = {**dict(sharded.named_parameters(remove_duplicate=False)), **dict(sharded.named_buffers())}
        yield Transformer.from_state(sharded.settings, sharded.lm_head.out_features, sharded.dtype, state)
    finally:
        for part in parts:
            part.reshard()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor that may be sharded; then all processes have to ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
