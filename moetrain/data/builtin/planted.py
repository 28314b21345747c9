"""What the planted domains share: tables of facts, documents that mark the answer, and probe items.

The table of a planted domain is a function of its options and the seed. Some of its facts are trained, the others are
held out and never stated. All facts of a domain have the same form and numbers of the same width, so that with a
tokenizer that splits digits every fact has the same number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from moetrain.data.builtin.draws import Random, pick, shuffled
from moetrain.data.builtin.probe import CHOICES, Item, item


@dataclass(frozen=True)
class MarkedText:
    """A text whose answer is ``text[answer[0]:answer[1]]``; ``heldout`` is set if the source decides about it."""

    text: str
    answer: tuple[int, int]
    heldout: bool | None = None


@dataclass(frozen=True)
class Fact:
    """A statement: the prompt, a space, the answer, and what may follow it."""

    prompt: str
    answer: str
    end: str = ""

    def marked(self, heldout: bool) -> MarkedText:
        start = len(self.prompt) + 1
        text = f"{self.prompt} {self.answer}{self.end}"
        return MarkedText(text, (start, start + len(self.answer)), heldout)


@dataclass(frozen=True)
class Table:
    """All facts of a planted domain, each part in a seeded order. ``wrong`` draws an answer, which may be right."""

    trained: tuple[Fact, ...]
    held_out: tuple[Fact, ...]
    wrong: Callable[[Random, Fact], str]


def documents(table: Table, size: int) -> Iterator[MarkedText]:
    """Yield each trained fact once, until ``size`` bytes have been yielded."""
    total = 0
    for fact in table.trained:
        if total >= size:
            return
        marked = fact.marked(heldout=False)
        total += len(marked.text.encode())
        yield marked


def items(table: Table, count: int, *, domain: str, trained: bool, random: Random) -> list[Item]:
    """Return at most ``count`` items over the trained or the held-out facts.

    Each fact is asked twice, as multiple choice and then open, in two tasks, because such a domain has few facts. Wrong
    choices are drawn from the same distribution as the right one.
    """
    suffix = "_trained" if trained else ""
    made: list[Item] = []
    for fact in (table.trained if trained else table.held_out)[: (count + 1) // 2]:
        for choices, ending in ((_choices(table, fact, random), ""), ((), "-open")):
            asked = item(domain, fact.prompt, fact.answer, choices)
            made.append(asked | {"task": asked["task"] + suffix, "id": asked["id"] + ending})
    return made[:count]


def _choices(table: Table, fact: Fact, random: Random) -> tuple[str, ...]:
    choices = [fact.answer]
    while len(choices) < CHOICES:
        wrong = table.wrong(random, fact)
        if wrong not in choices:
            choices.append(wrong)
    return tuple(shuffled(random, choices))


def any_of(answers: Sequence[str]) -> Callable[[Random, Fact], str]:
    """Return a function that draws a wrong answer uniformly from all answers."""
    return lambda random, fact: pick(random, answers)
