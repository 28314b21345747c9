"""Random draws and orders that the generated domains share.

Only random() and seeding by a string are promised to stay the same from one Python version to the next. So the other
methods of Random are not used, and an order that must not depend on the seed is taken from a hash.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

Random = Callable[[], float]
Choice = TypeVar("Choice")

SHORT = 100  # characters; shorter documents are often equal


def between(random: Random, first: int, last: int) -> int:
    """Return a uniform integer from first to last, both included."""
    return first + int(random() * (last - first + 1))


def pick(random: Random, choices: Sequence[Choice]) -> Choice:
    """Return one of the choices, uniformly."""
    return choices[int(random() * len(choices))]


def word_list(text: str) -> tuple[str, ...]:
    """Return the words of a text."""
    return tuple(text.split())


def shuffled(random: Random, elements: Iterable[Choice]) -> list[Choice]:
    """Return the elements in a uniform random order."""
    order = list(elements)
    for last in range(len(order) - 1, 0, -1):
        other = between(random, 0, last)
        order[last], order[other] = order[other], order[last]
    return order


def digest(text: str) -> int:
    """Return a 64-bit hash of the text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def hash_order(choices: Iterable[Choice], salt: str) -> tuple[Choice, ...]:
    """Return the choices in an order that depends on the salt and their repr only."""
    return tuple(sorted(choices, key=lambda choice: digest(f"{salt} {choice!r}")))


def take_bytes(size: int, texts: Iterable[str]) -> Iterator[str]:
    """Yield texts until at least `size` bytes of UTF-8 have been yielded; texts below `SHORT` are not repeated."""
    seen: set[str] = set()
    total = 0
    if size <= 0:
        return
    for text in texts:
        if len(text) < SHORT:
            if text in seen:
                continue
            seen.add(text)
        total += len(text.encode())
        yield text
        if total >= size:
            return
