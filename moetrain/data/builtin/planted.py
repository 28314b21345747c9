"""What the planted domains share: facts of one form, documents that mark the answer, and probe items that ask for it.

A planted domain is a table of facts, drawn from the options and the seed alone: some are trained, the others are held
out and never stated. Its text writes numbers digit by digit and everything else alike, so that with a tokenizer that
splits digits every fact is equally many tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from moetrain.data.builtin.operands import Random, between

CHOICES = 4

Element = TypeVar("Element")


@dataclass(frozen=True)
class MarkedText:
    """A text whose answer is ``text[answer[0]:answer[1]]``; ``heldout`` where its source says whether it is."""

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
    """All facts of a planted domain, each part in a seeded order; ``wrong`` draws a wrong answer, perhaps the right."""

    trained: tuple[Fact, ...]
    held_out: tuple[Fact, ...]
    wrong: Callable[[Random, Fact], str]


def documents(table: Table, size: int) -> Iterator[MarkedText]:
    """Yield each trained fact once, ending before the table does where ``size`` bytes have been given."""
    given = 0
    for fact in table.trained:
        if given >= size:
            return
        marked = fact.marked(heldout=False)
        given += len(marked.text.encode())
        yield marked


def items(table: Table, count: int, *, domain: str, trained: bool, random: Random) -> list[dict[str, Any]]:
    """Return at most ``count`` items over the trained or the held-out facts.

    Each fact is asked twice, as multiple choice and then open, in two tasks: such a domain has few facts. The wrong
    choices come from the same distribution as the right one.
    """
    task = f"builtin_{domain}"
    suffix = "_trained" if trained else ""
    made: list[dict[str, Any]] = []
    for fact in (table.trained if trained else table.held_out)[: (count + 1) // 2]:
        identity = f"{task}-{hashlib.blake2b(fact.prompt.encode(), digest_size=8).hexdigest()}"
        choices = _choices(table, fact, random)
        asked = {"domain": domain, "prompt": fact.prompt, "sep": " "}
        right = choices.index(fact.answer)
        made.append({**asked, "task": task + suffix, "choices": choices, "answer": right, "id": identity})
        made.append({**asked, "task": f"{task}_open{suffix}", "target": fact.answer, "id": f"{identity}-open"})
    return made[:count]


def _choices(table: Table, fact: Fact, random: Random) -> list[str]:
    choices = [fact.answer]
    while len(choices) < CHOICES:
        wrong = table.wrong(random, fact)
        if wrong not in choices:
            choices.append(wrong)
    return shuffled(random, choices)


def any_of(answers: Sequence[str]) -> Callable[[Random, Fact], str]:
    """Return what draws a wrong answer from all answers, each as likely."""
    return lambda random, fact: answers[between(random, 0, len(answers) - 1)]


def shuffled(random: Random, elements: Sequence[Element]) -> list[Element]:
    """Return the elements in a random order, each order as likely."""
    # Not Random.shuffle: how that uses the stream may change between Python versions, random() may not.
    order = list(elements)
    for last in range(len(order) - 1, 0, -1):
        other = between(random, 0, last)
        order[last], order[other] = order[other], order[last]
    return order
