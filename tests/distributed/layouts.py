"""Several ranks without processes: threads whose layouts share their collectives."""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch

from moetrain.distributed.mesh import ParallelLayout


class ThreadLayout(ParallelLayout):
    """One of several ranks that are threads of this process."""

    def __init__(self, rank, shared):
        super().__init__(rank, len(shared.values))
        object.__setattr__(self, "shared", shared)

    def all_gather_objects(self, value, over="all"):
        self.shared.values[self.rank] = value
        self.shared.barrier.wait()
        gathered = list(self.shared.values)
        self.shared.barrier.wait()
        return gathered

    def gather_objects(self, value):
        gathered = self.all_gather_objects(value)
        return gathered if self.is_main else None

    def broadcast_object(self, value):
        return self.all_gather_objects(value)[0]

    def all_reduce_sum(self, tensor, over="all"):
        return tensor.copy_(torch.stack(self.all_gather_objects(tensor.clone())).sum(0))

    def all_reduce_max(self, number, over="all"):
        return torch.tensor(max(self.all_gather_objects(number)))

    def barrier(self, over="all"):
        self.shared.barrier.wait()


class _Shared:
    def __init__(self, ranks):
        self.values, self.barrier = [None] * ranks, threading.Barrier(ranks, timeout=60)


def in_ranks(ranks, function):
    """What ``function(layout)`` returns on each of so many ranks."""
    shared = _Shared(ranks)

    def run(rank):
        try:
            return function(ThreadLayout(rank, shared))
        except BaseException:
            shared.barrier.abort()  # the others must not wait for it
            raise

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(run, range(ranks)))
