"""The formal domain: a rule about strings of digits, some of them held out.

``copy`` and ``reverse`` ask for the string as it is or backwards. ``brackets`` asks for the string that closes all open
brackets, where 5 closes 0, 6 closes 1, and so on to 9 closes 4. Each digit is a token.
"""

from __future__ import annotations

import functools
from random import Random as Generator
from typing import Literal

from moetrain.data.builtin.draws import Random, between, shuffled
from moetrain.data.builtin.planted import Fact, Table

Rule = Literal["copy", "reverse", "brackets"]

BRACKETS = 5  # kinds of brackets
MIN_SYMBOLS = 3  # distinct symbols of an answer, so that it has enough arrangements for wrong choices


@functools.lru_cache(maxsize=16)
def table(seed: int, rule: Rule = "reverse", length: int = 6, count: int = 2000, trained_share: float = 0.6) -> Table:
    """Return ``count`` facts ``RULE STRING = ANSWER`` about strings of one length.

    No string is repeated or is the reverse of another, so a held-out string is in no training text, neither as
    question nor as answer. ``copy`` and ``reverse`` hold out the same strings. Wrong choices are other arrangements of
    the symbols of the answer. Raises ValueError if there are not that many strings.
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
        if len(set(answer(rule, string))) >= MIN_SYMBOLS and string not in strings and string[::-1] not in strings:
            strings[string] = None
    else:
        raise ValueError(f"there are hardly {count} strings of length {length}: lower count or raise length")
    facts = tuple(Fact(f"{rule} {string} =", answer(rule, string)) for string in strings)
    return Table(facts[:trained], facts[trained:], wrong=_arrangement)


def answer(rule: Rule, string: str) -> str:
    """Return the answer of the rule for a string."""
    if rule == "copy":
        return string
    if rule == "reverse":
        return string[::-1]
    opened: list[int] = []
    for symbol in map(int, string):
        if symbol < BRACKETS:
            opened.append(symbol)
        elif not opened or opened.pop() != symbol - BRACKETS:
            raise ValueError(f"{string} closes a bracket that is not open")
    return "".join(str(symbol + BRACKETS) for symbol in reversed(opened))


def _digits(random: Random, length: int) -> str:
    return "".join(str(between(random, 0, 9)) for _ in range(length))


def _brackets(random: Random, length: int) -> str:
    """Draw brackets that are closed correctly, with ``length - 2 * (length // 4)`` of them left open."""
    while True:
        steps = shuffled(random, [True] * (length - length // 4) + [False] * (length // 4))
        string, opened = "", []
        for opens in steps:
            if opens:
                opened.append(between(random, 0, BRACKETS - 1))
                string += str(opened[-1])
            elif opened:
                string += str(opened.pop() + BRACKETS)
        if len(string) == length:
            return string


def _arrangement(random: Random, fact: Fact) -> str:
    return "".join(shuffled(random, fact.answer))
