"""Probe items in the form of the benchmark files, and fours of facts for multiple choice that only the fact can solve.

Each fact of a four is asked with the answers of all four as its choices, so every choice is right equally often:
whatever goes by the choices alone (how often the training text has them, length, place, likeness to one another) is
right exactly once in four.
"""

import hashlib
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

CHOICES = 4

Fact = TypeVar("Fact")
Item = dict[str, Any]


def item(domain: str, prompt: str, answer: str, choices: tuple[str, ...] = ()) -> Item:
    """Return an item, multiple choice where there are choices, else one with an open answer."""
    identity = f"builtin_{domain}-{hashlib.blake2b(prompt.encode(), digest_size=8).hexdigest()}"
    made: Item = {"domain": domain, "task": f"builtin_{domain}", "prompt": prompt}
    if choices:
        made |= {"choices": list(choices), "answer": choices.index(answer)}
    else:
        made |= {"task": f"builtin_{domain}_open", "target": answer}
    return made | {"sep": " ", "id": identity}


def fours(facts: Iterable[Fact], fit: Callable[[Fact, Fact], bool]) -> list[tuple[Fact, ...]]:
    """Return fours of facts that fit each other, filled in the order given. What is left over is left out."""
    groups: list[list[Fact]] = []
    for fact in facts:
        for group in groups:
            if len(group) < CHOICES and all(fit(fact, other) for other in group):
                group.append(fact)
                break
        else:
            groups.append([fact])
    return [tuple(group) for group in groups if len(group) == CHOICES]


def by_turns(count: int, choosing: Iterable[Item], open_answer: Iterable[Item]) -> list[Item]:
    """Return up to `count` items with different prompts, by turns from both, then from the one that still has some."""
    made: dict[str, Item] = {}
    sources = [iter(choosing), iter(open_answer)]
    while sources and len(made) < count:
        source = sources.pop(0)
        fresh = next((one for one in source if one["prompt"] not in made), None)
        if fresh is not None:
            made[fresh["prompt"]] = fresh
            sources.append(source)
    return list(made.values())
