"""Documents of the math domain: single problems, several of them, and lists of exercises with or without an answer key.

Every number in them comes from `operands.draw`, so no document states or asks a held-out fact: a problem is safe by
itself, and the paragraphs of a document, like the lines of a list, are problems apart.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from moetrain.data.builtin import operands, phrases, phrases_steps
from moetrain.data.builtin.draws import pick, until
from moetrain.data.builtin.operands import Pattern
from moetrain.data.builtin.phrases import Kind
from moetrain.data.builtin.spelling import SPELLED

SHORTEST = 20  # characters
COUNTED = 2  # the least number in a story: its nouns are plurals


@dataclass(frozen=True)
class Form:
    """A pattern of numbers, the least operand, and texts that show it; `worded` ones take numbers spelled out."""

    pattern: Pattern
    low: int
    texts: tuple[str, ...]
    worded: tuple[str, ...] = ()


def documents(size: int, seed: int) -> Iterator[str]:
    """Return documents, until at least `size` bytes of UTF-8 are given. No short text comes twice."""
    random = Random(f"math {seed}").random
    return until(size, (_exercises(random) if random() < 0.2 else _problems(random) for _ in itertools.count()))


def story_prompts(kind: Kind) -> tuple[str, ...]:
    """Return the story questions of a kind in every frame after which the bare answer follows."""
    return tuple(frame.format(q=question) for question, _ in kind.stories for frame in phrases.ASKING)


def words(random: operands.Random) -> dict[str, str]:
    """Return who and what a story is about: different people, plural things."""
    half = len(phrases.NAMES) // 2
    return {
        "name": phrases.NAMES[int(random() * half)],
        "other": phrases.NAMES[half + int(random() * half)],
        "things": pick(random, phrases.THINGS),
        "holders": pick(random, phrases.HOLDERS),
        "place": pick(random, phrases.PLACES),
    }


def _problems(random: operands.Random) -> str:
    parts = [_problem(random) for _ in range(1 + int(5 * random() ** 3))]
    while len(text := "\n\n".join(parts)) < SHORTEST:
        parts.append(_problem(random))
    return text


def _problem(random: operands.Random) -> str:
    form = pick(random, FORMS)
    numbers = operands.draw(random, form.pattern, form.low)
    if form.worded and random() < 0.15 and max(numbers.values()) < len(SPELLED):
        return pick(random, form.worded).format_map({name: SPELLED[value] for name, value in numbers.items()})
    return pick(random, form.texts).format_map(words(random) | numbers)


def _exercises(random: operands.Random) -> str:
    """A title, which ends in a colon, and lines that each hold a problem; perhaps the answers apart."""
    title, forms = pick(random, LISTS)
    count = 3 + int(random() * 6) if random() < 0.85 else 9 + int(random() * 17)
    style = int(random() * 4)
    labels = [("", "- ", f"{'abcdefghijklmnopqrstuvwxyz'[place]}) ", f"{place + 1}. ")[style] for place in range(count)]
    mixed = random() < 0.5
    form = pick(random, forms)
    text = pick(random, form.texts)
    asked: list[str] = []
    answers: list[str] = []
    for label in labels:
        if mixed:
            form = pick(random, forms)
            text = pick(random, form.texts)
        numbers = operands.draw(random, form.pattern, form.low)
        asked.append(label + text.format_map(numbers))
        answers.append(str(numbers["c"]))
    if style >= 2 and random() < 0.3:
        key = [label + answer for label, answer in zip(labels, answers, strict=True)]
        return "\n".join([title, *asked, "", "Answers:", *key])
    return "\n".join([title, *(f"{ask} {answer}" for ask, answer in zip(asked, answers, strict=True))])


def _answered(asks: tuple[str, ...]) -> tuple[str, ...]:
    bare = tuple(ask + " {c}" for ask in asks)
    return bare + tuple(ask + " {c}." for ask in asks if ask[-1].isalpha())


def _bare(kind: Kind, low: int) -> Form:
    texts = _answered(kind.asks) + kind.tells
    symbols = set("+-×*÷/=>()")
    return Form(kind.pattern, low, texts, tuple(text for text in texts if low == 0 and not symbols & set(text)))


def _story(kind: Kind) -> Form:
    told = (
        frame.format(q=question, r=reply, w=kind.work) for question, reply in kind.stories for frame in phrases.TELLING
    )
    return Form(kind.pattern, COUNTED, tuple(prompt + " {c}" for prompt in story_prompts(kind)) + tuple(told))


def _forms() -> tuple[Form, ...]:
    """Return every form, the weightier ones several times."""
    forms: list[Form] = []
    for kind in phrases.SINGLE:
        forms += [_bare(kind, 0)] * 6 + [_story(kind)] * 6
    for kind in phrases_steps.STORIES:
        forms += [_bare(kind, COUNTED)] + [_story(kind)] * (2 if kind.stories else 0)
    for kind in phrases_steps.LEDGERS + phrases_steps.EXPLANATIONS + phrases_steps.MONEY_AND_TIME:
        forms += [_bare(kind, COUNTED)] * 2
    for kind in phrases_steps.ORDER + phrases_steps.UNITS:
        forms += [_bare(kind, COUNTED)]
    return tuple(forms)


def _lines(*kinds: Kind) -> tuple[Form, ...]:
    return tuple(Form(kind.pattern, 0, tuple(ask for ask in kind.asks if "\n" not in ask)) for kind in kinds)


FORMS = _forms()
LISTS = (
    ("Addition practice:", _lines(phrases.TOTAL)),
    ("Sums to learn:", _lines(phrases.TOTAL)),
    ("Subtraction practice:", _lines(phrases.DIFFERENCE)),
    ("Adding and taking away:", _lines(phrases.TOTAL, phrases.DIFFERENCE)),
    ("Times tables:", _lines(phrases.PRODUCT)),
    ("Multiplication practice:", _lines(phrases.PRODUCT)),
    ("Division practice:", _lines(phrases.QUOTIENT)),
    ("Multiply and divide:", _lines(phrases.PRODUCT, phrases.QUOTIENT)),
    ("Mixed exercises:", _lines(*phrases.SINGLE)),
    ("Worksheet:", _lines(*phrases.SINGLE)),
    ("Homework:", _lines(*phrases.SINGLE)),
)
