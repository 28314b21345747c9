"""The formal domain: a small language whose rule generalizes to every string, with strings held out.

Its symbols are the ten digits, since a digit is a token of its own. ``copy`` and ``reverse`` ask for the string again,
as it is or backwards; ``brackets`` asks for what closes all open brackets, where 5 closes 0, 6 closes 1, to 9 closes 4.
"""

from __future__ import annotations

import functools
from random import Random as Generator
from typing import Literal

from moetrain.data.builtin.operands import Random, between
from moetrain.data.builtin.planted import Fact, Table, shuffled

Rule = Literal["copy", "reverse", "brackets"]

KINDS = 5  # of brackets
FEWEST = 3  # different symbols in an answer, so that it has enough arrangements to choose from


@functools.lru_cache(maxsize=16)
def table(seed: int, rule: Rule = "reverse", length: int = 6, count: int = 2000, trained_share: float = 0.6) -> Table:
    """Return ``count`` facts ``RULE STRING = ANSWER`` about strings of one length.

    No string comes twice, and none as another's reverse: a held-out string is in no training text, as question or as
    answer. ``copy`` and ``reverse`` take and hold out the same strings. Wrong choices are other arrangements of the
    answer's symbols. Raises ValueError where there are not so many strings.
    """
    trained = round(trained_share * count)
    if not 0 < trained < count:
        raise ValueError(f"count {count} and trained_share {trained_share} leave no facts to train or to test")
    random = Generator(f"formal {seed} {length} {'brackets' if rule == 'brackets' else 'strings'}").random
    strings: dict[str, None] = {}  # a dict keeps the order
    for _ in range(20 * count + 1000):
        if len(strings) == count:
            break
        string = _brackets(random, length) if rule == "brackets" else _digits(random, length)
        if len(set(answer(rule, string))) >= FEWEST and string not in strings and string[::-1] not in strings:
            strings[string] = None
    else:
        raise ValueError(f"there are hardly {count} strings of length {length}: lower count or raise length")
    facts = tuple(Fact(f"{rule} {string} =", answer(rule, string)) for string in strings)
    return Table(facts[:trained], facts[trained:], wrong=_arrangement)


def answer(rule: Rule, string: str) -> str:
    """Return what the rule makes of a string."""
    if rule == "copy":
        return string
    if rule == "reverse":
        return string[::-1]
    opened: list[int] = []
    for symbol in map(int, string):
        if symbol < KINDS:
            opened.append(symbol)
        elif not opened or opened.pop() != symbol - KINDS:
            raise ValueError(f"{string} closes what it has not opened")
    return "".join(str(symbol + KINDS) for symbol in reversed(opened))


def depth(length: int) -> int:
    """Return how many brackets a string of the language leaves open: all of one length leave as many."""
    return length - 2 * (length // 4)


def _digits(random: Random, length: int) -> str:
    return "".join(str(between(random, 0, 9)) for _ in range(length))


def _brackets(random: Random, length: int) -> str:
    """Return brackets of which none closes wrongly and ``depth`` stay open."""
    while True:
        steps = shuffled(random, [True] * (length - length // 4) + [False] * (length // 4))
        string, opened = "", []
        for opens in steps:
            if opens:
                opened.append(between(random, 0, KINDS - 1))
                string += str(opened[-1])
            elif opened:
                string += str(opened.pop() + KINDS)
        if len(string) == length:
            return string


def _arrangement(random: Random, fact: Fact) -> str:
    return "".join(shuffled(random, fact.answer))
