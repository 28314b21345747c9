"""Probe items of the built-in domains, in the form of the benchmark files.

Multiple-choice items are built from groups of four facts. Each fact of a group is asked with the answers of all four
as choices, so that every choice is right equally often. A baseline that looks only at the choices (their frequency in
the training text, length, position or similarity) is therefore right exactly once in four.
"""

import hashlib
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

CHOICES = 4

Fact = TypeVar("Fact")
Item = dict[str, Any]


def item(domain: str, prompt: str, answer: str, choices: tuple[str, ...] = ()) -> Item:
    """Return an item: multiple choice if there are choices, else with an open answer."""
    identity = f"builtin_{domain}-{hashlib.blake2b(prompt.encode(), digest_size=8).hexdigest()}"
    made: Item = {"domain": domain, "task": f"builtin_{domain}", "prompt": prompt}
    if choices:
        made |= {"choices": list(choices), "answer": choices.index(answer)}
    else:
        made |= {"task": f"builtin_{domain}_open", "target": answer}
    return made | {"sep": " ", "id": identity}


def groups_of_four(facts: Iterable[Fact], fit: Callable[[Fact, Fact], bool]) -> list[tuple[Fact, ...]]:
    """Return groups of four facts that all fit each other, filled in the given order. Incomplete groups are dropped."""
    groups: list[list[Fact]] = []
    for fact in facts:
        for group in groups:
            if len(group) < CHOICES and all(fit(fact, other) for other in group):
                group.append(fact)
                break
        else:
            groups.append([fact])
    return [tuple(group) for group in groups if len(group) == CHOICES]


def alternate(count: int, choosing: Iterable[Item], open_answer: Iterable[Item]) -> list[Item]:
    """Return up to `count` items with distinct prompts, alternately from both sources while both have some."""
    made: dict[str, Item] = {}
    sources = [iter(choosing), iter(open_answer)]
    while sources and len(made) < count:
        source = sources.pop(0)
        fresh = next((one for one in source if one["prompt"] not in made), None)
        if fresh is not None:
            made[fresh["prompt"]] = fresh
            sources.append(source)
    return list(made.values())
