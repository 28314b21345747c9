"""A model sharded over a mesh of one rank against a whole one, on any device."""

import pytest
import torch
import torch.distributed as dist
from benchmarks.configs import mesh_of_one, open_run
from torch.distributed.fsdp import FSDPModule

from moetrain.distributed.sharding import full_tensor

STEPS = 3


def check_training(whole, sharded, rtol, atol):
    """Train both for some steps, and compare losses and weights.

    Args:
        whole, sharded: settings of either run.
    """
    with mesh_of_one(sharded) as layout:
        one, other = (_train(settings, where) for settings, where in ((whole, None), (sharded, layout)))
    assert not dist.is_initialized()
    assert other[0] == pytest.approx(one[0], rel=rtol)
    for weight, same in zip(one[1], other[1], strict=True):
        torch.testing.assert_close(same, weight, rtol=rtol, atol=atol)


def _train(settings, layout):
    """Losses of all steps, and the weights after them."""
    torch.compiler.reset()
    with open_run(settings, STEPS, layout) as run:
        assert isinstance(run.model, FSDPModule) == (layout is not None)
        losses = []
        for step in range(1, STEPS + 1):
            run.train_step(step)
            losses.append(float(run.newest.loss))
        return losses, [full_tensor(p.detach()).clone() for p in run.model.parameters()]
