"""Probe items of the math domain: held-out facts, asked in the words of the training text.

Four choices are drawn first, near to each other, of equal length, and each of them the answer to some held-out fact;
then which of them is asked about. So given the choices each is as likely to be right: neither rank, place or nearness
to the others tells, nor how often a number occurs in the training text.
"""

import functools
from random import Random
from typing import Any

from moetrain.data.builtin import operands, phrases
from moetrain.data.builtin.arithmetic import COUNTED, story_prompts, words
from moetrain.data.builtin.draws import pick
from moetrain.data.builtin.facts import held_out_pairs
from moetrain.data.builtin.operands import LARGEST_FACTOR, Numbers
from moetrain.data.builtin.phrases import Kind
from moetrain.data.builtin.probe import CHOICES, item

SLIPS = ((1, 10), (2, 10), (1, 2), (1, 20), (10, 20), (3, 10), (1, 4), (9, 10))


def items(count: int, seed: int) -> list[dict[str, Any]]:
    """Return `count` items with different prompts, multiple choice and open answer by turns."""
    random = Random(f"math items {seed}").random
    made: dict[str, dict[str, Any]] = {}
    while len(made) < count:
        kind = pick(random, phrases.SINGLE)
        choices = _choices(random, kind) if len(made) % 2 == 0 else ()
        answer = pick(random, choices or tuple(_facts(kind)))
        prompts = kind.asks if random() < 0.5 else story_prompts(kind)
        prompt = pick(random, prompts).format_map(words(random) | pick(random, _facts(kind)[answer]))
        if prompt not in made:
            made[prompt] = item("math", prompt, str(answer), tuple(map(str, choices)))
    return list(made.values())


def _choices(random: operands.Random, kind: Kind) -> tuple[int, ...]:
    """Return four ascending answers to held-out facts of the kind, of equal length."""
    answers = _facts(kind)
    while True:
        values = _products(random, tuple(answers)) if kind is phrases.PRODUCT else _lattice(random, max(answers))
        if len({len(str(value)) for value in values}) == 1 and all(value in answers for value in values):
            return values


def _lattice(random: operands.Random, largest: int) -> tuple[int, ...]:
    """Return a number, it with each of two slips (a digit off, a carry forgotten), and it with both."""
    small, large = pick(random, SLIPS)
    lowest = operands.between(random, COUNTED, largest)
    return lowest, lowest + small, lowest + large, lowest + small + large


def _products(random: operands.Random, products: tuple[int, ...]) -> tuple[int, ...]:
    """Return neighbours among products: the other numbers near a product are seldom products, which would tell."""
    start = operands.between(random, 0, len(products) - CHOICES)
    return products[start : start + CHOICES]


@functools.cache
def _facts(kind: Kind) -> dict[int, tuple[Numbers, ...]]:
    """Return the held-out facts of a kind as its numbers, by answer, answers ascending."""
    assert kind.family  # only kinds that rest on a single fact are asked about
    facts: dict[int, list[Numbers]] = {}
    for low, high in sorted(held_out_pairs(kind.family)):
        if kind.family == "multiplicative" and low > LARGEST_FACTOR:
            continue  # the training text multiplies and divides by small numbers alone
        for x, y in ((low, high), (high, low)):
            result = x + y if kind.family == "additive" else x * y
            inverse = kind in (phrases.DIFFERENCE, phrases.QUOTIENT)
            numbers = {"a": result, "b": x, "c": y} if inverse else {"a": x, "b": y, "c": result}
            facts.setdefault(numbers["c"], []).append(numbers)
    return {answer: tuple(facts[answer]) for answer in sorted(facts)}
