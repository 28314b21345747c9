"""Timing that is robust to a busy machine: interleaved runs, medians, ratios of medians.

The speed of one machine changes by tens of percent within minutes. So the compared functions ("sides") run once per
turn, in an order that is reversed every turn, and a ratio is reported with its quartiles over the turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
import torch

Seconds = tuple[float, float]
"""Wall time, and CPU time over all threads of the process."""


@dataclass
class Timing:
    """Wall and CPU seconds of each turn of one side."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def add(self, wall: float, cpu: float) -> None:
        self.wall.append(wall)
        self.cpu.append(cpu)

    @property
    def seconds(self) -> float:
        """Median wall seconds."""
        return median(self.wall)

    @property
    def cpu_seconds(self) -> float:
        """Median CPU seconds."""
        return median(self.cpu)

    def summary(self) -> dict[str, Any]:
        """Medians and quartiles, for a result file."""
        quartiles = np.percentile(self.wall, [25, 75]).tolist()
        return {
            "seconds": self.seconds,
            "seconds_quartiles": quartiles,
            "cpu_seconds": self.cpu_seconds,
            "turns": len(self.wall),
        }


def clock(device: torch.device) -> Seconds:
    """The time after the device has been synchronized."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter(), time.process_time()


def clocked(side: Callable[[int], object], device: torch.device) -> Callable[[int], Seconds]:
    """A function that calls ``side`` and returns the seconds it took."""

    def take_turn(turn: int) -> Seconds:
        wall, cpu = clock(device)
        side(turn)
        wall_after, cpu_after = clock(device)
        return wall_after - wall, cpu_after - cpu

    return take_turn


def take_turns(
    sides: Mapping[str, Callable[[int], object]], turns: int, device: torch.device, warmup: int = 1
) -> dict[str, Timing]:
    """Time every side once per turn, after ``warmup`` turns that are not counted.

    Args:
        sides: functions by name; each gets the number of the turn, from 0 and including the warm-up, so that all sides
            can use the same fresh data.
    """
    return take_clocked_turns({name: clocked(side, device) for name, side in sides.items()}, turns, warmup)


def take_clocked_turns(sides: Mapping[str, Callable[[int], Seconds]], turns: int, warmup: int = 1) -> dict[str, Timing]:
    """`take_turns` for sides that time themselves: see `clocked`."""
    timings = {name: Timing() for name in sides}
    for turn in range(warmup + turns):
        for name in list(sides) if turn % 2 == 0 else reversed(list(sides)):
            seconds = sides[name](turn)
            if turn >= warmup:
                timings[name].add(*seconds)
    return timings


def ratio(above: list[float], below: list[float]) -> dict[str, Any]:
    """The ratio of two medians, and the quartiles of the ratios per turn.

    Raises:
        ValueError: the sides have different numbers of turns, or none.
    """
    if len(above) != len(below) or not above:
        raise ValueError(f"{len(above)} and {len(below)} turns: a ratio needs sides with the same turns")
    quartiles = np.percentile(np.array(above) / np.array(below), [25, 75]).tolist()
    return {"ratio": median(above) / median(below), "quartiles_by_turn": quartiles}


def overhead(above: Timing, below: Timing) -> dict[str, Any]:
    """How much longer one side takes than the other, by wall and CPU time, with the timings of both."""
    return {
        "wall": share_with_interval(above.wall, below.wall),
        "cpu": share_with_interval(above.cpu, below.cpu),
        "with": above.summary(),
        "without": below.summary(),
    }


def share_with_interval(above: list[float], below: list[float], seed: int = 0) -> dict[str, float]:
    """The relative excess of the median of ``above`` over that of ``below``, with a 95% bootstrap interval.

    Turns are resampled in pairs, because a slow phase of the machine affects both of a pair.
    """
    pairs_P2 = np.array([above, below]).T
    picks_RP = np.random.default_rng(seed).integers(len(pairs_P2), size=(2000, len(pairs_P2)))
    medians_R2 = np.median(pairs_P2[picks_RP], axis=1)
    low, high = np.percentile(medians_R2[:, 0] / medians_R2[:, 1] - 1, [2.5, 97.5]).tolist()
    return {"share": median(above) / median(below) - 1, "low": low, "high": high}


def format_share(share: Mapping[str, float]) -> str:
    """A share with its interval, in percent."""
    return f"{share['share']:.2%} ({share['low']:.2%} to {share['high']:.2%})"


def repeat(work: Callable[[], object], least_seconds: float = 0.2, least: int = 3) -> Timing:
    """Time ``work`` at least ``least`` times and for at least ``least_seconds``, after one warm-up call."""
    work()
    timing = Timing()
    turn = clocked(lambda _: work(), torch.device("cpu"))
    while len(timing.wall) < least or sum(timing.wall) < least_seconds:
        timing.add(*turn(0))
    return timing
