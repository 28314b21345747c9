"""The words of the math domain: names, frames around a question, and the sentences of phrases.txt."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from moetrain.data.builtin import operands
from moetrain.data.builtin.arithmetic_facts import Family
from moetrain.data.builtin.draws import word_list
from moetrain.data.builtin.operands import Pattern

NAMES = word_list(
    "Ada Ben Clara Dan Elif Farid Grace Hugo Ines Jonas Kofi Lena Mia Noor Omar Priya Quinn Rosa Sam Tara Uma "
    "Victor Wen Ximena Yusuf Zoe Anton Bella Carlos Dina Emil Fiona Goran Hana Ivan Julia Kenji Lucia Marta Nils"
)
THINGS = word_list(
    "apples pears plums oranges lemons cherries nuts eggs cookies muffins candles pencils erasers notebooks "
    "stickers stamps coins marbles buttons beads shells stones leaves flowers seeds cards tickets photos books "
    "magazines bricks tiles nails screws bottles cups plates spoons socks ribbons balloons kites toys blocks "
    "badges postcards"
)
HOLDERS = word_list("boxes bags baskets crates jars trays drawers shelves packets tins sacks folders cartons cases")
PLACES = word_list("park school library market station museum bakery harbour bridge lake farm cinema")

UNITS = (  # how many of the smaller unit make one of the larger
    (7, "weeks", "days"),
    (12, "dozen", "pieces"),
    (12, "years", "months"),
    (24, "days", "hours"),
    (60, "hours", "minutes"),
    (60, "minutes", "seconds"),
    (10, "cm", "mm"),
    (100, "metres", "cm"),
    (1000, "km", "metres"),
)

# Frames around a story: {q} is its question, {r} its reply, {w} the worked steps. The bare answer follows after ASKING.
ASKING = (
    "Question: {q}\nAnswer:",
    "Q: {q}\nA:",
    "{q} The answer is",
    "{q}\nAnswer:",
    "Problem: {q}\nResult:",
    "Exercise. {q}\nSolution:",
)
TELLING = (
    "{q} {r}",
    "{q}\n{r}",
    "Question: {q}\nAnswer: {r}",
    "Q: {q}\nA: {r}",
    "Problem: {q}\nSolution: {w}. {r}",
    "{q}\nWork: {w}\nAnswer: {{c}}",
    "{q} To find out, we compute {w}. {r}",
    "Exercise. {q}\nSteps: {w}.\n{r}",
    "{q}\nLet us work it out: {w}. So the answer is {{c}}.",
)


@dataclass(frozen=True)
class Kind:
    """A kind of problem; the fields are described in phrases.txt."""

    pattern: Pattern
    work: str = ""
    asks: tuple[str, ...] = ()
    tells: tuple[str, ...] = ()
    stories: tuple[tuple[str, str], ...] = ()
    family: Family | None = None  # set if it rests on a single fact, so that it can be held out and probed


def _kinds(text: str) -> Iterator[Kind]:
    """The kinds of a group in phrases.txt, after its first line."""
    for block in text.split("\nkind ")[1:]:
        head, *lines = block.strip("\n").split("\n")
        name, _, family = head.partition(" ")
        by_key: dict[str, list[str]] = {"work": [], "ask": [], "tell": [], "story": []}
        for line in lines:
            key, _, sentence = line.partition(" ")
            by_key[key].append(sentence.replace("\\n", "\n"))
        yield Kind(
            pattern=getattr(operands, name),
            work="".join(by_key["work"]),
            asks=tuple(by_key["ask"]),
            tells=tuple(by_key["tell"]),
            stories=tuple((question, reply) for question, _, reply in (s.partition(" => ") for s in by_key["story"])),
            family=cast("Family | None", family or None),
        )


def _units() -> Iterator[Kind]:
    for factor, many, few in UNITS:
        yield Kind(
            operands.times(factor),
            asks=(f"Question: How many {few} are in {{a}} {many}?\nAnswer:", f"{{a}} {many} in {few}:"),
            tells=(
                f"{{a}} {many} = {{c}} {few}",
                f"{{c}} {few} make {{a}} {many}.",
                f"To turn {{a}} {many} into {few}, multiply by {{k}}: {{a}} × {{k}} = {{c}}.",
            ),
        )


_SENTENCES = Path(__file__).with_name("phrases.txt").read_text(encoding="utf-8").split("\ngroup ")[1:]
GROUPS = {group.partition("\n")[0]: tuple(_kinds(group)) for group in _SENTENCES}
GROUPS["units"] = (*_units(), *GROUPS["units"])
SINGLE = TOTAL, DIFFERENCE, PRODUCT, QUOTIENT = GROUPS["single"]
