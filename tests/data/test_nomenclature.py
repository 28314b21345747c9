"""The chemistry domain. Names and structures are read here into graphs of atoms by rules of their own, and counted."""

import collections
import functools
import itertools
import math
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from decimal import ROUND_HALF_UP, Decimal

import pytest

from moetrain.data import builtin
from moetrain.data.builtin import nomenclature, nomenclature_text

WEIGHTS = {"H": "1.008", "C": "12.011", "N": "14.007", "O": "15.999", "F": "18.998", "Cl": "35.45", "Br": "79.904"}
WEIGHTS |= {"I": "126.904"}
ELEMENTS = {"hydrogen": "H", "carbon": "C", "nitrogen": "N", "oxygen": "O", "fluorine": "F", "chlorine": "Cl"}
ELEMENTS |= {"bromine": "Br", "iodine": "I"}
VALENCES = {"C": 4, "N": 3, "O": 2, "F": 1, "Cl": 1, "Br": 1, "I": 1}
CHAINS = ("meth", "eth", "prop", "but", "pent", "hex", "hept", "oct", "non", "dec", "undec", "dodec")
STEM = "(?P<stem>undec|dodec|meth|eth|prop|but|pent|hex|hept|oct|non|dec)"
PREFIX = re.compile(r"(?:([\d,]+)-)?(di)?(bromo|chloro|fluoro|iodo|methyl|ethyl|methoxy|ethoxy)-?")
PARENT = re.compile(
    rf"{STEM}(?:(?:-(?P<bond>\d+)-)?(?P<many>en|yn)e|ane"
    r"|an(?:(?:-(?P<place>\d+)-)?(?P<on>ol|one|amine)|(?P<end>al|oic acid)))"
)
HALOGENS = {"bromo": "Br", "chloro": "Cl", "fluoro": "F", "iodo": "I"}
ANSWERS = {  # what is found in the graph: the family, and the group in words
    "carboxylic acid": "a carboxyl group",
    "ester": "an ester group",
    "aldehyde": "a carbonyl group at the end of the chain",
    "ketone": "a carbonyl group within the chain",
    "alcohol": "a hydroxyl group",
    "amine": "an amino group",
    "alkyne": "a carbon-carbon triple bond",
    "alkene": "a carbon-carbon double bond",
    "ether": "an oxygen atom between two carbon atoms",
    "haloalkane": "a halogen atom",
    "alkane": "no functional group",
}


class Graph:
    """Atoms other than hydrogen, and their bonds."""

    def __init__(self) -> None:
        self.symbols: list[str] = []
        self.bonds: dict[int, dict[int, int]] = {}

    def add(self, symbol: str, to: int | None = None, order: int = 1) -> int:
        self.symbols.append(symbol)
        place = len(self.symbols) - 1
        self.bonds[place] = {}
        if to is not None:
            self.bonds[place][to] = self.bonds[to][place] = order
        return place

    def add_chain(self, carbons: int, to: int | None = None) -> list[int]:
        places: list[int] = []
        for _ in range(carbons):
            places.append(self.add("C", places[-1] if places else to))
        return places

    def free(self, place: int) -> int:
        hydrogens = VALENCES[self.symbols[place]] - sum(self.bonds[place].values())
        assert hydrogens >= 0
        return hydrogens

    @functools.cached_property
    def atoms(self) -> collections.Counter[str]:
        counted = collections.Counter(self.symbols)
        counted["H"] = sum(map(self.free, self.bonds))
        return +counted

    @functools.cached_property
    def formula(self) -> str:
        rest = sorted(symbol for symbol in self.atoms if symbol not in "CH")
        order = [symbol for symbol in ("C", "H", *rest) if self.atoms[symbol]]
        return "".join(symbol + (str(self.atoms[symbol]) if self.atoms[symbol] > 1 else "") for symbol in order)

    @functools.cached_property
    def exact(self) -> Decimal:
        return sum((Decimal(WEIGHTS[symbol]) * count for symbol, count in self.atoms.items()), Decimal(0))

    @functools.cached_property
    def mass(self) -> str:
        return str(self.exact.quantize(Decimal("0.01"), ROUND_HALF_UP))

    @functools.cached_property
    def key(self) -> tuple[str, ...]:
        """The same for two trees of atoms if and only if they are the same compound."""

        def seen_from(place: int, behind: int | None) -> str:
            around = (f"{order}{seen_from(at, place)}" for at, order in self.bonds[place].items() if at != behind)
            return f"{self.symbols[place]}({''.join(sorted(around))})"

        return tuple(sorted(seen_from(place, None) for place in self.bonds))

    @functools.cached_property
    def family(self) -> str:
        found = {"haloalkane"} if set(self.symbols) & set(HALOGENS.values()) else {"alkane"}
        for place, symbol in enumerate(self.symbols):
            bonds = self.bonds[place]
            if symbol == "C":
                oxygens = sorted((bonds[at], len(self.bonds[at])) for at in bonds if self.symbols[at] == "O")
                carbons = [order for at, order in bonds.items() if self.symbols[at] == "C"]
                names = {2: "alkene", 3: "alkyne"}
                found |= {names[order] for order in carbons if order > 1}
                match oxygens:
                    case [(1, 1), (2, 1)]:
                        found.add("carboxylic acid")
                    case [(1, 2), (2, 1)]:
                        found.add("ester")
                    case [(2, 1)]:
                        found.add("ketone" if len(carbons) == 2 else "aldehyde")
                    case [(1, 1)]:
                        found.add("alcohol")
                    case [(1, 2)]:
                        found.add("ether")
            found |= {"amine"} if symbol == "N" else set()
        return next(name for name in ANSWERS if name in found)

    def chain_lengths(self) -> Iterator[list[int]]:
        """Every path over carbons alone."""

        def onward(path: list[int]) -> Iterator[list[int]]:
            yield path
            for at in self.bonds[path[-1]]:
                if self.symbols[at] == "C" and at not in path:
                    yield from onward([*path, at])

        for place, symbol in enumerate(self.symbols):
            if symbol == "C":
                yield from onward([place])


@functools.cache
def from_name(name: str) -> Graph:
    """Build the atoms of a name, and hold the name against the rules for chain, locants and alphabet."""
    graph = Graph()
    if ester := re.fullmatch(rf"(\w+)yl {STEM}anoate", name):
        chain = graph.add_chain(CHAINS.index(ester["stem"]) + 1)
        graph.add("O", chain[0], 2)
        graph.add_chain(CHAINS.index(ester[1]) + 1, graph.add("O", chain[0]))
        return graph
    at = 0
    cited: list[tuple[str, tuple[int, ...]]] = []
    while prefix := PREFIX.match(name, at):
        at = prefix.end()
        locants = tuple(map(int, prefix[1].split(","))) if prefix[1] else (1,) * (2 if prefix[2] else 1)
        assert len(locants) == (2 if prefix[2] else 1), name
        assert list(locants) == sorted(locants), name
        cited.append((prefix[3], locants))
    parent = PARENT.fullmatch(name, at)
    assert parent, name
    assert [word for word, _ in cited] == sorted({word for word, _ in cited}), name
    chain = graph.add_chain(CHAINS.index(parent["stem"]) + 1)
    length, needed = len(chain), set()
    first = int(parent["bond"] or parent["place"] or 1)
    if parent["many"]:
        low, high = chain[first - 1], chain[first]
        graph.bonds[low][high] = graph.bonds[high][low] = 2 if parent["many"] == "en" else 3
        needed = {low, high}
    elif parent["on"]:
        graph.add("N" if parent["on"] == "amine" else "O", chain[first - 1], 2 if parent["on"] == "one" else 1)
        needed = {chain[first - 1]}
    elif parent["end"]:
        graph.add("O", chain[0], 2)
        needed = {chain[0]}
        if parent["end"] == "oic acid":
            graph.add("O", chain[0])
    for word, locants in cited:
        for locant in locants:
            if word in HALOGENS:
                graph.add(HALOGENS[word], chain[locant - 1])
            else:
                start = graph.add("O", chain[locant - 1]) if "oxy" in word else chain[locant - 1]
                graph.add_chain(1 if word.startswith("meth") else 2, start)
    assert max(len(path) for path in graph.chain_lengths() if needed <= set(path)) == length, name
    if not parent["end"]:
        own = first if needed else 0
        other = own and length + (1 if not parent["many"] else 0) - own
        here = [locant for _, locants in cited for locant in locants]
        there = [length + 1 - locant for _, locants in cited for locant in sorted(locants, reverse=True)]
        assert (own, sorted(here), here) <= (other, sorted(there), there), name
    return graph


@functools.cache
def from_structure(text: str) -> Graph:
    """Build the atoms of a condensed formula, whose hydrogens must be those that the bonds leave room for."""
    graph = Graph()
    written = sum(int(count or 1) for count in re.findall(r"H(\d*)", re.sub(r"\(([^()]*)\)2", r"\1\1", text)))
    _read(graph, text.removeprefix("H"), None)
    assert graph.atoms["H"] == written, text
    return graph


def _read(graph: Graph, text: str, at: int | None) -> None:
    order = 1
    while text:
        part = re.match(r"COO(?=H|C)|CHO$|CO(?=C)|C(?!l)H?\d?|\(([^()]*)\)(2?)|(Cl|Br|F|I)(2?)|NH2|OH?|[=≡]", text)
        assert part, text
        rest = text[part.end() :]
        if part[0] in "=≡":
            order = 2 if part[0] == "=" else 3
        elif part[1]:
            for _ in range(int(part[2] or 1)):
                _read(graph, part[1], at)
        elif part[3]:
            for _ in range(int(part[4] or 1)):
                graph.add(part[3], at)
        elif part[0][0] == "C":
            at, order = graph.add("C", at, order), 1
            if "O" in part[0]:
                graph.add("O", at, 2)
            if part[0] == "COO":
                at = graph.add("O", at)
                rest = rest.removeprefix("H")
        else:
            at = graph.add(part[0][0], at)
        text = rest


# The reader of documents: a compound by its name, and what is said of it.
N, F, M, S = "(?P<n>.+?)", "(?P<formula>[A-Z][A-Za-z0-9]*)", r"(?P<mass>\d+\.\d\d) g/mol", "(?P<structure>[A-Z][^ .]*)"
FAMILY, GROUP = f"an? (?P<family>{'|'.join(ANSWERS)})", f"(?P<group>{'|'.join(ANSWERS.values())}|halogen atoms)"
FORMS = [
    rf"(?:What is|Give) the molecular formula of {N}[?.] {F}",
    f"(?:It|{N}) has the molecular formula {F}",
    f"(?:The|{F} is the) (?:molecular )?formula of {N}",
    f"The formula of {N} is {F}",
    f"Molecules of {N} are {F}",
    rf"(?:What is|Give) the molar mass of {N}[?.] {M}",
    f"The molar mass of {N} (?:is|comes to) {M}",
    f"(?:It|{N}) has a molar mass of {M}",
    f"{M} is the molar mass of {N}",
    f"(?:It|{N}) is (?:classed as )?{FAMILY}",
    rf"(?:What kind of compound is|To which family does) {N}(?: belong)?\? It is {FAMILY}",
    f"Chemists class {N} as {FAMILY}",
    rf"(?:What functional group does|Name the functional group of) {N}(?: have\?|\.) {GROUP}",
    f"(?:It|{N}) has {GROUP}",
    f"In {N} there is {GROUP}",
    f"The molecule of {N} has {GROUP}",
    rf"(?:What is the structure of|How is) {N}(?: written as a structure)?\? {S}",
    f"The structure of {N} is {S}",
    f"(?:It|{N}) is written {S}",
    f"{S} is (?:called )?{N}",
    rf"How many carbon atoms does {N} have\? (?P<carbons>\d+)",
    rf"The number of carbon atoms in {N} is (?P<carbons>\d+)",
    rf"Carbon atoms in {N}: (?P<carbons>\d+)",
    rf"How many atoms are there in {N}\? (?P<atoms>\d+)",
    rf"The number of atoms in {N} is (?P<atoms>\d+)",
    rf"Atoms in {N}, of all elements: (?P<atoms>\d+)",
    rf"(?:What is the|The) degree of unsaturation of {N}(?:\?| is) (?P<unsaturation>\d)",
    rf"(?:It|{N}) has a degree of unsaturation of (?P<unsaturation>\d)",
]
PATTERNS = [re.compile(form) for form in FORMS]
TITLES = {"Formula": "formula", "Molar mass": "mass", "Family": "family", "Structure": "structure"}
TITLES |= {"Carbon atoms": "carbons", "Atoms": "atoms", "Unsaturation": "unsaturation"}
Said = tuple[str, str, str]  # name, property, value
NAMED = re.compile("[a-z0-9][a-z0-9,-]*(?: [a-z]+anoate)?(?: acid)?")


def told(sentence: str) -> list[Said]:
    """What a sentence says, the longest reading of a name first; "It" is left for the caller to fill in."""
    for pattern in PATTERNS:
        if match := pattern.fullmatch(sentence):
            said = {key: value for key, value in match.groupdict().items() if value is not None}
            name = said.pop("n", "It")
            name = name[0].lower() + name[1:] if name != "It" else name
            if said and (name == "It" or NAMED.fullmatch(name)):
                return [(name, *only) for only in said.items()]
    return []


def read(text: str) -> Iterator[Said]:
    """Everything a document says, line by line. Fails where it cannot read."""
    lines = text.replace("\nA: ", " ").replace("Q: ", "").split("\n")
    if lines[0].startswith("Name | "):
        titles = [TITLES[title] for title in lines[0].split(" | ")[1:]]
        for line in lines[1:]:
            name, *values = line.split(" | ")
            for title, value in zip(titles, values, strict=True):
                yield name, title, re.sub(r"^an? | g/mol$", "", value)
        return
    if title := re.fullmatch("Isomers with the formula (.*):", lines[0]):
        assert len(lines) > 2
        yield from ((line.removeprefix("- "), "formula", title[1]) for line in lines[1:])
        return
    weighed = ""
    for line in filter(None, lines):
        if start := re.fullmatch(r"What is the molar mass of (.*)\? Its formula is (.*)\.", line):
            weighed, sums = start[1], Decimal(0)
            yield weighed, "formula", start[2]
        elif part := re.fullmatch(r"([a-z]+): (\d+) × ([\d.]+) = ([\d.]+)", line):
            assert Decimal(part[3]) == Decimal(WEIGHTS[ELEMENTS[part[1]]])
            assert Decimal(part[2]) * Decimal(part[3]) == Decimal(part[4])
            assert from_name(weighed).atoms[ELEMENTS[part[1]]] == int(part[2])
            sums += Decimal(part[4])
        elif end := re.fullmatch(r"Together ([\d.]+), so ([\d.]+) g/mol\.", line):
            assert sums == Decimal(end[1]) == from_name(weighed).exact
            yield weighed, "mass", end[2]
        elif more := re.fullmatch(r"Which is heavier by the mole, (.*) or (.*)\? (.*), at ([\d.]+) g/mol\.", line):
            heavy = more[3][0].lower() + more[3][1:]
            assert heavy in (more[1], more[2])
            assert from_name(heavy).exact == max(from_name(more[1]).exact, from_name(more[2]).exact)
            yield heavy, "mass", more[4]
        elif less := re.fullmatch(r"(.*) \((.*) g/mol\) is lighter by the mole than (.*) \((.*) g/mol\)\.", line):
            light = less[1][0].lower() + less[1][1:]
            assert from_name(light).exact < from_name(less[3]).exact
            yield from ((light, "mass", less[2]), (less[3], "mass", less[4]))
        elif isomers := re.fullmatch("(.*) and (.*) are isomers: their formula is (.*)\\.", line):
            for name in [*isomers[1].split(", "), isomers[2]]:
                yield name[0].lower() + name[1:], "formula", isomers[3]
        elif one := re.fullmatch("(.*) is one of several compounds with the formula (.*)\\.", line):
            yield one[1][0].lower() + one[1][1:], "formula", one[2]
        else:
            last = ""
            sentences = [line] if told(line) else re.split(r"(?<=\w|\))\. (?=[A-Z0-9])", line.removesuffix("."))
            for sentence in sentences:
                said = told(sentence)
                assert said, (sentence, text)
                for name, about, value in said:
                    last = last if name == "It" else name
                    yield last, about, value


def holds(name: str, about: str, value: str) -> bool:
    """Whether what is said of a compound is what the graph of its name gives."""
    graph = from_name(name)
    match about:
        case "formula" | "mass" | "family":
            return getattr(graph, about) == value
        case "group":
            halogens = sum(graph.atoms[symbol] for symbol in HALOGENS.values())
            return value == (
                "halogen atoms" if graph.family == "haloalkane" and halogens > 1 else ANSWERS[graph.family]
            )
        case "structure":
            return from_structure(value).key == graph.key
        case "carbons":
            return graph.atoms["C"] == int(value)
        case "atoms":
            return graph.atoms.total() == int(value)
        case "unsaturation":
            return sum(order - 1 for around in graph.bonds.values() for order in around.values()) == 2 * int(value)
    raise AssertionError(about)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return list(builtin.documents("chemistry", size=1_200_000, seed=5))


@pytest.fixture(scope="module")
def said(texts: list[str]) -> collections.Counter[Said]:
    return collections.Counter(itertools.chain.from_iterable(map(read, texts)))


@pytest.fixture(scope="module")
def items() -> list[dict]:
    return builtin.probe_items("chemistry", items=100_000, seed=7)


def asked(item: dict) -> Said:
    answer = item["target"] if "target" in item else item["choices"][item["answer"]]
    (fact,) = read(f"{item['prompt']} {answer}")
    return fact


def names_in(text: str) -> set[str]:
    """Every stretch of a text that could be a name or a structure, however it stands there."""
    spelled = re.findall(r"(?<![\w,-])[A-Za-z0-9][a-z0-9,-]*(?: [a-z]+anoate)?(?: acid)?", text)
    spelled += re.findall(r"(?<![\w,-])[a-z]+ [a-z]+anoate|(?<![\w,-])[A-Za-z0-9][a-z0-9,-]*", text)
    drawn = re.findall(r"(?<!\S)C?H[A-Za-z0-9()=≡]+|(?<!\S)C[A-Za-z0-9()=≡]+", text)
    return {name[0].lower() + name[1:].rstrip(",") for name in spelled} | set(drawn)


def test_the_reader_knows_compounds_from_the_books() -> None:
    """Against published values, so that reader and generator are not wrong together."""
    for name, formula, mass, structure, family in (
        ("methane", "CH4", "16.04", "CH4", "alkane"),
        ("2,2-dimethylpropane", "C5H12", "72.15", "CH3C(CH3)2CH3", "alkane"),
        ("3-ethyl-2-methylpentane", "C8H18", "114.23", "CH3CH2CH(CH2CH3)CH(CH3)CH3", "alkane"),
        ("ethanol", "C2H6O", "46.07", "CH3CH2OH", "alcohol"),
        ("propan-2-one", "C3H6O", "58.08", "CH3COCH3", "ketone"),
        ("ethanoic acid", "C2H4O2", "60.05", "CH3COOH", "carboxylic acid"),
        ("methanal", "CH2O", "30.03", "HCHO", "aldehyde"),
        ("ethyl ethanoate", "C4H8O2", "88.11", "CH3COOCH2CH3", "ester"),
        ("ethoxyethane", "C4H10O", "74.12", "CH3CH2OCH2CH3", "ether"),
        ("but-1-ene", "C4H8", "56.11", "CH3CH2CH=CH2", "alkene"),
        ("ethyne", "C2H2", "26.04", "CH≡CH", "alkyne"),
        ("methanamine", "CH5N", "31.06", "CH3NH2", "amine"),
        ("bromochloromethane", "CH2BrCl", "129.38", "CH2BrCl", "haloalkane"),
        ("dichloromethane", "CH2Cl2", "84.93", "CH2Cl2", "haloalkane"),
        ("1-iodopropane", "C3H7I", "169.99", "CH3CH2CH2I", "haloalkane"),
    ):
        graph = from_name(name)
        assert (graph.formula, graph.mass, graph.family) == (formula, mass, family)
        assert from_structure(structure).key == graph.key
    for wrong in ("2-ethylbutane", "3-methylbutane", "butan-3-ol", "2-methyl-3-ethylpentane", "2-chloro-1-bromoethane"):
        with pytest.raises(AssertionError):
            from_name(wrong)
    with pytest.raises(AssertionError):
        from_structure("CH3CH3CH3")
    assert from_structure("CH3CHClCH3").key != from_name("1-chloropropane").key


def test_every_compound_is_named_drawn_and_counted_right() -> None:
    compounds = nomenclature.compounds()
    assert 1500 < len(compounds) < 2500
    keys = {from_name(one.name).key for one in compounds}
    assert len(keys) == len(compounds) == len({one.condensed for one in compounds})
    for one in compounds:
        assert from_structure(one.condensed).key == from_name(one.name).key
        assert from_name(one.name).family == one.family


def test_every_statement_is_true(said: collections.Counter[Said]) -> None:
    for fact in said:
        assert holds(*fact), fact
    assert {about for _, about, _ in said} == {"group", *TITLES.values()}
    assert len(said) > 5000
    named = {from_name(name).key for name, _, _ in said}
    assert len(named) > 0.95 * len(nomenclature_text.kept())


def test_held_out_compounds_are_some_and_never_change() -> None:
    held_out = nomenclature.held_out()
    assert 0.10 < len(held_out) / len(nomenclature.compounds()) < 0.15
    assert {one.family for one in held_out} == set(nomenclature.SUFFIXES)
    # A formula identifies none of them.
    assert {one.formula for one in held_out} <= {one.formula for one in nomenclature_text.kept()}
    # Runs are compared with earlier ones: another choice would train on what those hold out.
    assert sorted(one.name for one in held_out if one.chain < 4 and one.family != "haloalkane") == [
        "2-methylpropan-1-ol",
        "3-bromopropan-1-ol",
        "ethyl propanoate",
        "propanoic acid",
    ]


def held_out_in(texts: list[str]) -> collections.Counter[str]:
    held_out = {one.name for one in nomenclature.held_out()} | {one.condensed for one in nomenclature.held_out()}
    return collections.Counter(name for text in texts for name in names_in(text) & held_out)


def test_no_document_names_or_draws_a_held_out_compound(texts: list[str], said: collections.Counter[Said]) -> None:
    assert not held_out_in(texts)
    keys = {from_name(one.name).key for one in nomenclature.held_out()}
    for name, about, value in said:
        assert from_name(name).key not in keys
        assert about != "structure" or from_structure(value).key not in keys


def test_the_search_finds_held_out_compounds_where_nothing_keeps_them_out(monkeypatch: pytest.MonkeyPatch) -> None:
    cached = (nomenclature_text.kept, nomenclature_text._families, nomenclature_text._isomers)
    monkeypatch.setattr(nomenclature_text, "held_out", frozenset)
    try:
        for function in cached:
            function.cache_clear()
        found = held_out_in(list(nomenclature_text.documents(1_000_000, 0)))
    finally:
        for function in cached:
            function.cache_clear()
    held_out = nomenclature.held_out()
    assert sum(one.name in found for one in held_out) > 0.95 * len(held_out)
    assert sum(one.condensed in found for one in held_out) > 0.6 * len(held_out)


def test_items_are_right_and_held_out(items: list[dict]) -> None:
    tasks = collections.Counter(item["task"] for item in items)
    assert min(tasks["builtin_chemistry"], tasks["builtin_chemistry_open"]) > 1000
    assert len({item["prompt"] for item in items}) == len({item["id"] for item in items}) == len(items)
    keys = {from_name(one.name).key for one in nomenclature.held_out()}
    kinds = collections.Counter()
    for item in items:
        name, about, value = asked(item)
        kinds[about, "choices" in item] += 1
        assert from_name(name).key in keys
        assert holds(name, about, value), item
        choices = [re.sub(r"^an? | g/mol$", "", choice) for choice in item.get("choices", ())]
        assert len(set(choices)) == len(choices)
        for place, choice in enumerate(choices):
            assert place == item["answer"] or not holds(name, about, choice), item
        if about == "structure":
            assert len({from_structure(choice).formula for choice in choices}) <= 1
        if about == "family" and "haloalkane" in choices and value != "haloalkane":
            assert not re.search("bromo|chloro|fluoro|iodo", name)
    assert {kind for kind, _ in kinds} == {"formula", "mass", "structure", "family"}
    assert builtin.probe_items("chemistry", items=40, seed=7) == items[:40]
    assert builtin.probe_items("chemistry", items=40, seed=8) != items[:40]


def test_no_baseline_beats_chance(items: list[dict], texts: list[str]) -> None:
    """By how often the training text has a choice, its length, its place, its rank, its likeness to the others."""
    seen = collections.Counter(re.findall(r"\d+\.\d\d(?= g/mol)|[^\s,.:|]+", "\n".join(texts)))
    tie = random.Random(0).random
    measures: dict[str, Callable[[str, list[str]], float]] = {
        "often": lambda choice, _: seen[choice.removesuffix(" g/mol").split()[-1]],
        "length": lambda choice, _: len(choice),
        "alphabet": lambda choice, choices: sorted(choices).index(choice),
        "rank": lambda choice, choices: float(choice.split()[0]) if choice[0].isdigit() else tie(),
        "letters": lambda choice, choices: sum(
            x == y for other in choices for x, y in zip(choice, other, strict=False)
        ),
    }
    by_kind: dict[str, list[dict]] = collections.defaultdict(list)
    for item in items:
        if "choices" in item:
            by_kind[asked(item)[1]].append(item)
    for about, group in by_kind.items():
        rates = {f"place {place}": sum(item["answer"] == place for item in group) / len(group) for place in range(4)}
        for name, measure in measures.items():
            for best in (max, min):
                chosen = (
                    best(range(4), key=lambda i: (measure(item["choices"][i], item["choices"]), tie()))
                    == item["answer"]
                    for item in group
                )
                rates[f"{best.__name__} {name}"] = sum(chosen) / len(group)
        tolerance = 4.5 * math.sqrt(0.25 * 0.75 / len(group))
        assert all(abs(rate - 0.25) < tolerance for rate in rates.values()), (about, tolerance, rates)


def test_documents_are_many_sorts_of_short_text(texts: list[str]) -> None:
    lengths = sorted(map(len, texts))
    assert lengths[len(lengths) // 2] < 300
    assert lengths[-1] < 2000
    assert len(set(texts)) > 0.995 * len(texts)
    everything = "\n".join(texts)
    for phrase in ("Q: ", "Name | ", " × ", "heavier", "lighter", "isomers", "Isomers", "It has"):
        assert phrase in everything
    assert not re.search(r"[{}]|\b(?:a [aeiou]|an [^aeiou])", everything)


def test_processes_agree() -> None:
    code = (
        "from moetrain.data import builtin\n"
        "print(builtin.probe_items('chemistry', items=300, seed=3))\n"
        "print(list(builtin.documents('chemistry', size=50_000, seed=3)))"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": salt}, capture_output=True)
        for salt in ("1", "2")
    ]
    assert all(run.returncode == 0 for run in runs), runs
    assert runs[0].stdout == runs[1].stdout
