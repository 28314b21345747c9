"""The parallel layout: which ranks there are, which rows each reads, and the groups over which they communicate."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from moetrain.config import SettingsError
from moetrain.distributed.progress import Progress
from moetrain.dtensor import full_tensor

Group = Literal["all", "data", "shard"]
"""``all``: every rank, each reading rows of its own. ``data``: ranks that hold the same shard of different replicas.
``shard``: ranks that together hold one replica of the model."""

Sharding = Literal["none", "fsdp", "hybrid"]


@dataclass(frozen=True)
class ParallelLayout:
    """This rank's place among all ranks. Without arguments: one process on the CPU.

    The methods that communicate are collectives: every rank of their group must call them, in the same order. With one
    rank they return at once.
    """

    rank: int = 0
    world_size: int = 1
    local_world_size: int = 1  # ranks on this machine
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    mesh: DeviceMesh | None = None  # named dimensions, see `make_mesh`; None without a process group
    expert_mesh: DeviceMesh | None = None  # the same ranks as experts see them, see `make_expert_mesh`; None: not split
    progress: Progress = field(default_factory=Progress, compare=False)  # what the watchdog watches
    object_group: dist.ProcessGroup | None = None  # of all ranks, for objects; None: the default group

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that prints and writes the run's files."""
        return self.rank == 0

    @property
    def shards(self) -> int:
        """Ranks that hold one replica of the model together."""
        return 1 if self.mesh is None else self.mesh["shard"].size()

    @property
    def replicas(self) -> int:
        """Replicas of the model over all ranks."""
        return self.world_size // self.shards

    @property
    def sharded(self) -> bool:
        """Whether `fully_shard` holds the weights: over several ranks or, with a mesh of a single rank, over that."""
        return self.mesh is not None and (self.shards > 1 or self.world_size == 1)

    @property
    def expert_ranks(self) -> int:
        """Ranks over which the experts of each layer are split."""
        return 1 if self.expert_mesh is None else self.expert_mesh["expert"].size()

    @property
    def passes_together(self) -> bool:
        """Whether a forward pass is a collective, because ranks hold parts of the model for each other."""
        return self.shards > 1 or self.expert_ranks > 1

    def row_range(self, batch_rows: int) -> tuple[int, int]:
        """The rows of a global batch that this rank reads: (first, count)."""
        count = batch_rows // self.world_size
        return self.rank * count, count

    def share(self, count: int) -> range:
        """This rank's share of ``range(count)``.

        Where forward passes are collectives, all ranks get shares of equal length: numbers from ``count`` on stand for
        empty passes.
        """
        if self.passes_together:
            count += -count % self.world_size
        return range(self.rank, count, self.world_size)

    def passes(self, count: int) -> int:
        """Forward passes to make for ``count`` batches of this rank, which may be more.

        Where passes are collectives, all ranks make the number of passes of the rank with the most; then this is a
        collective too.
        """
        return int(self.all_reduce_max(count)) if self.passes_together else count

    def all_gather_objects(self, value: Any, over: Group = "all") -> list[Any]:
        """The value of each rank of a group, in the order of ranks; values must be picklable."""
        if self.mesh is None:
            return [value]
        group = self._group(over)
        gathered: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(gathered, value, group=group)
        return gathered

    def gather_objects(self, value: Any) -> list[Any] | None:
        """The value of each rank, in the order of ranks, on the main rank; None on the others.

        What ranks send then does not grow with their number, as it does in `all_gather_objects`.
        """
        if self.mesh is None:
            return [value]
        gathered: list[Any] | None = [None] * self.world_size if self.is_main else None
        dist.gather_object(value, gathered, group=self.object_group, group_dst=0)
        return gathered

    def broadcast_object(self, value: Any) -> Any:
        """The main rank's value, on all ranks; that of the others is not read."""
        if self.mesh is None:
            return value
        box = [value if self.is_main else None]
        dist.broadcast_object_list(box, group=self.object_group, group_src=0)
        return box[0]

    def all_reduce_sum(self, tensor: torch.Tensor, over: Group = "all") -> torch.Tensor:
        """The sum of a tensor over a group, in place."""
        if self.mesh is not None:
            dist.all_reduce(tensor, group=self._group(over))
        return tensor

    def all_reduce_max(self, number: int, over: Group = "all") -> torch.Tensor:
        """The largest number of a group, int64 []; on the device, so that the host need not wait for it."""
        largest = torch.full((), number, device=self.device)
        if self.mesh is not None:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self._group(over))
        return largest

    def barrier(self, over: Group = "all") -> None:
        """Wait until every rank of a group has come here."""
        if self.mesh is not None:
            dist.barrier(group=self._group(over))

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The main rank runs the block before the others do."""
        if not self.is_main:
            self.barrier()
        yield
        if self.is_main:
            self.barrier()

    @torch.no_grad()
    def clip_gradients(self, parameters: Iterable[nn.Parameter], largest_norm: float) -> torch.Tensor:
        """Scale gradients down to ``largest_norm``; returns their norm before that, over all shards: float32 [].

        Each parameter counts once, however many ranks hold it.
        """
        by_mesh: dict[DeviceMesh | None, list[nn.Parameter]] = {}
        for parameter in parameters:
            by_mesh.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
        norms = []
        for group in by_mesh.values():
            norm = nn.utils.get_total_norm([each.grad for each in group if each.grad is not None])
            norms.append(full_tensor(norm))
        total = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
        for group in by_mesh.values():
            nn.utils.clip_grads_with_norm_(group, largest_norm, total)
        return total

    def set_timeout(self, timeout: timedelta) -> None:
        """How long a collective of any group may take before it fails."""
        if self.mesh is not None:
            split = [] if self.expert_mesh is None else self.expert_mesh.get_all_groups()
            for group in (None, *self.mesh.get_all_groups(), *split):
                _set_pg_timeout(timeout, group)

    def _group(self, over: Group) -> dist.ProcessGroup | None:
        """A process group; None stands for the default one, of all ranks."""
        if over == "all" or self.mesh is None:
            return self.object_group
        return self.mesh.get_group(over)


def make_mesh(sharding: Sharding, world_size: int, local_world_size: int, device: torch.device) -> DeviceMesh:
    """The ranks by named dimensions: ``data`` (replicas of the model) and ``shard`` (ranks that share one replica).

    ``none`` has a replica on each rank, ``fsdp`` one over all ranks, ``hybrid`` one on each machine.

    Raises:
        SettingsError: ``hybrid``, and machines with unequal numbers of ranks.
    """
    if sharding == "hybrid" and world_size % local_world_size:
        raise SettingsError(
            f"train.sharding=hybrid: {world_size} processes are not machines of {local_world_size} each: "
            "launch as many on each"
        )
    shards = count_shards(sharding, world_size, local_world_size)
    return init_device_mesh(device.type, (world_size // shards, shards), mesh_dim_names=("data", "shard"))


def make_expert_mesh(
    expert_parallel: int, sharding: Sharding, world_size: int, local_world_size: int, device: torch.device
) -> DeviceMesh | None:
    """The ranks as experts see them: ``expert_data``, ``expert_shard``, ``expert``; None without expert parallelism.

    Consecutive ranks, on one machine where it has enough, split the experts of each layer: ``expert``. Where the model
    is sharded, each rank's experts are sharded further over those ``expert_shard`` ranks of the replica that hold the
    same ones. ``expert_data`` are replicas of that.

    Raises:
        SettingsError: see `expert_mesh_shape`.
    """
    if expert_parallel == 1:
        return None
    shape = expert_mesh_shape(expert_parallel, sharding, world_size, local_world_size)
    return init_device_mesh(device.type, shape, mesh_dim_names=("expert_data", "expert_shard", "expert"))


def expert_mesh_shape(
    expert_parallel: int, sharding: Sharding, world_size: int, local_world_size: int
) -> tuple[int, int, int]:
    """Numbers of ranks of `make_expert_mesh` along ``expert_data``, ``expert_shard`` and ``expert``.

    Raises:
        SettingsError: the ranks of a replica, or without sharding all ranks, do not split into groups of that size.
    """
    shards = count_shards(sharding, world_size, local_world_size)
    within, whose = (world_size, "") if sharding == "none" else (shards, " that share a replica of the model")
    if within % expert_parallel:
        raise SettingsError(
            f"train.expert_parallel={expert_parallel} does not divide {within} process{'es' * (within > 1)}{whose}: "
            f"launch a multiple of {expert_parallel}, or set train.expert_parallel to a divisor of {within}"
        )
    expert_shards = max(1, shards // expert_parallel)
    return world_size // expert_shards // expert_parallel, expert_shards, expert_parallel


def count_shards(sharding: Sharding, world_size: int, local_world_size: int) -> int:
    """Ranks that share one replica of the model."""
    return {"none": 1, "fsdp": world_size, "hybrid": local_world_size}[sharding]
