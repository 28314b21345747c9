"""What every generated domain draws and cuts its text with.

Only random() and seeding by a string are promised to stay the same from one Python to the next: so nothing here uses
Random's other methods, and what needs a fixed choice whatever the seed takes it from a hash.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Random = Callable[[], float]
Choice = TypeVar("Choice")

SHORT = 100  # characters: shorter documents are likely enough to be equal that equal ones are looked for


def between(random: Random, first: int, last: int) -> int:
    """Return an integer from first to last, both included, each as likely."""
    # Not Random.randint: how that uses the stream may change between Python versions, random() may not.
    return first + int(random() * (last - first + 1))


def pick(random: Random, choices: tuple[Choice, ...]) -> Choice:
    """Return one of the choices, each as likely."""
    return choices[int(random() * len(choices))]


def listed(words: str) -> tuple[str, ...]:
    """Return the words of a text."""
    return tuple(words.split())


def digest(text: str) -> int:
    """Return 64 bits that hang on the text alone."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def shuffled(choices: Iterable[Choice], salt: str) -> tuple[Choice, ...]:
    """Return the choices in an order that hangs on the salt and their repr alone."""
    return tuple(sorted(choices, key=lambda choice: digest(f"{salt} {choice!r}")))


def until(size: int, texts: Iterable[str], short: int = SHORT) -> Iterator[str]:
    """Yield the texts until at least `size` bytes of UTF-8 are given. No text shorter than `short` comes twice."""
    seen: set[str] = set()
    given = 0
    if size <= 0:
        return
    for text in texts:
        if len(text) < short:
            if text in seen:
                continue
            seen.add(text)
        given += len(text.encode())
        yield text
        if given >= size:
            return
