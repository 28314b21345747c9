"""The math domain: single problems, several of them, and lists of exercises with or without an answer key.

Every number of a document comes from `operands.draw`, so no problem states or asks for a held-out fact. The probe items
ask for held-out facts in the words of the training text.
"""

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random as Stream

from moetrain.data.builtin import operands, phrases
from moetrain.data.builtin.arithmetic_facts import held_out_pairs
from moetrain.data.builtin.draws import Random, between, pick, take_bytes, word_list
from moetrain.data.builtin.operands import LARGEST_FACTOR, Numbers, Pattern
from moetrain.data.builtin.phrases import Kind
from moetrain.data.builtin.probe import CHOICES, Item, item

SHORTEST = 20  # characters of a document
COUNTED = 2  # smallest number in a story, whose nouns are plurals
SLIPS = ((1, 10), (2, 10), (1, 2), (1, 20), (10, 20), (3, 10), (1, 4), (9, 10))

ONES = word_list("zero one two three four five six seven eight nine")
TEENS = word_list("ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen")
TENS = word_list("twenty thirty forty fifty sixty seventy eighty ninety")
BELOW_100 = (*ONES, *TEENS, *(ten + (f"-{one}" if digit else "") for ten in TENS for digit, one in enumerate(ONES)))
SPELLED = (  # 0 to 999 in words
    *BELOW_100,
    *(f"{one} hundred" + (f" {rest}" if low else "") for one in ONES[1:] for low, rest in enumerate(BELOW_100)),
)


@dataclass(frozen=True)
class Form:
    """A pattern of numbers, the smallest operand, and texts that show them; `worded` ones take numbers in words."""

    pattern: Pattern
    low: int
    texts: tuple[str, ...]
    worded: tuple[str, ...] = ()


def documents(size: int, seed: int) -> Iterator[str]:
    """Yield documents until at least `size` bytes of UTF-8 have been yielded. Short texts are not repeated."""
    random = Stream(f"math {seed}").random
    return take_bytes(size, (_exercises(random) if random() < 0.2 else _problems(random) for _ in itertools.count()))


def story_prompts(kind: Kind) -> tuple[str, ...]:
    """Return the story questions of a kind in every frame after which the bare answer follows."""
    return tuple(frame.format(q=question) for question, _ in kind.stories for frame in phrases.ASKING)


def words(random: Random) -> dict[str, str]:
    """Draw the names and things of a story: two different people, plural things."""
    half = len(phrases.NAMES) // 2
    return {
        "name": phrases.NAMES[int(random() * half)],
        "other": phrases.NAMES[half + int(random() * half)],
        "things": pick(random, phrases.THINGS),
        "holders": pick(random, phrases.HOLDERS),
        "place": pick(random, phrases.PLACES),
    }


def _problems(random: Random) -> str:
    parts = [_problem(random) for _ in range(1 + int(5 * random() ** 3))]
    while len(text := "\n\n".join(parts)) < SHORTEST:
        parts.append(_problem(random))
    return text


def _problem(random: Random) -> str:
    form = pick(random, FORMS)
    numbers = operands.draw(random, form.pattern, form.low)
    if form.worded and random() < 0.15 and max(numbers.values()) < len(SPELLED):
        return pick(random, form.worded).format_map({name: SPELLED[value] for name, value in numbers.items()})
    return pick(random, form.texts).format_map(words(random) | numbers)


def _exercises(random: Random) -> str:
    """A title that ends in a colon, and lines that each hold a problem; the answers may be listed at the end."""
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


def _bare(kind: Kind, low: int) -> Form:
    asked = tuple(ask + " {c}" for ask in kind.asks) + tuple(ask + " {c}." for ask in kind.asks if ask[-1].isalpha())
    texts = asked + kind.tells
    symbols = set("+-×*÷/=>()")
    return Form(kind.pattern, low, texts, tuple(text for text in texts if low == 0 and not symbols & set(text)))


def _story(kind: Kind) -> Form:
    told = (
        frame.format(q=question, r=reply, w=kind.work) for question, reply in kind.stories for frame in phrases.TELLING
    )
    return Form(kind.pattern, COUNTED, tuple(prompt + " {c}" for prompt in story_prompts(kind)) + tuple(told))


def _forms() -> tuple[Form, ...]:
    """Return every form, as many times as it has weight."""
    forms: list[Form] = []
    for kind in phrases.SINGLE:
        forms += [_bare(kind, 0)] * 6 + [_story(kind)] * 6
    for kind in phrases.GROUPS["stories"]:
        forms += [_bare(kind, COUNTED)] + [_story(kind)] * (2 if kind.stories else 0)
    for group, weight in (("ledgers", 2), ("explanations", 2), ("money_and_time", 2), ("order", 1), ("units", 1)):
        for kind in phrases.GROUPS[group]:
            forms += [_bare(kind, COUNTED)] * weight
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
    *((title, _lines(*phrases.SINGLE)) for title in ("Mixed exercises:", "Worksheet:", "Homework:")),
)


# Probe items. The four choices are drawn first: close to each other, of equal length, and each the answer of some
# held-out fact; then one of them is asked for. So each is right equally often, given the choices.


def items(count: int, seed: int) -> list[Item]:
    """Return `count` items with distinct prompts, alternately multiple choice and open."""
    random = Stream(f"math items {seed}").random
    made: dict[str, Item] = {}
    while len(made) < count:
        kind = pick(random, phrases.SINGLE)
        choices = _choices(random, kind) if len(made) % 2 == 0 else ()
        answer = pick(random, choices or tuple(_held_out(kind)))
        prompts = kind.asks if random() < 0.5 else story_prompts(kind)
        prompt = pick(random, prompts).format_map(words(random) | pick(random, _held_out(kind)[answer]))
        if prompt not in made:
            made[prompt] = item("math", prompt, str(answer), tuple(map(str, choices)))
    return list(made.values())


def _choices(random: Random, kind: Kind) -> tuple[int, ...]:
    """Return four ascending answers of held-out facts of the kind, of equal length."""
    answers = _held_out(kind)
    while True:
        values = _neighbours(random, tuple(answers)) if kind is phrases.PRODUCT else _with_slips(random, max(answers))
        if len({len(str(value)) for value in values}) == 1 and all(value in answers for value in values):
            return values


def _with_slips(random: Random, largest: int) -> tuple[int, ...]:
    """Return a number, it with each of two slips (a digit off, a carry forgotten), and it with both."""
    small, large = pick(random, SLIPS)
    lowest = between(random, COUNTED, largest)
    return lowest, lowest + small, lowest + large, lowest + small + large


def _neighbours(random: Random, products: tuple[int, ...]) -> tuple[int, ...]:
    """Return neighbours among the products, since most other numbers close to a product are no products."""
    start = between(random, 0, len(products) - CHOICES)
    return products[start : start + CHOICES]


@functools.cache
def _held_out(kind: Kind) -> dict[int, tuple[Numbers, ...]]:
    """Return the numbers of the held-out facts of a kind by answer, answers ascending."""
    assert kind.family  # only kinds that rest on a single fact are asked about
    facts: dict[int, list[Numbers]] = {}
    for low, high in sorted(held_out_pairs(kind.family)):
        if kind.family == "multiplicative" and low > LARGEST_FACTOR:
            continue  # the training text only multiplies and divides by small numbers
        for x, y in ((low, high), (high, low)):
            result = x + y if kind.family == "additive" else x * y
            inverse = kind in (phrases.DIFFERENCE, phrases.QUOTIENT)
            numbers = {"a": result, "b": x, "c": y} if inverse else {"a": x, "b": y, "c": result}
            facts.setdefault(numbers["c"], []).append(numbers)
    return {answer: tuple(facts[answer]) for answer in sorted(facts)}
