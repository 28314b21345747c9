"""Sides of a comparison in processes of their own, each waiting while another takes its turn.

Sides of one process share more than the machine. On CPU oneDNN keeps the 1,024 products that it compiled last, and one
side whose products have new shapes at every step, as experts of ragged sizes have, drives all others' out: a step of
ours takes 1.29 times as long without that cache. No training run has such company.
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

# What a side's process is asked for: a context that gives its step, by the number of the turn.
Maker = Callable[..., AbstractContextManager[Callable[[int], object]]]

_opened = ExitStack()
_side: Callable[[int], tuple[float, float]]


def call_in_subprocess(work: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns, called in a process of its own, so that no memory of it stays here."""
    with _pool() as pool:
        return pool.submit(work, *arguments).result()


@contextmanager
def in_subprocesses(
    makers: Mapping[str, tuple[Maker, tuple[Any, ...]]], device: torch.device
) -> Iterator[dict[str, Callable[[int], tuple[float, float]]]]:
    """Sides by name, each made by its maker of its arguments in a process of its own, for `take_clocked_turns`.

    Errors of a side are raised here.
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
