"""Organic compounds, a subset whose systematic names are certain, with the facts that follow from their structure.

A compound is an unbranched chain with one characteristic group (or none) and at most two small substituents. They stand
only where the chain stays the longest: methyl nowhere at an end, ethyl one further in. Locants are the lowest that
IUPAC's rules allow, in their order: the group first, then all substituents as a set, then the first in the alphabet.
One compound in eight is held out, by a hash of its structure, among those with an isomer that is not: a formula that
other compounds share identifies nothing.
"""

import functools
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from moetrain.data.builtin.draws import digest

ONE_IN = 8
LONGEST = 12
LONGEST_ALONE = 9  # with a substituent
LONGEST_TWO = 6  # with two
MASSES = {"C": 12011, "H": 1008, "Br": 79904, "Cl": 35450, "F": 18998, "I": 126904, "N": 14007, "O": 15999}  # mg/mol
STEMS = ("", "meth", "eth", "prop", "but", "pent", "hex", "hept", "oct", "non", "dec", "undec", "dodec")
# Family: what follows the stem, {} being the locant, and the characteristic group as it is called.
SUFFIXES = {
    "alkane": "ane",
    "haloalkane": "ane",
    "ether": "ane",
    "alkene": "{}ene",
    "alkyne": "{}yne",
    "alcohol": "an{}ol",
    "amine": "an{}amine",
    "ketone": "an{}one",
    "aldehyde": "anal",
    "carboxylic acid": "anoic acid",
    "ester": "anoate",
}
GROUPS = {
    "alkane": "no functional group",
    "haloalkane": "a halogen atom",
    "ether": "an oxygen atom between two carbon atoms",
    "alkene": "a carbon-carbon double bond",
    "alkyne": "a carbon-carbon triple bond",
    "alcohol": "a hydroxyl group",
    "amine": "an amino group",
    "ketone": "a carbonyl group within the chain",
    "aldehyde": "a carbonyl group at the end of the chain",
    "carboxylic acid": "a carboxyl group",
    "ester": "an ester group",
}
HALOGENS = {"bromo": "Br", "chloro": "Cl", "fluoro": "F", "iodo": "I"}
BRANCHES = {"methyl": 1, "ethyl": 2}
ALKOXY = {"methoxy": 1, "ethoxy": 2}
CONDENSED = HALOGENS | {"methyl": "(CH3)", "ethyl": "(CH2CH3)", "methoxy": "(OCH3)", "ethoxy": "(OCH2CH3)"}
AT_FIRST = {"aldehyde": "CHO", "carboxylic acid": "COOH"}  # the first carbon with all that is on it
ATOMS = {  # of the characteristic group: what it adds to the alkane with the same carbon skeleton
    "alkene": {"H": -2},
    "alkyne": {"H": -4},
    "alcohol": {"O": 1},
    "amine": {"N": 1, "H": 1},
    "ketone": {"O": 1, "H": -2},
    "aldehyde": {"O": 1, "H": -2},
    "carboxylic acid": {"O": 2, "H": -2},
    "ester": {"O": 2, "H": -2},
}

Substituents = tuple[tuple[int, str], ...]  # locant and name, sorted


@dataclass(frozen=True)
class Compound:
    """`locant` is that of the characteristic group, 0 where it needs none; `alkyl` the carbons on an ester's oxygen."""

    family: str
    chain: int
    locant: int = 0
    substituents: Substituents = ()
    alkyl: int = 0

    @functools.cached_property
    def name(self) -> str:
        """The systematic name, with all locants but on one carbon, or on two where one place is as good as another."""
        places: dict[str, list[str]] = {}
        for locant, substituent in self.substituents:
            places.setdefault(substituent, []).append(str(locant))
        bare = self.chain == 1 or (self.chain == 2 and len(self.substituents) + bool(self.locant) == 1)
        prefixes = []
        for substituent in sorted(places):
            locants = places[substituent]
            many = ("", "", "di", "tri", "tetra")[len(locants)]
            prefixes.append(many + substituent if bare else f"{','.join(locants)}-{many}{substituent}")
        suffix = SUFFIXES[self.family].format("" if bare else f"-{self.locant}-")
        ester = f"{STEMS[self.alkyl]}yl " if self.alkyl else ""
        return ester + ("" if bare else "-").join(prefixes) + STEMS[self.chain] + suffix

    @functools.cached_property
    def atoms(self) -> Counter[str]:
        """Atoms by symbol."""
        atoms = Counter({"C": self.chain + self.alkyl})
        for _, substituent in self.substituents:
            atoms["C"] += BRANCHES.get(substituent, 0) + ALKOXY.get(substituent, 0)
            atoms["O"] += substituent in ALKOXY
            if substituent in HALOGENS:
                atoms[HALOGENS[substituent]] += 1
        halogens = sum(substituent in HALOGENS for _, substituent in self.substituents)
        atoms["H"] = 2 * atoms["C"] + 2 - halogens
        for symbol, more in ATOMS.get(self.family, {}).items():
            atoms[symbol] += more
        return +atoms

    @functools.cached_property
    def hill(self) -> tuple[tuple[str, int], ...]:
        """Symbols and counts in Hill's order: carbon, hydrogen, the others by alphabet."""
        return tuple(sorted(self.atoms.items(), key=lambda part: ("CH".find(part[0]) % 3, part[0])))

    @functools.cached_property
    def formula(self) -> str:
        """The molecular formula."""
        return "".join(symbol + (str(count) if count > 1 else "") for symbol, count in self.hill)

    @functools.cached_property
    def mass(self) -> int:
        """The molar mass in mg/mol, from standard atomic weights to three decimals (CIAAW 2021, abridged)."""
        return sum(MASSES[symbol] * count for symbol, count in self.atoms.items())

    @functools.cached_property
    def unsaturation(self) -> int:
        """The degrees of unsaturation: rings, which there are none of, and further bonds of double and triple ones."""
        return {"alkyne": 2}.get(self.family, int(ATOMS.get(self.family, {}).get("H", 0) == -2))

    @functools.cached_property
    def condensed(self) -> str:
        """The condensed structural formula, the last carbon of the chain first."""
        if self.family == "ester":
            return _acyl(self.chain - 1) + "COO" + "CH2" * (self.alkyl - 1) + "CH3"
        parts = [self._carbon(place) for place in range(self.chain, 0, -1)]
        if self.family in ("alkene", "alkyne"):
            parts[-self.locant - 1] += "=" if self.family == "alkene" else "≡"
        return "".join(parts)

    def _carbon(self, place: int) -> str:
        """Return a carbon of the chain, its hydrogens, and what else is on it."""
        here = [name for locant, name in self.substituents if locant == place]
        if place == 1 and self.family in AT_FIRST:
            return "H" * (self.chain == 1) + AT_FIRST[self.family]
        if place == self.locant and self.family == "ketone":
            return "CO"
        free = _free(self.family, self.chain, self.locant, place) - len(here)
        hydrogens = ("", "H", "H2", "H3", "H4")[free]
        on_it = [CONDENSED[name] for name in sorted(here, key=lambda name: (name not in HALOGENS, name))]
        if len(here) == 2 and here[0] == here[1]:
            on_it = [f"{on_it[0]}2"]
        if place == self.locant and self.family in ("alcohol", "amine"):
            on_it.append("OH" if self.family == "alcohol" else "NH2")
            if 1 < place < self.chain:
                on_it[-1] = f"({on_it[-1]})"
        if place == 1 and here and here[0] in ALKOXY:
            on_it = [CONDENSED[here[0]].strip("()")]
        return f"C{hydrogens}" + "".join(on_it)


@functools.cache
def compounds() -> tuple[Compound, ...]:
    """Return all compounds there are, each once, in a fixed order."""
    return tuple(itertools.chain.from_iterable(_family(family) for family in SUFFIXES))


@functools.cache
def held_out() -> frozenset[Compound]:
    """Return the compounds that no document names, the same for every seed."""
    chosen = {one for one in compounds() if digest(repr(one)) % ONE_IN == 0}
    kept = {one.formula for one in compounds() if one not in chosen}
    return frozenset(one for one in chosen if one.formula in kept)


def _family(family: str) -> Iterator[Compound]:
    if family == "ester":
        yield from (Compound(family, chain, alkyl=alkyl) for chain in range(1, 9) for alkyl in range(1, 5))
        return
    first = {"alkene": 2, "alkyne": 2, "ketone": 3}.get(family, 1)
    for chain in range(first, LONGEST + 1):
        for locant in _locants(family, chain):
            for substituents in _substituents(family, chain):
                compound = Compound(family, chain, locant, substituents)
                if _possible(compound) and _key(compound) <= _key(_mirrored(compound)):
                    yield compound


def _locants(family: str, chain: int) -> range:
    """Return where the characteristic group may be: 0 where its place is fixed or it is a substituent itself."""
    if family in ("alkene", "alkyne"):
        return range(1, chain)
    if family in ("alcohol", "amine"):
        return range(1, chain + 1)
    return range(2, chain) if family == "ketone" else range(1)


def _substituents(family: str, chain: int) -> Iterator[Substituents]:
    names: tuple[str, ...] = tuple(BRANCHES)
    if family == "ether":
        names = tuple(name for name, carbons in ALKOXY.items() if carbons <= chain)
    elif family == "haloalkane":
        names += tuple(HALOGENS)
    elif family in ("alcohol", "ketone", "carboxylic acid"):
        names += ("bromo", "chloro")
    single = [(place, name) for place in range(1, chain + 1) for name in names]
    if family not in ("haloalkane", "ether"):
        yield ()
    if chain <= LONGEST_ALONE and (chain > 2 or family in ("haloalkane", "ether")):
        yield from ((one,) for one in single if family != "haloalkane" or one[1] in HALOGENS)
    if chain <= LONGEST_TWO and family in ("alkane", "haloalkane"):
        for two in itertools.combinations_with_replacement(single, 2):
            pair = tuple(sorted(two))
            if family == "alkane" or any(name in ("bromo", "chloro") for _, name in pair):
                yield pair


def _possible(compound: Compound) -> bool:
    """Return whether the chain stays the longest, no carbon has more than four bonds, and no halogen is next to OH."""
    chain, here = compound.chain, Counter(place for place, _ in compound.substituents)
    for place, name in compound.substituents:
        inward = BRANCHES.get(name, 0)
        if not inward < place <= chain - inward:
            return False
        if name in HALOGENS and place == compound.locant:
            return False
    return all(here[place] <= _free(compound.family, chain, compound.locant, place) for place in here)


def _free(family: str, chain: int, locant: int, place: int) -> int:
    """Return the bonds of a carbon that neither the chain nor the characteristic group takes."""
    bonds = (place > 1) + (place < chain)
    if family in ("alkene", "alkyne") and place in (locant, locant + 1):
        bonds += 1 if family == "alkene" else 2
    if family in AT_FIRST and place == 1:
        bonds += 3  # no substituent in place of an aldehyde's hydrogen either
    if place == locant and family in ("alcohol", "amine", "ketone"):
        bonds += 2 if family == "ketone" else 1
    return 4 - bonds


def _mirrored(compound: Compound) -> Compound:
    """Return the compound numbered from the other end, or as it is where the group takes the first place."""
    if compound.family in AT_FIRST:
        return compound
    end = compound.chain + 1
    bond = compound.family in ("alkene", "alkyne")
    locant = compound.locant and end - bond - compound.locant
    turned = tuple(sorted((end - place, name) for place, name in compound.substituents))
    return Compound(compound.family, compound.chain, locant, turned)


def _key(compound: Compound) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """Return what has to be lowest: the group's locant, then all substituents', then these as they are cited."""
    cited = tuple(place for _, place in sorted((name, place) for place, name in compound.substituents))
    return compound.locant, tuple(sorted(cited)), cited


def _acyl(carbons: int) -> str:
    return "CH3" + "CH2" * (carbons - 1) if carbons else "H"
