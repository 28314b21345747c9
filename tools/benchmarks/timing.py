"""Timing that a busy machine does not fool: sides take turns, medians, ratios of medians.

Speeds of one machine move by tens of percent within minutes. What is compared is therefore run in turns, in an order
that is reversed every time, and a ratio stands beside its spread over the turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
import torch


@dataclass
class Timing:
    """Seconds of each turn of one side, by wall clock and by processor time over all threads of the process."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def add(self, wall: float, cpu: float) -> None:
        self.wall.append(wall)
        self.cpu.append(cpu)

    @property
    def seconds(self) -> float:
        """The median turn by wall clock."""
        return median(self.wall)

    @property
    def cpu_seconds(self) -> float:
        return median(self.cpu)

    def summary(self) -> dict[str, Any]:
        """Medians and quartiles, for a result file."""
        low, high = np.percentile(self.wall, [25, 75]).tolist()
        return {
            "seconds": self.seconds,
            "seconds_quartiles": [low, high],
            "cpu_seconds": self.cpu_seconds,
            "turns": len(self.wall),
        }


def clock(device: torch.device) -> tuple[float, float]:
    """Wall and processor seconds now, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter(), time.process_time()


def take_turns(
    sides: Mapping[str, Callable[[int], object]],
    turns: int,
    device: torch.device,
    warmup: int = 1,
) -> dict[str, Timing]:
    """Time each side once a turn, after ``warmup`` turns that do not count.

    Args:
        sides: by name, what is timed; given the number of the turn (0 the first, warm-up included), so that every side
            can take the same fresh data.
    """
    return take_clocked_turns({name: clocked(side, device) for name, side in sides.items()}, turns, warmup)


def clocked(side: Callable[[int], object], device: torch.device) -> Callable[[int], tuple[float, float]]:
    """A side that returns the wall and processor seconds of its turn."""

    def take_turn(turn: int) -> tuple[float, float]:
        wall, cpu = clock(device)
        side(turn)
        wall_after, cpu_after = clock(device)
        return wall_after - wall, cpu_after - cpu

    return take_turn


def take_clocked_turns(
    sides: Mapping[str, Callable[[int], tuple[float, float]]], turns: int, warmup: int = 1
) -> dict[str, Timing]:
    """`take_turns` of sides that time themselves: see `clocked`."""
    timings = {name: Timing() for name in sides}
    for turn in range(warmup + turns):
        order = list(sides) if turn % 2 == 0 else list(sides)[::-1]
        for name in order:
            seconds = sides[name](turn)
            if turn >= warmup:
                timings[name].add(*seconds)
    return timings


def ratio(above: list[float], below: list[float]) -> dict[str, Any]:
    """The ratio of two medians, and the quartiles of the ratios turn by turn.

    Raises:
        ValueError: sides of different numbers of turns, or none.
    """
    if len(above) != len(below) or not above:
        raise ValueError(f"{len(above)} and {len(below)} turns: a ratio compares sides that took the same turns")
    quartiles = np.percentile(np.array(above) / np.array(below), [25, 75]).tolist()
    return {"ratio": median(above) / median(below), "quartiles_by_turn": quartiles}


def share_with_interval(above: list[float], below: list[float], seed: int = 0) -> dict[str, float]:
    """By how much the median of one side exceeds the other's, as a share of the latter, with a 95% bootstrap interval.

    Turns are resampled in pairs: what slows the machine for a while slows both of a pair.
    """
    pairs_P2 = np.array([above, below]).T
    picks_RP = np.random.default_rng(seed).integers(len(pairs_P2), size=(2000, len(pairs_P2)))
    medians_R2 = np.median(pairs_P2[picks_RP], axis=1)
    low, high = np.percentile(medians_R2[:, 0] / medians_R2[:, 1] - 1, [2.5, 97.5]).tolist()
    return {"share": median(above) / median(below) - 1, "low": low, "high": high}


def repeat(work: Callable[[], object], least_seconds: float = 0.2, least: int = 3) -> Timing:
    """Time ``work`` again and again, at least ``least`` times and for ``least_seconds``, after once for warm-up."""
    work()
    timing = Timing()
    while len(timing.wall) < least or sum(timing.wall) < least_seconds:
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        timing.add(time.perf_counter() - wall, time.process_time() - cpu)
    return timing
