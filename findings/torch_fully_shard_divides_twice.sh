#!/usr/bin/env bash
# torch 2.13.0 (CPU, gloo): fully_shard on a mesh of one rank divides gradients twice by the divide factor, when sums are
# forced for the reduction.
#
# Seen with torch 2.13.0, Python 3.11: set_gradient_divide_factor(2.0) alone gives half of the gradient, as it should; with
# set_force_sum_reduction_for_comms(True) beside it a quarter. That call is documented to change how the reduction is
# communicated, not its result. This script fails when that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
cat > "$folder/case.py" <<'PYTHON'
import os
import socket

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
dist.init_process_group("gloo")
found = {}
for forced in (False, True):
    layer = nn.Linear(4, 4, bias=False)
    fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
    layer.set_gradient_divide_factor(2.0)
    layer.set_force_sum_reduction_for_comms(forced)
    layer(torch.ones(1, 4)).sum().backward()
    found[forced] = layer.weight.grad.full_tensor()[0, 0].item()
dist.destroy_process_group()
print("torch", torch.__version__)
print("gradient of 1 divided by 2:", found[False], "and with forced sums:", found[True])
assert found[False] == 0.5
assert found[True] == 0.25, "both are the same now"
PYTHON
"$folder/venv/bin/python" "$folder/case.py"
