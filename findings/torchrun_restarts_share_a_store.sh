#!/usr/bin/env bash
# torch 2.13.0: torchrun keeps one key-value store for all its starts of ranks, and ranks that are started again read
# what the ones before have left there, under the same keys.
#
# Seen with torch 2.13.0, Python 3.11, rendezvous backend c10d: after a restart MASTER_PORT is the same and a key that the
# first start set is there. With TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 there is a new port and no key. The function that opens
# the store for ranks (torch/distributed/rendezvous.py) says that each retry has a store of its own and therefore adds no
# prefix. Process groups keep the addresses of their ranks in it, so ranks that join again can find addresses of lost ones:
# in a program of two gloo ranks, about half of all restarts waited until the timeout. This script shows the key alone, and
# fails when it is gone.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.3.5
cat > "$folder/case.py" <<'PYTHON'
import os
import sys

import torch.distributed as dist

port = int(os.environ["MASTER_PORT"])
shared = os.environ["TORCHELASTIC_USE_AGENT_STORE"] == "True"
store = dist.TCPStore(os.environ["MASTER_ADDR"], port, 1, is_master=not shared)
start = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
print(f"start {start}: key of an earlier start: {store.check(['left'])}", flush=True)
store.set("left", str(start))
sys.exit(start == 0)  # the first start fails, and is repeated
PYTHON
run() {
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=$1 "$folder/venv/bin/torchrun" --nproc_per_node 1 --max_restarts 1 \
        --rdzv_backend c10d --rdzv_endpoint localhost:0 "$folder/case.py" 2>"$folder/log"
}
"$folder/venv/bin/python" -c 'import torch; print("torch", torch.__version__)'
echo "one store for all starts (default):" && run 0 | tee "$folder/shared"
echo "a store for each start:" && run 1 | tee "$folder/own"
grep -q "start 1: key of an earlier start: True" "$folder/shared"
grep -q "start 1: key of an earlier start: False" "$folder/own"
