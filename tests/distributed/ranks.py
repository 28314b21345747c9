"""Launches of several ranks on this machine."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import moetrain

TRAIN = Path(moetrain.__file__).parent / "train.py"
_PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def start(ranks, overrides, machines=1, port=0, restarts=0):
    """The launcher of one machine, as a process; it starts lost ranks again so many times, as README says."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
    command += ["--max_restarts", str(restarts)]
    command += ["--nnodes", str(machines), "--rdzv_backend", "c10d", "--rdzv_endpoint", f"localhost:{port}"]
    own = {"OMP_NUM_THREADS": "1"} | ({"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"} if machines > 1 else {})
    return subprocess.Popen([*command, str(TRAIN), *overrides], env={**os.environ, **own}, **_PIPES)


def launch(ranks, overrides, machines=1):
    """Train on so many ranks on each of some machines, all of them this one."""
    port = free_port() if machines > 1 else 0
    launchers = [start(ranks, overrides, machines, port) for _ in range(machines)]
    for launcher in launchers:
        said, _ = launcher.communicate(timeout=240)
        assert launcher.returncode == 0, said[-3000:]


def alone(command, ranks=2, machine=None):
    """Each rank of a Python command as a process, without a launcher that would end the others when one fails.

    ``{rank}`` in an argument stands for the rank; ``machine`` is the number of ranks on a machine, by default all.
    """
    everyone = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(machine or ranks)}
    everyone |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    for rank in range(ranks):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank % (machine or ranks)), "OMP_NUM_THREADS": "1"}
        arguments = [word.replace("{rank}", str(rank)) for word in command]
        yield subprocess.Popen([sys.executable, *arguments], env={**os.environ, **everyone, **own}, **_PIPES)


def run_ranks(command, ranks=2, seconds=240, machine=None):
    """What each rank of a Python command printed, once all have succeeded."""
    processes = list(alone(command, ranks, machine))
    try:
        said = [process.communicate(timeout=seconds)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(said)[-5000:]
    return said
