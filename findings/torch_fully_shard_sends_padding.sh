#!/usr/bin/env bash
# torch 2.13.0 (CPU, gloo): fully_shard pads the first dimension of a parameter to a multiple of the ranks and sends the
# padding. Where a parameter has fewer rows than there are ranks, as a stack of experts has, most of the traffic is padding.
#
# Seen with torch 2.13.0, Python 3.11, 4 ranks: for a parameter of shape (2, 64, 64), the all-gathers of a step carry 16,384
# elements from all ranks instead of 8,192, and as many go into the reduce-scatter. Split along the second dimension
# (shard_placement_fn) it is 8,192. With 64 experts on 512 ranks the factor is 8. Nothing warns of it. This script fails when
# that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.3.5
cat > "$folder/case.py" <<'PYTHON'
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.utils._python_dispatch import TorchDispatchMode


class Inputs(TorchDispatchMode):
    """Elements that this rank puts into collectives, by operator."""

    def __init__(self):
        super().__init__()
        self.elements = {}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace == "c10d" and "base" in str(operator):
            self.elements.setdefault(operator._schema.name, []).append(args[1].numel())
        return operator(*args, **kwargs or {})


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 64, 64))

    def forward(self, x):
        return (x @ self.weight).sum()


dist.init_process_group("gloo")
found = {}
for dimension in (0, 1):
    experts = Experts()
    mesh = init_device_mesh("cpu", (4,))
    fully_shard(experts, mesh=mesh, shard_placement_fn=lambda _, dimension=dimension: Shard(dimension))
    with Inputs() as inputs:
        experts(torch.ones(2, 1, 64)).backward()
    gathered = 4 * sum(inputs.elements["c10d::_allgather_base_"]) // len(inputs.elements["c10d::_allgather_base_"])
    found[dimension] = gathered, sum(inputs.elements["c10d::_reduce_scatter_base_"])
if dist.get_rank() == 0:
    print("torch", torch.__version__)
    for dimension, (gathered, reduced) in found.items():
        print(f"split along {dimension}: {gathered} elements gathered, {reduced} put into the reduce-scatter, of 8192")
dist.destroy_process_group()
assert found[1] == (8192, 8192)
assert found[0] == (16384, 16384), "the padding is no longer sent"
PYTHON
OMP_NUM_THREADS=1 "$folder/venv/bin/torchrun" --nproc_per_node 4 "$folder/case.py"
