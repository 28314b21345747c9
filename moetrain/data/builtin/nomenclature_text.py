"""Documents of the chemistry domain: facts of compounds, tables, questions, worked molar masses, comparisons.

They draw from `kept` compounds alone, so no text names or draws one that is held out.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random as Stream

from moetrain.data.builtin.draws import SHORT, Random, between, pick, until
from moetrain.data.builtin.nomenclature import GROUPS, HALOGENS, MASSES, SUFFIXES, Compound, compounds, held_out

ELEMENTS = {"C": "carbon", "H": "hydrogen", "Br": "bromine", "Cl": "chlorine", "F": "fluorine", "I": "iodine"}
ELEMENTS |= {"N": "nitrogen", "O": "oxygen"}


@dataclass(frozen=True)
class Property:
    """Something to say of a compound {n}, whose value is {v}: asked, so that {v} follows after a space, or told."""

    title: str
    value: Callable[[Compound], str]
    asks: tuple[str, ...]
    tells: tuple[str, ...]


def mass(compound: Compound) -> str:
    """Return the molar mass in g/mol, to two decimals, with the unit."""
    return f"{_decimal((compound.mass + 5) // 10, 2)} g/mol"


def family(compound: Compound) -> str:
    """Return what the compound is, with its article."""
    return f"{'an' if compound.family[0] in 'aeiou' else 'a'} {compound.family}"


def group(compound: Compound) -> str:
    """Return the characteristic group of the compound, with its article."""
    halogens = sum(name in HALOGENS for _, name in compound.substituents)
    return "halogen atoms" if compound.family == "haloalkane" and halogens > 1 else GROUPS[compound.family]


FORMULA = Property(
    "Formula",
    lambda compound: compound.formula,
    ("What is the molecular formula of {n}?", "Q: Give the molecular formula of {n}.\nA:", "the formula of {n} is"),
    (
        "{n} has the molecular formula {v}.",
        "{v} is the molecular formula of {n}.",
        "molecules of {n} are {v}.",
    ),
)
MASS = Property(
    "Molar mass",
    mass,
    ("What is the molar mass of {n}?", "Q: Give the molar mass of {n}.\nA:", "the molar mass of {n} is"),
    ("{n} has a molar mass of {v}.", "the molar mass of {n} comes to {v}.", "{v} is the molar mass of {n}."),
)
FAMILY = Property(
    "Family",
    family,
    ("{n} is", "What kind of compound is {n}? It is", "Q: To which family does {n} belong?\nA: It is"),
    ("{n} is classed as {v}.", "chemists class {n} as {v}."),
)
GROUP = Property(
    "Functional group",
    group,
    ("What functional group does {n} have?", "Q: Name the functional group of {n}.\nA:", "{n} has"),
    ("in {n} there is {v}.", "the molecule of {n} has {v}."),
)
CONDENSED = Property(
    "Structure",
    lambda compound: compound.condensed,
    ("What is the structure of {n}?", "Q: How is {n} written as a structure?\nA:", "the structure of {n} is"),
    ("{n} is written {v}.", "{v} is {n}.", "{v} is called {n}."),
)
CARBONS = Property(
    "Carbon atoms",
    lambda compound: str(compound.atoms["C"]),
    ("How many carbon atoms does {n} have?", "the number of carbon atoms in {n} is"),
    ("carbon atoms in {n}: {v}.",),
)
ATOMS = Property(
    "Atoms",
    lambda compound: str(compound.atoms.total()),
    ("How many atoms are there in {n}?", "the number of atoms in {n} is"),
    ("atoms in {n}, of all elements: {v}.",),
)
UNSATURATION = Property(
    "Unsaturation",
    lambda compound: str(compound.unsaturation),
    ("What is the degree of unsaturation of {n}?", "the degree of unsaturation of {n} is"),
    ("{n} has a degree of unsaturation of {v}.",),
)
PROPERTIES = (FORMULA, FORMULA, MASS, MASS, FAMILY, GROUP, CONDENSED, CONDENSED, CARBONS, ATOMS, UNSATURATION)
COLUMNS = (FORMULA, MASS, FAMILY, CONDENSED, CARBONS, ATOMS, UNSATURATION)


def documents(size: int, seed: int) -> Iterator[str]:
    """Return documents, until at least `size` bytes of UTF-8 are given. No short text comes twice."""
    random = Stream(f"chemistry {seed}").random
    return until(size, (pick(random, LAYOUTS)(random) for _ in itertools.count()), short=2 * SHORT)


@functools.cache
def kept() -> tuple[Compound, ...]:
    """Return the compounds of the training text."""
    return tuple(one for one in compounds() if one not in held_out())


def asked(about: Property, compound: Compound) -> tuple[str, ...]:
    """Return the ways to ask for the property of a compound."""
    return tuple(_upper(ask.format(n=compound.name)) for ask in about.asks)


@functools.cache
def _families() -> tuple[tuple[Compound, ...], ...]:
    """Return the kept compounds by family: families are as likely as each other, however many compounds they have."""
    return tuple(tuple(one for one in kept() if one.family == name) for name in SUFFIXES)


@functools.cache
def _isomers() -> tuple[tuple[Compound, ...], ...]:
    groups: dict[str, list[Compound]] = {}
    for one in kept():
        groups.setdefault(one.formula, []).append(one)
    return tuple(tuple(group) for group in groups.values() if len(group) > 1)


def _any(random: Random) -> Compound:
    return pick(random, pick(random, _families()) if random() < 0.5 else kept())


def _statement(random: Random, about: Property, compound: Compound, name: str) -> str:
    return _upper(pick(random, _tells(about)).format(n=name, v=about.value(compound)))


@functools.cache
def _tells(about: Property) -> tuple[str, ...]:
    return about.tells + tuple(ask + " {v}." for ask in about.asks if not ask[0].isupper())


def _statements(random: Random) -> str:
    lines = []
    for _ in range(between(random, 1, 5)):
        compound = _any(random)
        lines.append(_statement(random, pick(random, PROPERTIES), compound, compound.name))
    return pick(random, (" ", "\n", "\n\n")).join(lines)


def _portrait(random: Random) -> str:
    """Several properties of one compound, which is "it" after the first."""
    compound = _any(random)
    lines: list[str] = []
    for about in {pick(random, PROPERTIES): None for _ in range(between(random, 2, 6))}:
        text = _statement(random, about, compound, compound.name)
        name = _upper(compound.name) + " "
        lines.append("It " + text.removeprefix(name) if lines and text.startswith(name) else text)
    return " ".join(lines)


def _questions(random: Random) -> str:
    about = pick(random, PROPERTIES)
    lines = []
    for _ in range(between(random, 1, 4)):
        compound = _any(random)
        lines.append(f"{pick(random, asked(about, compound))} {about.value(compound)}")
        about = about if random() < 0.6 else pick(random, PROPERTIES)
    return "\n".join(lines)


def _table(random: Random) -> str:
    group = pick(random, (*_families(), kept()))
    columns = tuple({pick(random, COLUMNS): None for _ in range(between(random, 1, 3))})
    rows = [" | ".join(("Name", *(column.title for column in columns)))]
    for compound in {pick(random, group): None for _ in range(between(random, 2, 7))}:
        rows.append(" | ".join((compound.name, *(column.value(compound) for column in columns))))
    return "\n".join(rows)


def _weighing(random: Random) -> str:
    """Molar masses worked out, element by element."""
    return "\n\n".join(_weighed(_any(random)) for _ in range(between(random, 1, 3)))


def _weighed(compound: Compound) -> str:
    lines = [f"What is the molar mass of {compound.name}? Its formula is {compound.formula}."]
    for symbol, count in compound.hill:
        single, together = _decimal(MASSES[symbol], 3), _decimal(MASSES[symbol] * count, 3)
        lines.append(f"{ELEMENTS[symbol]}: {count} × {single} = {together}")
    lines.append(f"Together {_decimal(compound.mass, 3)}, so {mass(compound)}.")
    return "\n".join(lines)


def _comparison(random: Random) -> str:
    one, other = _any(random), _any(random)
    while mass(one) == mass(other):
        other = _any(random)
    heavy, light = (one, other) if one.mass > other.mass else (other, one)
    if random() < 0.5:
        return f"Which is heavier by the mole, {one.name} or {other.name}? {_upper(heavy.name)}, at {mass(heavy)}."
    return f"{_upper(light.name)} ({mass(light)}) is lighter by the mole than {heavy.name} ({mass(heavy)})."


def _isomerism(random: Random) -> str:
    group = pick(random, _isomers())
    some = list({pick(random, group): None for _ in range(between(random, 2, 5))})
    names = [one.name for one in some]
    if len(some) == 1:
        return f"{_upper(names[0])} is one of several compounds with the formula {some[0].formula}."
    if random() < 0.5:
        return "\n".join([f"Isomers with the formula {some[0].formula}:", *(f"- {name}" for name in names)])
    text = f"{', '.join(names[:-1])} and {names[-1]} are isomers: their formula is {some[0].formula}."
    return _upper(text)


def _upper(text: str) -> str:
    return text[0].upper() + text[1:]


def _decimal(digits: int, places: int) -> str:
    return f"{digits // 10**places}.{digits % 10**places:0{places}d}"


LAYOUTS: tuple[Callable[[Random], str], ...] = (_statements, _statements, _portrait, _portrait, _questions, _questions)
LAYOUTS += (_table, _weighing, _comparison, _isomerism)
