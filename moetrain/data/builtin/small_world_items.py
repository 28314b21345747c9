"""Probe items of the commonsense domain: held-out facts of a seed's world, asked in the words of its training text.

What they follow from stands in the training text of the same seed; the answer never stands in one document with who or
what is asked about, and no wrong choice does.
"""

import itertools
from collections.abc import Iterator

from moetrain.data.builtin.draws import shuffled
from moetrain.data.builtin.probe import Item, by_turns, item
from moetrain.data.builtin.small_world import Composed, World, world
from moetrain.data.builtin.small_world_text import NOBODY_HAS_TWO, asks

DOMAIN = "commonsense"
# Asked with an open answer only where there is a single right one.
SINGLE = (
    "works in",
    "found in",
    "owner's workplace",
    *(f"{side} grand{parent}" for side in ("maternal", "paternal") for parent in NOBODY_HAS_TWO[:2]),
)


def items(count: int, seed: int) -> list[Item]:
    """Return up to `count` items with different prompts, multiple choice and open answer by turns, while both last."""
    made = world(seed)
    return by_turns(count, _choosing(made, seed), _open(made, seed))


def _choosing(made: World, seed: int) -> Iterator[Item]:
    """Yield items in fours with the same choices, kinds of fact by turns."""
    kinds: dict[str, list[tuple[tuple[Composed, ...], int]]] = {}
    for four in made.fours:
        wordings = range(len(asks(four[0].fact)))
        kinds.setdefault(four[0].kind, []).extend((four, wording) for wording in wordings)
    turns = itertools.zip_longest(*(shuffled(asked, f"{seed}") for asked in kinds.values()))
    for four, wording in filter(None, itertools.chain.from_iterable(turns)):
        choices = shuffled((one.fact.value for one in four), f"{seed} {wording}")
        for one in four:
            yield item(DOMAIN, asks(one.fact)[wording], one.fact.value, choices)


def _open(made: World, seed: int) -> Iterator[Item]:
    facts = [one.fact for one in made.held_out if one.fact.relation in SINGLE]
    asked = ((fact, wording) for fact in facts for wording in range(len(asks(fact))))
    for fact, wording in shuffled(asked, f"{seed} open"):
        yield item(DOMAIN, asks(fact)[wording], fact.value)
