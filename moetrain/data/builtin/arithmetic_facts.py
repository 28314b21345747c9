"""Which arithmetic facts are held out of the training text, and the test that keeps them out.

A fact is an unordered pair of small operands under addition or multiplication. 17 + 25 = 42, 25 + 17 = 42,
42 - 17 = 25 and 42 - 25 = 17 are one additive fact; a product and its two divisions are one multiplicative fact. A
problem is safe if no three of its numbers are the operands and the result of a held-out fact. This does not depend on
its wording, so a reader of the text can check it without knowing how the text was made.
"""

import functools
from collections.abc import Iterable
from typing import Literal

from moetrain.data.builtin.draws import digest

Family = Literal["additive", "multiplicative"]

LARGEST = 99
SMALLEST = 2  # facts with 0 or 1 are never held out: worked steps such as "carry 1" need them
ONE_IN = 10


@functools.cache
def held_out_pairs(family: Family) -> frozenset[tuple[int, int]]:
    """Return the held-out pairs (low, high) of a family: a tenth of those within 2..99, the same for every seed."""
    pairs = ((low, high) for low in range(SMALLEST, LARGEST + 1) for high in range(low, LARGEST + 1))
    # 2 + 2 = 2 * 2: from the numbers alone nobody can tell which of the two facts is stated.
    return frozenset(pair for pair in pairs if pair != (2, 2) and digest(f"{family} {pair[0]} {pair[1]}") % ONE_IN == 0)


def show_held_out(numbers: Iterable[int]) -> bool:
    """Return whether some held-out fact has both operands and its result among the numbers.

    A number may be both operands ({6, 12} shows 6 + 6), because "double 6" names it once.
    """
    results = _results()
    values = sorted(set(numbers))
    for place, low in enumerate(values):
        if low > LARGEST:
            return False
        for high in values[place:]:
            if high > LARGEST:
                break
            if any(result in values for result in results.get((low, high), ())):
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
