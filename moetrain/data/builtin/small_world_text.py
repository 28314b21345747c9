"""The commonsense domain: facts of the small world in plain English, alone, in lists and in chains of reasoning.

A document is a page. A page refuses a line if one of its names may not share a document with a name on the page. All
text is added to a page, so no wording can state a held-out fact. The probe items ask for held-out facts in the words of
the training text, and all they follow from is stated in the training text of the same seed.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from random import Random as Stream

from moetrain.data.builtin.draws import Random, between, hash_order, pick, take_bytes
from moetrain.data.builtin.probe import Item, alternate, item
from moetrain.data.builtin.small_world import Composed, Fact, World, world

# {a} is the subject, {b} the value. {r} is the relation of kin, {an} its article, {one} "the" if nobody has two.
KIN_ASKS = ("{a}'s {r} is", "{one} {r} of {a} is", "Who is {one} {r} of {a}?", "Q: Who is {one} {r} of {a}?\nA:")
KIN_TELLS = ("{b} is {one} {r} of {a}.", "{b} is {a}'s {r}.", "{a} has {an} {r} named {b}.", "{a} has {b} as {an} {r}.")
ASKS: dict[str, tuple[str, ...]] = {  # the value follows after a space
    "town": ("{a} lives in", "Where does {a} live? In", "Q: In which town does {a} live?\nA:"),
    "job": ("{a} earns a living as", "What is the trade of {a}? That of", "Q: What does {a} do for a living?\nA:"),
    "workplace": ("{a} works at", "Where does {a} work? At", "Q: Where does {a} go to work?\nA:"),
    "stands": ("{a} stands in", "Where is {a}? In", "Q: In which town is {a}?\nA:"),
    "owner": ("{a} belongs to", "the owner of {a} is", "Who owns {a}?", "Q: Whose is {a}?\nA:"),
    "kept": ("{a} is kept in", "Where is {a} kept? In", "Q: In which building is {a}?\nA:"),
    "neighbour": ("{a} lives in the same town as", "Who lives in the same town as {a}?", "Q: Who lives near {a}?\nA:"),
    "works in": ("{a} goes to work in", "In which town does {a} work?", "Q: To which town does {a} go to work?\nA:"),
    "found in": ("{a} can be found in", "In which town can {a} be found?", "Q: Which town is {a} kept in?\nA:"),
    "owner's workplace": ("the owner of {a} works at", "Where does the owner of {a} work? At"),
}
TELLS: dict[str, tuple[str, ...]] = {
    "town": ("{a} has a house in {b}.", "in {b} lives {a}.", "{b} is the home town of {a}."),
    "job": ("{a} was trained as {b}.", "the trade of {a} is that of {b}."),
    "workplace": ("{a} has a job at {b}.", "at {b} works {a}.", "{b} employs {a}."),
    "stands": ("{a} is a building in {b}.", "{b} is the town of {a}.", "in {b} stands {a}."),
    "owner": ("{b} owns {a}.", "{b} is the owner of {a}."),
    "kept": ("{b} houses {a}.", "in {b} lies {a}.", "{a} lies in {b}."),
    "neighbour": ("{a} and {b} live in the same town.", "{a} and {b} share a home town.", "{a} lives near {b}."),
    "works in": ("{b} is where {a} goes to work.", "{a} has to travel to {b} for work."),
    "found in": ("{a} is somewhere in {b}.", "{b} is the town where {a} can be found."),
    "owner's workplace": ("{b} employs the owner of {a}.", "whoever owns {a} works at {b}."),
}
NOBODY_HAS_TWO = ("mother", "father", "wife", "husband")
SO = ("{steps}, so {end}.", "{steps}. So {end}.", "{steps}. Therefore {end}.", "since {steps}, {end}.")
TITLES = {
    "town": "People who live in {}:",
    "workplace": "Who works at {}:",
    "stands": "Buildings of {}:",
    "owner": "Things that {} owns:",
    "kept": "Kept in {}:",
    "mother": "The children of {}:",
    "father": "The children of {}:",
}


class Page:
    """A document being written: its lines and the names in them."""

    def __init__(self, separated: dict[str, set[str]]) -> None:
        self.separated = separated
        self.lines: list[str] = []
        self.names: set[str] = set()

    def add(self, line: str, *names: str) -> None:
        """Add a line if its names may share a document with those on the page."""
        together = self.names.union(names)
        if all(together.isdisjoint(self.separated.get(name, ())) for name in names):
            self.names = together
            self.lines.append(upper(line))


class StatedFacts:
    """The facts that the training text may state, atomic and composed, grouped as the layouts need them."""

    def __init__(self, made: World) -> None:
        kinds: dict[str, list[Fact]] = {}
        known: dict[str, list[Fact]] = {name: [] for name in made.people}
        groups: dict[tuple[str, str], list[str]] = {}
        alike = {"daughter": "child", "son": "child", "mother": "parent", "father": "parent"}
        pairs = [(alike.get(fact.relation, fact.relation), fact) for fact in made.atomic]
        for kind, fact in pairs + [(one.kind, one.fact) for one in made.stated]:
            kinds.setdefault(kind, []).append(fact)
            if fact.subject in known:
                known[fact.subject].append(fact)
        for fact in made.atomic:
            if fact.relation in TITLES:
                groups.setdefault((fact.relation, fact.value), []).append(fact.subject)
        self.by_kind = tuple(tuple(facts) for facts in kinds.values())  # kinds are equally likely
        self.known = tuple((person, tuple(known[person.name])) for person in made.people.values())
        self.groups = tuple((*group, tuple(members)) for group, members in groups.items())
        reasons: dict[str, list[Composed]] = {}
        for one in made.stated:
            reasons.setdefault(one.kind, []).append(one)
        self.reasons = tuple(tuple(ones) for ones in reasons.values())


def documents(size: int, seed: int) -> Iterator[str]:
    """Yield documents until at least `size` bytes of UTF-8 have been yielded. Short texts are not repeated."""
    made = world(seed)
    return take_bytes(size, _texts(Stream(f"commonsense {seed}").random, StatedFacts(made), made.separated))


def asks(fact: Fact) -> tuple[str, ...]:
    """Return the ways to ask for the value of a fact; the value follows after a space."""
    return tuple(upper(ask.format(a=fact.subject)) for ask in _asks(fact.relation))


def upper(text: str) -> str:
    """Return the text with its first letter upper case."""
    return text[0].upper() + text[1:]


def _texts(random: Random, facts: StatedFacts, separated: dict[str, set[str]]) -> Iterator[str]:
    for _ in itertools.count():
        page = Page(separated)
        joint = pick(random, LAYOUTS)(random, facts, page)
        if page.lines:
            yield joint.join(page.lines)


def _statements(random: Random, facts: StatedFacts, page: Page) -> str:
    """A few unrelated facts."""
    for _ in range(between(random, 1, 6)):
        fact = pick(random, pick(random, facts.by_kind))
        page.add(_filled(fact, pick(random, _tells(fact.relation))), fact.subject, fact.value)
    return pick(random, (" ", "\n", "\n\n"))


def _questions(random: Random, facts: StatedFacts, page: Page) -> str:
    """Questions with their answers, some of the same kind."""
    kind = pick(random, facts.by_kind)
    for _ in range(between(random, 1, 5)):
        fact = pick(random, kind)
        page.add(_filled(fact, pick(random, _asks(fact.relation)) + " {b}"), fact.subject, fact.value)
        if random() < 0.5:
            kind = pick(random, facts.by_kind)
    return "\n"


def _reasons(random: Random, facts: StatedFacts, page: Page) -> str:
    """Composed facts, each with the facts it follows from."""
    for _ in range(between(random, 1, 3)):
        one = pick(random, pick(random, facts.reasons))
        chain = (*one.steps, one.fact)
        *steps, end = (_filled(fact, pick(random, _tells(fact.relation))).removesuffix(".") for fact in chain)
        line = pick(random, SO).format(steps=", ".join(steps[:-1]) + f" and {steps[-1]}", end=end)
        page.add(line, *(fact.subject for fact in chain), *(fact.value for fact in chain))
    return pick(random, ("\n", "\n\n"))


def _portrait(random: Random, facts: StatedFacts, page: Page) -> str:
    """Facts about a person, by name in the first sentence, then as she or he."""
    person, known = pick(random, facts.known)
    she, her = ("She", "Her") if person.gender == "female" else ("He", "His")
    for fact in {pick(random, known): None for _ in range(between(random, 3, 7))}:
        text = _filled(fact, pick(random, _about(fact.relation)))
        if page.lines:
            rest = text.removeprefix(person.name)
            text = her + rest.removeprefix("'s") if rest.startswith("'s ") else she + rest
        page.add(text, fact.subject, fact.value)
    return " "


def _list(random: Random, facts: StatedFacts, page: Page) -> str:
    """All with the same value: people of a town, things in a building, children of a parent."""
    relation, value, members = pick(random, facts.groups)
    page.add(TITLES[relation].format(value), value)
    start = int(random() * len(members))
    for member in (members[start:] + members[:start])[: between(random, 2, 8)]:
        page.add(f"- {member}", member)
    if len(page.lines) == 1:
        page.lines.clear()  # no member may share a page with the title
    return "\n"


Layout = Callable[[Random, StatedFacts, Page], str]  # fills the page and returns the separator of its lines
LAYOUTS: tuple[Layout, ...] = (*[_statements] * 3, *[_questions] * 2, _reasons, _portrait, _list)


def _filled(fact: Fact, form: str) -> str:
    value = f"{_article(fact.value)} {fact.value}" if fact.relation == "job" else fact.value
    return form.format(a=fact.subject, b=value)


@functools.cache
def _asks(relation: str) -> tuple[str, ...]:
    return ASKS.get(relation) or _kin(relation, KIN_ASKS)


@functools.cache
def _tells(relation: str) -> tuple[str, ...]:
    """Return the statements of a relation: those in the tables, and the questions that are beginnings of statements."""
    begun = tuple(ask + " {b}." for ask in _asks(relation) if "?" not in ask)
    return begun + (TELLS.get(relation) or _kin(relation, KIN_TELLS))


@functools.cache
def _about(relation: str) -> tuple[str, ...]:
    """Return the statements that stay clear with a pronoun for the subject."""
    return tuple(form for form in _tells(relation) if form.startswith(("{a} ", "{a}'s")) and "{a} and" not in form)


def _kin(relation: str, forms: tuple[str, ...]) -> tuple[str, ...]:
    one = "the" if relation in NOBODY_HAS_TWO or " " in relation else _article(relation)
    return tuple(form.format(a="{a}", b="{b}", r=relation, one=one, an=_article(relation)) for form in forms)


def _article(noun: str) -> str:
    return "an" if noun[0] in "aeiou" else "a"


# Probe items. The answer shares no document with the subject of the question, and no wrong choice does.

# Asked with an open answer only if a single answer is right.
SINGLE = (
    "works in",
    "found in",
    "owner's workplace",
    *(f"{side} grand{parent}" for side in ("maternal", "paternal") for parent in NOBODY_HAS_TWO[:2]),
)


def items(count: int, seed: int) -> list[Item]:
    """Return up to `count` items with distinct prompts, alternately multiple choice and open while both last."""
    made = world(seed)
    return alternate(count, _choosing(made, seed), _open(made, seed))


def _choosing(made: World, seed: int) -> Iterator[Item]:
    """Yield items, four at a time with the same choices, and alternate between kinds of fact."""
    kinds: dict[str, list[tuple[tuple[Composed, ...], int]]] = {}
    for four in made.fours:
        wordings = range(len(asks(four[0].fact)))
        kinds.setdefault(four[0].kind, []).extend((four, wording) for wording in wordings)
    turns = itertools.zip_longest(*(hash_order(asked, f"{seed}") for asked in kinds.values()))
    for four, wording in filter(None, itertools.chain.from_iterable(turns)):
        choices = hash_order((one.fact.value for one in four), f"{seed} {wording}")
        for one in four:
            yield item("commonsense", asks(one.fact)[wording], one.fact.value, choices)


def _open(made: World, seed: int) -> Iterator[Item]:
    facts = [one.fact for one in made.held_out if one.fact.relation in SINGLE]
    asked = ((fact, wording) for fact in facts for wording in range(len(asks(fact))))
    for fact, wording in hash_order(asked, f"{seed} open"):
        yield item("commonsense", asks(fact)[wording], fact.value)
