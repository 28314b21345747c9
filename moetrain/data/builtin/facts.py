"""Which arithmetic facts are kept out of the training text, and the one test that keeps them out.

A fact is an unordered pair of small operands under one of two operations. 17 + 25 = 42, 25 + 17 = 42, 42 - 17 = 25
and 42 - 25 = 17 are one additive fact; a product and its two divisions are one multiplicative fact. A problem is safe
when no three of its numbers are the operands and the result of a held-out fact, whatever its words say: so safety needs
no knowledge of the wording, and a reader of the text can check it without any.
"""

import functools
from collections.abc import Iterable
from typing import Literal

from moetrain.data.builtin.draws import digest

Family = Literal["additive", "multiplicative"]

LARGEST = 99
SMALLEST = 2  # below it every fact is the rule for 0 or for 1, and worked steps ("carry 1") need those
ONE_IN = 10


@functools.cache
def held_out_pairs(family: Family) -> frozenset[tuple[int, int]]:
    """Return the held-out pairs (low, high) of a family: a tenth of those within 2..99, the same for every seed."""
    pairs = ((low, high) for low in range(SMALLEST, LARGEST + 1) for high in range(low, LARGEST + 1))
    # 2 + 2 = 2 * 2: holding out either would hold out both, and no reader of the numbers could tell which.
    return frozenset(pair for pair in pairs if pair != (2, 2) and digest(f"{family} {pair[0]} {pair[1]}") % ONE_IN == 0)


def is_held_out(family: Family, a: int, b: int) -> bool:
    """Return whether the fact of a and b, in either order, is kept out of the training text."""
    return (min(a, b), max(a, b)) in held_out_pairs(family)


def show_held_out(numbers: Iterable[int]) -> bool:
    """Return whether some held-out fact has both operands and its result among the numbers.

    An operand may serve twice ({6, 12} shows 6 + 6): "double 6" names it once.
    """
    results = _results()
    values = sorted(set(numbers))
    for place, low in enumerate(values):
        if low > LARGEST:
            return False
        for high in values[place:]:
            if high > LARGEST:
                break
            for result in results.get((low, high), ()):
                if result in values:
                    return True
    return False


@functools.cache
def _results() -> dict[tuple[int, int], tuple[int, ...]]:
    results: dict[tuple[int, int], tuple[int, ...]] = {}
    for low, high in held_out_pairs("additive"):
        results[low, high] = (low + high,)
    for low, high in held_out_pairs("multiplicative"):
        results[low, high] = (*results.get((low, high), ()), low * high)
    return results
