"""The control of the planted rules: questions of the same form with random answers, fixed by a seeded table.

Every fact can be memorized, but no fact says anything about another, not even about the one with exchanged operands.
The held-out facts are drawn the same way, so nothing can be learned about them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from random import Random as Generator
from typing import Literal

from moetrain.data.builtin import modular
from moetrain.data.builtin.draws import shuffled
from moetrain.data.builtin.planted import Fact, Table, any_of

Like = Literal["modular", "math"]

SIGN = "@"  # no real operation, so that no fact contradicts one of a real domain
OPERANDS = range(10, 100)


def table(
    seed: int,
    like: Like = "modular",
    modulus: int = 59,
    operation: modular.Operation = "add",
    trained_share: float = 0.6,
    count: int = 2000,
    sign: str = SIGN,
) -> Table:
    """Return facts in the form of a rule domain, with random answers.

    ``like: modular``: the questions of `modular.table`, split the same way, with another sign; the answers are those of
    that table, permuted within each part, so that each occurs equally often. ``math``: a made-up operation on two
    numbers of two digits, answered by one; ``count`` facts, answers as equally frequent as can be in each part, no
    pair of operands in both orders. Another ``sign`` gives another table. Raises ValueError where there are no such
    facts.
    """
    if like == "modular":
        return _like_modular(seed, modulus, operation, trained_share, sign)
    return _like_math(seed, count, trained_share, sign)


@functools.lru_cache(maxsize=16)
def _like_modular(seed: int, modulus: int, operation: modular.Operation, trained_share: float, sign: str) -> Table:
    random = Generator(f"random answers {seed} modular {modulus} {operation} {sign}").random
    parts = []
    for part in modular.facts(seed, modulus, operation, trained_share):
        answers = shuffled(random, [c for _, _, c in part])
        parts.append(
            tuple(
                Fact(modular.prompt(a, b, sign, modulus), modular.padded(answer, modulus))
                for (a, b, _), answer in zip(part, answers, strict=True)
            )
        )
    return Table(parts[0], parts[1], any_of(sorted({fact.answer for fact in parts[0] + parts[1]})))


@functools.lru_cache(maxsize=16)
def _like_math(seed: int, count: int, trained_share: float, sign: str) -> Table:
    random = Generator(f"random answers {seed} math {sign}").random
    pairs = shuffled(random, [(x, y) for x in OPERANDS for y in OPERANDS if x < y])
    trained = round(trained_share * count)
    if count > len(pairs) or not 0 < trained < count:
        raise ValueError(
            f"count {count} and trained_share {trained_share}: there are {len(pairs)} facts like math, of which at "
            "least one must be trained and one not"
        )
    answers = [str(number) for number in range(10, 100)]
    parts = []
    for part in (pairs[:trained], pairs[trained:count]):
        # Every answer is used before any is used again.
        drawn = [answer for _ in range(-(-len(part) // len(answers))) for answer in shuffled(random, answers)]
        drawn = shuffled(random, drawn[: len(part)])
        parts.append(
            tuple(_fact(shuffled(random, pair), answer, sign) for pair, answer in zip(part, drawn, strict=True))
        )
    return Table(parts[0], parts[1], any_of(answers))


def _fact(operands: Sequence[int], answer: str, sign: str) -> Fact:
    a, b = operands
    return Fact(f"What is {a} {sign} {b}?", answer, ".")
