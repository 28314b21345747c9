"""A small world as a function of the seed: families, towns, things, what follows from them, and what is held out.

All atomic facts (who is whose mother, where someone lives, where a thing is kept) are stated in the training text. A
composed fact follows from two or three of them (a grandmother, a cousin, the town where a thing is kept). One composed
fact in eight is held out, chosen by a hash of its kind and its two names in either order, the same for every seed.

No document holds both names of a held-out fact. So no wording can state it, in either direction, and a reader of the
text can check that without knowing the wording. The same is true of the two names of a wrong choice. Otherwise the
right choice would be the only one that never occurs together with the subject of the question.
"""

import functools
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from random import Random as Stream
from typing import Literal

from moetrain.data.builtin.draws import Random, digest, hash_order, pick, word_list
from moetrain.data.builtin.probe import groups_of_four

Gender = Literal["female", "male"]

ONE_IN = 8
COUPLES = 30  # in the first generation
GENERATIONS = 4
OBJECTS = 150
FAR = 4  # steps from parent to child or between spouses: up to a cousin


GIVEN: dict[Gender, tuple[str, ...]] = {
    "female": word_list(
        "Ada Alma Bella Berta Clara Cora Dina Edith Ella Elsa Emma Fiona Freya Gerda Grace Hana Hazel Helen Ines Iris "
        "Ivy Jana Joan Julia Karin Lena Lily Lucia Mabel Marta Maud Mia Nell Nina Nora Olga Petra Priya Rita Rosa "
        "Ruth Selma Tara Tilda Uma Vera Wanda Zelda Zoe Zora"
    ),
    "male": word_list(
        "Abel Adam Anton Ben Boris Carl Cyril Dan David Edgar Elif Emil Felix Frank Fred Goran Gus Hans Harry Hugo "
        "Igor Ivan Jack Jonas Karl Kenji Kofi Leo Louis Max Milo Nils Noah Omar Oscar Otto Paul Pedro Ralph Rolf Sam "
        "Simon Theo Tom Ugo Victor Walter Wen Yusuf Zeno"
    ),
}
SURNAMES = word_list(
    "Abbot Archer Ashby Barlow Bishop Brook Carver Cole Cooper Dale Draper Ellis Falk Fisher Fletcher Frost "
    "Garner Glover Hale Harper Holt Hunter Kemp Lang Marsh Mason Miller Moss Nash North Page Parker Porter Reed "
    "Rowe Sawyer Shaw Stone Turner Vance Ward Wells West Wood"
)
TOWNS = word_list(
    "Ashford Belmont Carden Dunmore Elmstead Farley Garston Hadley Inverley Kelby Langton Marlow Norwick Oakham "
    "Penrith Quarley Redcliff Selby Thornbury Upton Westow Yarrow"
)
COLOURS = word_list("Amber Blue Copper Green Grey Ivory Red Silver White Golden")
PLACES = word_list("Mill Bakery School Library Clinic Inn Forge Dairy Market Museum Theatre Warehouse")
MATERIALS = word_list("brass wooden silver leather glass iron painted velvet striped paper carved golden")
THINGS = word_list("key clock lamp kettle violin globe chest mirror drum vase compass basket ladder flute")
JOBS = word_list(
    "baker teacher nurse smith weaver gardener clerk painter tailor cook driver farmer lawyer printer plumber "
    "potter roofer singer surgeon translator"
)


@dataclass(frozen=True)
class Person:
    """A person. The surname does not depend on the family, or it would give answers away."""

    name: str
    gender: Gender
    generation: int
    parents: tuple[str, ...]  # mother, father; empty in the first generation
    town: str
    job: str = ""
    workplace: str = ""


@dataclass(frozen=True)
class Fact:
    """`value` is the `relation` of `subject`: ("mother", "Ben Holt", "Ada Moss")."""

    relation: str
    subject: str
    value: str


@dataclass(frozen=True)
class Composed:
    """A fact that follows from atomic facts, its steps in order, and its kind, which both directions share."""

    fact: Fact
    kind: str
    steps: tuple[Fact, ...]

    @property
    def held_out(self) -> bool:
        """The same for every seed, and for both directions of the fact."""
        names = sorted((self.fact.subject, self.fact.value))
        return digest(f"{self.kind} {names[0]} {names[1]}") % ONE_IN == 0


@dataclass
class World:
    """Everything in the world by name, and what the training text states."""

    people: dict[str, Person] = field(default_factory=dict)
    spouses: dict[str, str] = field(default_factory=dict)
    children: dict[str, list[str]] = field(default_factory=dict)
    stands: dict[str, str] = field(default_factory=dict)  # place to town
    owner: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)  # object to place
    atomic: tuple[Fact, ...] = ()
    stated: tuple[Composed, ...] = ()  # composed facts of the training text
    held_out: tuple[Composed, ...] = ()
    fours: tuple[tuple[Composed, ...], ...] = ()  # held-out facts that have each other's answers as choices
    separated: dict[str, set[str]] = field(default_factory=dict)  # by name, the names that share no document with it


@functools.lru_cache(maxsize=4)
def world(seed: int) -> World:
    """Return the world of a seed."""
    random = Stream(f"small world {seed}").random
    made = World()
    _places(made, random)
    _families(made, random, seed)
    _objects(made, random, seed)
    made.atomic = tuple(_atomic(made))
    atomic = {frozenset((fact.subject, fact.value)) for fact in made.atomic}
    composed = [one for one in _composed(made) if frozenset((one.fact.subject, one.fact.value)) not in atomic]
    made.stated = tuple(one for one in composed if not one.held_out)
    made.held_out = hash_order((one for one in composed if one.held_out), "")
    _separate(made, composed)
    return made


def _places(made: World, random: Random) -> None:
    names = hash_order((f"the {colour} {kind}" for colour in COLOURS for kind in PLACES), f"{random()}")
    made.stands = {name: TOWNS[place % len(TOWNS)] for place, name in enumerate(names[: 3 * len(TOWNS)])}


def _families(made: World, random: Random, seed: int) -> None:
    names: dict[Gender, Iterator[str]] = {
        gender: iter(hash_order((f"{given} {surname}" for given in GIVEN[gender] for surname in SURNAMES), f"{seed}"))
        for gender in GIVEN
    }

    def born(gender: Gender, generation: int, parents: tuple[str, ...]) -> Person:
        grown = generation < GENERATIONS - 1
        job, workplace = (pick(random, JOBS), pick(random, tuple(made.stands))) if grown else ("", "")
        person = Person(next(names[gender]), gender, generation, parents, pick(random, TOWNS), job, workplace)
        made.people[person.name] = person
        return person

    couples = [(born("female", 0, ()), born("male", 0, ())) for _ in range(COUPLES)]
    for generation in range(1, GENERATIONS):
        children: list[Person] = []
        for wife, husband in couples:
            made.spouses[wife.name], made.spouses[husband.name] = husband.name, wife.name
            parents = wife.name, husband.name
            siblings = [
                born(pick(random, ("female", "male")), generation, parents) for _ in range(2 + (random() < 0.4))
            ]
            made.children[wife.name] = made.children[husband.name] = [child.name for child in siblings]
            children += siblings
        couples = list(_couples(made, children)) if generation < GENERATIONS - 1 else []


def _couples(made: World, grown: list[Person]) -> Iterator[tuple[Person, Person]]:
    """Pair the women of a generation with men who share no ancestor with them."""
    men = [person for person in grown if person.gender == "male"]
    for woman in grown:
        if woman.gender == "female":
            for man in men:
                if not set(_ancestors(made, woman)) & set(_ancestors(made, man)):
                    men.remove(man)
                    yield woman, man
                    break


def _ancestors(made: World, person: Person) -> Iterator[str]:
    for parent in person.parents:
        yield parent
        yield from _ancestors(made, made.people[parent])


def _objects(made: World, random: Random, seed: int) -> None:
    names = hash_order((f"the {material} {thing}" for material in MATERIALS for thing in THINGS), f"{seed}")
    owners = tuple(person.name for person in made.people.values() if person.workplace)
    for name in names[:OBJECTS]:
        made.owner[name] = pick(random, owners)
        made.kept[name] = pick(random, tuple(made.stands))


def _atomic(made: World) -> Iterator[Fact]:
    for person in made.people.values():
        for parent in person.parents:
            yield parenthood(made, person.name, parent)
            yield childhood(made, person.name, parent)
        if person.name in made.spouses:
            gender = made.people[made.spouses[person.name]].gender
            yield Fact("wife" if gender == "female" else "husband", person.name, made.spouses[person.name])
        yield Fact("town", person.name, person.town)
        if person.workplace:
            yield Fact("job", person.name, person.job)
            yield Fact("workplace", person.name, person.workplace)
    for place, town in made.stands.items():
        yield Fact("stands", place, town)
    for thing, owner in made.owner.items():
        yield Fact("owner", thing, owner)
        yield Fact("kept", thing, made.kept[thing])


def parenthood(made: World, child: str, parent: str) -> Fact:
    """Return that the parent is the mother or father of the child."""
    return Fact("mother" if made.people[parent].gender == "female" else "father", child, parent)


def childhood(made: World, child: str, parent: str) -> Fact:
    """Return that the child is a daughter or son of the parent."""
    return Fact("daughter" if made.people[child].gender == "female" else "son", parent, child)


def _composed(made: World) -> Iterator[Composed]:
    yield from _kin(made)
    strangers = _strangers(made)
    for one, other in itertools.combinations(made.people.values(), 2):
        if one.town == other.town and other.name in strangers[one.name]:
            for a, b in ((one, other), (other, one)):
                steps = Fact("town", a.name, a.town), Fact("town", b.name, b.town)
                yield Composed(Fact("neighbour", a.name, b.name), "neighbours", steps)
    for person in made.people.values():
        if person.workplace:
            town = made.stands[person.workplace]
            steps = Fact("workplace", person.name, person.workplace), Fact("stands", person.workplace, town)
            yield Composed(Fact("works in", person.name, town), "works in", steps)
    for thing, place in made.kept.items():
        steps = Fact("kept", thing, place), Fact("stands", place, made.stands[place])
        yield Composed(Fact("found in", thing, made.stands[place]), "found in", steps)
        owner = made.owner[thing]
        workplace = made.people[owner].workplace
        if workplace != place:
            steps = Fact("owner", thing, owner), Fact("workplace", owner, workplace)
            yield Composed(Fact("owner's workplace", thing, workplace), "owner's workplace", steps)


def _kin(made: World) -> Iterator[Composed]:
    people = made.people

    def by_gender(name: str, female: str, male: str) -> str:
        return female if people[name].gender == "female" else male

    for child in people.values():
        for parent in child.parents:
            first = parenthood(made, child.name, parent)
            for elder in people[parent].parents:
                steps = first, parenthood(made, parent, elder)
                side = "maternal" if first.relation == "mother" else "paternal"
                grand = Fact(f"{side} grand{steps[1].relation}", child.name, elder)
                yield Composed(grand, "grandparent", steps)
                back = Fact(by_gender(child.name, "granddaughter", "grandson"), elder, child.name)
                yield Composed(back, "grandparent", steps)
        for sibling in _siblings(made, child.name):
            steps = parenthood(made, child.name, child.parents[0]), parenthood(made, sibling, child.parents[0])
            yield Composed(Fact(by_gender(sibling, "sister", "brother"), child.name, sibling), "sibling", steps)
        for parent in child.parents:
            for aunt in _siblings(made, parent):
                steps = (parenthood(made, child.name, parent), Fact(by_gender(aunt, "sister", "brother"), parent, aunt))
                yield Composed(Fact(by_gender(aunt, "aunt", "uncle"), child.name, aunt), "aunt or uncle", steps)
                back = Fact(by_gender(child.name, "niece", "nephew"), aunt, child.name)
                yield Composed(back, "aunt or uncle", steps)
                for cousin in made.children.get(aunt, ()):
                    # One step is that two parents are siblings, which is a composed fact itself.
                    ways = (*steps, parenthood(made, cousin, aunt))
                    yield Composed(Fact("cousin", child.name, cousin), "cousin", ways)


def _siblings(made: World, name: str) -> list[str]:
    parents = made.people[name].parents
    return [child for child in made.children[parents[0]] if child != name] if parents else []


def _strangers(made: World) -> dict[str, set[str]]:
    """Return for each person those who are more than `FAR` steps of kinship or marriage away."""
    strangers = {}
    for name in made.people:
        near = edge = {name}
        for _ in range(FAR):
            edge = {other for one in edge for other in _next_of_kin(made, one)} - near
            near = near | edge
        strangers[name] = made.people.keys() - near
    return strangers


def _next_of_kin(made: World, name: str) -> Iterable[str]:
    yield from made.people[name].parents
    yield from made.children.get(name, ())
    if name in made.spouses:
        yield made.spouses[name]


ASKED = tuple(f"{side} grand{parent}" for side in ("maternal", "paternal") for parent in ("mother", "father"))
ASKED += ("sister", "brother", "aunt", "uncle", "cousin", "neighbour", "works in", "found in", "owner's workplace")


def _separate(made: World, composed: list[Composed]) -> None:
    """Choose the groups of four, and note which names may share no document: of held-out facts and wrong choices."""
    people = made.people
    strangers = _strangers(made)
    related = {(one.fact.subject, one.fact.value) for one in composed}
    related |= {(fact.subject, fact.value) for fact in made.atomic}

    def wrong(subject: str, value: str) -> bool:
        return (subject, value) not in related and (value not in people or value in strangers.get(subject, people))

    def fit(one: Composed, other: Composed) -> bool:
        a, b = one.fact, other.fact
        if a.relation != b.relation or len({a.subject, a.value, b.subject, b.value}) < 4:
            return False
        alike = a.value not in people or (
            people[a.value].gender == people[b.value].gender
            and people[a.value].generation == people[b.value].generation
        )
        return alike and wrong(a.subject, b.value) and wrong(b.subject, a.value)

    made.fours = tuple(groups_of_four((one for one in made.held_out if one.fact.relation in ASKED), fit))
    pairs = {(one.fact.subject, one.fact.value) for one in made.held_out}
    pairs |= {(one.fact.subject, other.fact.value) for four in made.fours for one in four for other in four}
    for one, other in pairs:
        made.separated.setdefault(one, set()).add(other)
        made.separated.setdefault(other, set()).add(one)
