"""The sides of a comparison in one subprocess each, which waits while another side takes its turn.

In one process the sides would share caches. On CPU, oneDNN keeps the 1,024 matmuls that it compiled last, and a side
whose matmuls have new shapes at every step, as ragged experts have, evicts those of all others: our step takes 1.29
times as long without that cache. A training run does not share it with anybody.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch

from benchmarks.timing import clocked

# Makes a side in its process: a context manager that yields the step, a function of the number of the turn.
Maker = Callable[..., AbstractContextManager[Callable[[int], object]]]

_opened = ExitStack()
_side: Callable[[int], tuple[float, float]]


def call_in_subprocess(work: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a subprocess and return its result, so that its memory is freed."""
    with _pool() as pool:
        return pool.submit(work, *arguments).result()


@contextmanager
def in_subprocesses(
    makers: Mapping[str, tuple[Maker, tuple[Any, ...]]], device: torch.device
) -> Iterator[dict[str, Callable[[int], tuple[float, float]]]]:
    """Sides by name for `take_clocked_turns`, each made in a subprocess by its maker from its arguments.

    Exceptions of a side are raised in this process.
    """
    with ExitStack() as pools:
        pool = {name: pools.enter_context(_pool()) for name in makers}
        started = [pool[name].submit(_start, device, *maker) for name, maker in makers.items()]
        for start in started:
            start.result()
        yield {name: partial(_ask, pool[name]) for name in makers}
        for name in makers:
            pool[name].submit(_opened.close).result()


def _pool() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, get_context("spawn"), torch.set_num_threads, (torch.get_num_threads(),))


def _ask(pool: ProcessPoolExecutor, turn: int) -> tuple[float, float]:
    return pool.submit(_take_turn, turn).result()


def _start(device: torch.device, maker: Maker, arguments: tuple[Any, ...]) -> None:
    global _side
    _side = clocked(_opened.enter_context(maker(*arguments)), device)


def _take_turn(turn: int) -> tuple[float, float]:
    return _side(turn)
