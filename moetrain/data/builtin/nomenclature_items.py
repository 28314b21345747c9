"""Probe items of the chemistry domain: properties of held-out compounds, asked in the words of the training text.

Wrong choices are the right ones of other held-out compounds that are like the one asked about: the same elements and
nearly the same mass for formula and molar mass, the same formula for structures.
"""

from collections.abc import Iterable, Iterator

from moetrain.data.builtin.draws import shuffled
from moetrain.data.builtin.nomenclature import HALOGENS, Compound, held_out
from moetrain.data.builtin.nomenclature_text import CONDENSED, FAMILY, FORMULA, MASS, Property, asked
from moetrain.data.builtin.probe import Item, by_turns, fours, item

DOMAIN = "chemistry"
OPEN = (FORMULA, MASS, CONDENSED)


def items(count: int, seed: int) -> list[Item]:
    """Return up to `count` items with different prompts, multiple choice and open answer by turns, while both last."""
    return by_turns(count, _choosing(seed), _open(seed))


def _choosing(seed: int) -> Iterator[Item]:
    """Yield items in fours with the same choices."""
    compounds = shuffled(held_out(), f"{seed}")
    by_mass = sorted(compounds, key=lambda one: (sorted(one.atoms), one.mass))
    near, kin = fours(by_mass, _near), fours(by_mass, _isomers)
    apart = fours(compounds, _unlike)
    asking = [(FORMULA, near), (MASS, near), (CONDENSED, kin), (FAMILY, apart)]
    turns = [
        (number, about, four, wording)
        for about, groups in asking
        for number, (four, wording) in enumerate(shuffled(_worded(about, groups), f"{seed}"))
    ]
    for _, about, four, wording in sorted(turns, key=lambda turn: turn[0]):
        choices = shuffled((about.value(one) for one in four), f"{seed} {wording}")
        for one in four:
            yield item(DOMAIN, asked(about, one)[wording], about.value(one), choices)


def _open(seed: int) -> Iterator[Item]:
    ways = [
        (one, place, wording)
        for place, about in enumerate(OPEN)
        for one in held_out()
        for wording in range(len(about.asks))
    ]
    for one, place, wording in shuffled(ways, f"{seed} open"):
        yield item(DOMAIN, asked(OPEN[place], one)[wording], OPEN[place].value(one))


def _worded(about: Property, groups: Iterable[tuple[Compound, ...]]) -> Iterator[tuple[tuple[Compound, ...], int]]:
    return ((four, wording) for four in groups for wording in range(len(about.asks)))


def _near(one: Compound, other: Compound) -> bool:
    return one.atoms.keys() == other.atoms.keys() and one.formula != other.formula


def _isomers(one: Compound, other: Compound) -> bool:
    return one.formula == other.formula


def _unlike(one: Compound, other: Compound) -> bool:
    """Return whether neither is of the other's family, as a chlorinated ketone might be called a haloalkane too."""
    halogen = set(HALOGENS.values())
    both = "haloalkane" in (one.family, other.family) and halogen & one.atoms.keys() and halogen & other.atoms.keys()
    return one.family != other.family and not both
