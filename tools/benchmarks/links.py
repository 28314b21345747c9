"""How long collectives take on machines of several GPUs: bytes over bandwidth, plus a latency for each step of a ring.

A ring passes through every GPU of a machine, and there are as many rings as GPUs of the machine in the group. So what
goes from one machine to the next is spread over the network links of all of them, as NCCL does it.

The latencies are those with which NCCL itself chooses algorithms for its protocol "Simple" (its `src/graph/tuning.cc`):
microseconds of a collective, of a step within a machine, and of one between machines.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log2

from benchmarks.communication import Collective, Overlap

_LATENCY = 8.4e-6
_STEP_WITHIN = 3.4e-6
_STEP_BETWEEN = 14e-6


@dataclass(frozen=True)
class Links:
    """Bytes per second into and out of one GPU: to others of its machine, and to those of other machines."""

    machine: int  # GPUs on a machine
    within: float
    between: float

    def seconds(self, collective: Collective) -> float:
        """Time of all equal collectives of a step, one after the other."""
        group = collective.group
        together = max(1, min(group, self.machine // collective.stride))  # of the group on each machine
        machines = ceil(group / together)
        if collective.kind == "all_to_all":
            elsewhere, here = (group - together) / group, (together - 1) / group
            transfer = collective.nbytes * max(elsewhere / self.between, here / self.within)
            latency = _STEP_BETWEEN if machines > 1 else _STEP_WITHIN
            return transfer + collective.count * (_LATENCY + latency)
        transfer = collective.sent / self.within if together > 1 else 0.0
        if machines > 1:
            transfer = max(transfer, collective.sent / (together * self.between))
        rounds = 2 if collective.kind == "all_reduce" else 1
        latency = rounds * ((group - machines) * _STEP_WITHIN + (machines - 1) * _STEP_BETWEEN)
        if collective.kind == "all_reduce":  # trees over machines; there are none for the other two
            tree = rounds * ((together - 1) * _STEP_WITHIN + log2(machines) * _STEP_BETWEEN)
            latency = min(latency, tree)
        return transfer + collective.count * (_LATENCY + latency)

    def exposed(self, collectives: list[Collective], compute: float, micro_batches: int) -> float:
        """Seconds of a step in which GPUs wait for communication, with the overlap that the program has.

        What overlaps with the last backward pass has two thirds of a micro-batch's computation to hide behind; what
        overlaps with the whole step has all that is left.

        Args:
            compute: seconds of a step's computation.
        """
        by_overlap: dict[Overlap, float] = {"none": 0.0, "backward": 0.0, "step": 0.0}
        for each in collectives:
            by_overlap[each.overlap] += self.seconds(each)
        backward = compute * 2 / 3 / micro_batches
        hidden = min(by_overlap["backward"], backward)
        waiting = by_overlap["backward"] - hidden + max(0.0, by_overlap["step"] - (compute - hidden))
        return by_overlap["none"] + waiting
