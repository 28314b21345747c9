"""Layouts of several ranks without processes, for functions whose only collectives gather objects."""

from moetrain.distributed.mesh import ParallelLayout


class Recording(ParallelLayout):
    """A rank that gathers its own values alone and adds each to ``gathered``."""

    def __init__(self, rank, world_size, gathered):
        super().__init__(rank, world_size)
        object.__setattr__(self, "gathered", gathered)
        object.__setattr__(self, "calls", 0)

    def all_gather_objects(self, value, over="all"):
        self.gathered.append(value)
        return [value]


class Replaying(Recording):
    """A rank that gathers what all ranks, one after the other, have recorded."""

    def all_gather_objects(self, value, over="all"):
        calls = len(self.gathered) // self.world_size
        object.__setattr__(self, "calls", self.calls + 1)
        return self.gathered[self.calls - 1 :: calls]
