"""The modular domain: an operation modulo a prime, with a share of its table trained and the rest held out.

Every fact rests on an unordered pair {x, y} of residues and its result z = x + y or z = x * y. Addition states it as
x + y = z and y + x = z, subtraction as z - x = y and z - y = x; likewise multiplication and division, over the residues
other than 0. Whether a pair is trained or held out is the same for all its statements and for both operations of its
family. So a held-out fact is in no text in any order or inverse, even if two operations are trained in one run.
"""

from __future__ import annotations

import functools
from random import Random as Generator
from typing import Literal

from moetrain.data.builtin.draws import Random, shuffled
from moetrain.data.builtin.planted import Fact, Table, any_of

Operation = Literal["add", "subtract", "multiply", "divide"]
Pair = tuple[int, int]
Family = Literal["additive", "multiplicative"]

LARGEST_MODULUS = 199
SIGNS: dict[str, str] = {"add": "+", "subtract": "-", "multiply": "*", "divide": "/"}


@functools.lru_cache(maxsize=16)
def table(
    seed: int, modulus: int = 59, operation: Operation = "add", trained_share: float = 0.6, sign: str | None = None
) -> Table:
    """Return the facts ``a SIGN b = c`` modulo a prime, numbers padded to one width.

    Raises ValueError for a modulus that is no prime from 5 to 199, or a share that leaves no trained or held-out facts.
    """
    trained, held_out = (
        tuple(Fact(prompt(a, b, sign or SIGNS[operation], modulus), padded(c, modulus)) for a, b, c in part)
        for part in facts(seed, modulus, operation, trained_share)
    )
    return Table(trained, held_out, any_of(sorted({fact.answer for fact in trained + held_out})))


def prompt(a: int, b: int, sign: str, modulus: int) -> str:
    return f"{padded(a, modulus)} {sign} {padded(b, modulus)} ="


def padded(number: int, modulus: int) -> str:
    return f"{number:0{len(str(modulus - 1))}d}"


def facts(
    seed: int, modulus: int, operation: Operation, trained_share: float
) -> tuple[list[tuple[int, int, int]], list[tuple[int, int, int]]]:
    """Return the trained and the held-out facts as (a, b, answer), each in a seeded order."""
    if not is_prime(modulus) or not 5 <= modulus <= LARGEST_MODULUS:
        raise ValueError(f"the modulus must be a prime from 5 to {LARGEST_MODULUS}, got {modulus}")
    family: Family = "additive" if operation in ("add", "subtract") else "multiplicative"
    parts = []
    for pairs in split(seed, modulus, family, trained_share):
        stated = []
        for x, y in pairs:
            for first, second in {(x, y), (y, x)}:
                result = combine(family, first, second, modulus)
                inverse = operation in ("subtract", "divide")
                stated.append((result, first, second) if inverse else (first, second, result))
        parts.append(shuffled(Generator(f"modular order {seed} {modulus} {family}").random, sorted(stated)))
    if not all(parts):
        raise ValueError(f"trained_share {trained_share} of the table of {modulus} leaves no facts to train or to test")
    return parts[0], parts[1]


def is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


def combine(family: Family, x: int, y: int, modulus: int) -> int:
    return (x + y if family == "additive" else x * y) % modulus


@functools.lru_cache(maxsize=16)
def split(seed: int, modulus: int, family: Family, trained_share: float) -> tuple[list[Pair], list[Pair]]:
    """Return the trained and the held-out unordered pairs (x <= y), chosen by the seed.

    Each result, and nearly each residue as an operand, is trained equally often (a pair x, y counts twice if x and y
    differ). Otherwise what is rare in training would be frequent among the held-out facts, and counting would give the
    answer away.
    """
    random = Generator(f"modular split {seed} {modulus} {family} {trained_share}").random
    residues = range(family == "multiplicative", modulus)
    by_result: dict[int, list[Pair]] = {}
    for x in residues:
        for y in range(x, modulus):
            by_result.setdefault(combine(family, x, y, modulus), []).append((x, y))
    wanted = trained_share * len(residues)
    sides = [_side(random, by_result[result], wanted) for result in sorted(by_result)]
    _level(random, sides, modulus)
    return tuple([pair for side in sides for pair in side[which]] for which in (0, 1))  # type: ignore[return-value]


def _side(random: Random, pairs: list[Pair], wanted: float) -> tuple[list[Pair], list[Pair]]:
    """Split the pairs of one result so that close to ``wanted`` ordered facts are trained."""
    trained: list[Pair] = []
    held_out: list[Pair] = []
    count = 0
    for x, y in shuffled(random, pairs):
        weight = 1 + (x != y)
        if abs(count + weight - wanted) < abs(count - wanted):
            trained.append((x, y))
            count += weight
        else:
            held_out.append((x, y))
    return trained, held_out


def _level(random: Random, sides: list[tuple[list[Pair], list[Pair]]], modulus: int) -> None:
    """Randomly exchange pairs of equal result if residues are then trained more equally often."""
    counts = [0] * modulus
    for trained, _ in sides:
        for pair in trained:
            for residue in set(pair):
                counts[residue] += 1
    for _ in range(20 * sum(len(trained) for trained, _ in sides)):
        trained, held_out = sides[int(random() * len(sides))]
        if not trained or not held_out:
            continue
        out, into = int(random() * len(trained)), int(random() * len(held_out))
        old, new = trained[out], held_out[into]
        if len(set(old)) != len(set(new)):
            continue
        # The exchange changes the sum of squared counts by 2 * (new - old + residues moved).
        if sum(counts[r] for r in set(new)) + len(set(new)) <= sum(counts[r] for r in set(old)):
            trained[out], held_out[into] = new, old
            for residue in set(old):
                counts[residue] -= 1
            for residue in set(new):
                counts[residue] += 1
