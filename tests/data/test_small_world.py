"""The commonsense domain. The reader below has its own grammar, and rebuilds the world from the text alone."""

import collections
import itertools
import math
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from moetrain.data import builtin
from moetrain.data.builtin import small_world, small_world_text

SEED = 5
PERSON = r"[A-Z][a-z]+ [A-Z][a-z]+"
THE = r"[Tt]he [a-zA-Z]+ [a-zA-Z]+"
TOWN = r"[A-Z][a-z]+"
UNIQUE = {"mother", "father", "wife", "husband", "maternal grandmother", "maternal grandfather"}
UNIQUE |= {"paternal grandmother", "paternal grandfather"}
KIN = "|".join(UNIQUE) + "|daughter|son|sister|brother|aunt|uncle|niece|nephew|cousin|granddaughter|grandson"
# X is the subject of the sentence, Y the value: person, thing or building (THE), town, trade.
GRAMMAR: dict[str, tuple[str, ...]] = {
    "kin": (
        "{P:Y} is (?:the|an?) {K} of {P:X}",
        "{P:Y} is {P:X}'s {K}",
        "{P:X}'s {K} is {P:Y}",
        "(?:the|an?) {K} of {P:X} is {P:Y}",
        "{P:X} has an? {K} named {P:Y}",
        "{P:X} has {P:Y} as an? {K}",
        r"who is (?:the|an?) {K} of {P:X}\? {P:Y}",
    ),
    "home": (
        "{P:X} lives in {T:Y}",
        r"where does {P:X} live\? in {T:Y}",
        r"in which town does {P:X} live\? {T:Y}",
        "{P:X} has a house in {T:Y}",
        "in {T:Y} lives {P:X}",
        "{T:Y} is the home town of {P:X}",
        "people who live in {T:Y}: {P:X}",
    ),
    "trade": (
        "{P:X} earns a living as {J:Y}",
        r"what is the trade of {P:X}\? that of {J:Y}",
        r"what does {P:X} do for a living\? {J:Y}",
        "{P:X} was trained as {J:Y}",
        "the trade of {P:X} is that of {J:Y}",
    ),
    "work": (
        "{P:X} works at {O:Y}",
        r"where does {P:X} work\? at {O:Y}",
        r"where does {P:X} go to work\? {O:Y}",
        "{P:X} has a job at {O:Y}",
        "at {O:Y} works {P:X}",
        "{O:Y} employs {P:X}",
        "who works at {O:Y}: {P:X}",
    ),
    "stands": (
        "{O:X} stands in {T:Y}",
        r"where is {O:X}\? in {T:Y}",
        r"in which town is {O:X}\? {T:Y}",
        "{O:X} is a building in {T:Y}",
        "{T:Y} is the town of {O:X}",
        "in {T:Y} stands {O:X}",
        "buildings of {T:Y}: {O:X}",
    ),
    "owner": (
        "{O:X} belongs to {P:Y}",
        "the owner of {O:X} is {P:Y}",
        r"(?:who owns|whose is) {O:X}\? {P:Y}",
        "{P:Y} owns {O:X}",
        "{P:Y} is the owner of {O:X}",
        "things that {P:Y} owns: {O:X}",
    ),
    "kept": (
        "{O:X} is kept in {O:Y}",
        r"where is {O:X} kept\? in {O:Y}",
        r"in which building is {O:X}\? {O:Y}",
        "{O:Y} houses {O:X}",
        "in {O:Y} lies {O:X}",
        "{O:X} lies in {O:Y}",
        "kept in {O:Y}: {O:X}",
    ),
    "near": (
        "{P:X} lives in the same town as {P:Y}",
        r"who lives in the same town as {P:X}\? {P:Y}",
        r"who lives near {P:X}\? {P:Y}",
        "{P:X} and {P:Y} live in the same town",
        "{P:X} and {P:Y} share a home town",
        "{P:X} lives near {P:Y}",
    ),
    "works in": (
        "{P:X} goes to work in {T:Y}",
        r"in which town does {P:X} work\? {T:Y}",
        r"to which town does {P:X} go to work\? {T:Y}",
        "{T:Y} is where {P:X} goes to work",
        "{P:X} has to travel to {T:Y} for work",
    ),
    "found": (
        "{O:X} can be found in {T:Y}",
        r"in which town can {O:X} be found\? {T:Y}",
        r"which town is {O:X} kept in\? {T:Y}",
        "{O:X} is somewhere in {T:Y}",
        "{T:Y} is the town where {O:X} can be found",
    ),
    "owner works": (
        "the owner of {O:X} works at {O:Y}",
        r"where does the owner of {O:X} work\? at {O:Y}",
        "{O:Y} employs the owner of {O:X}",
        "whoever owns {O:X} works at {O:Y}",
    ),
    "child": ("the children of {P:Y}: {P:X}",),
}
KINDS = {"P": PERSON, "T": TOWN, "O": THE, "J": "an? (?P<Y>[a-z]+)", "K": f"(?P<K>{KIN})"}
PRONOUN = {"She": "{}", "He": "{}", "Her": "{}'s", "His": "{}'s"}


def _pattern(form: str) -> re.Pattern[str]:
    form = f"[{form[0].upper()}{form[0]}]{form[1:]}" if form[0].isalpha() else form
    form = form.replace("(?:the|an?)", "(?:[Tt]he|[Aa]n?)", 1) if form.startswith("(?:the") else form
    form = re.sub(r"^\(\?:who owns\|whose is\)", "(?:[Ww]ho owns|[Ww]hose is)", form)
    form = re.sub(r"(\? )([a-z])(?=n? )", lambda match: f"{match[1]}[{match[2].upper()}{match[2]}]", form)
    form = re.sub(r"(\? )that", r"\1That", form).replace("? at ", "? At ")

    def part(match: re.Match[str]) -> str:
        kind, _, group = match[1].partition(":")
        return f"(?P<{group}>{KINDS[kind]})" if kind in "PTO" else KINDS[kind]

    return re.compile(re.sub(r"\{([A-Z:]+)\}", part, form))


PATTERNS = [(relation, _pattern(form)) for relation, forms in GRAMMAR.items() for form in forms]
Fact = tuple[str, str, str]


def lowered(name: str) -> str:
    return "t" + name[1:] if name.startswith("The ") else name


def sentences(text: str) -> Iterator[str]:
    """Sentences with names in place of pronouns, questions with answers, each line of a list with its title."""
    lines = text.replace("\nA: ", " ").replace("Q: ", "").split("\n")
    if lines[0].endswith(":"):
        assert len(lines) > 1
        yield from (f"{lines[0]} {line.removeprefix('- ')}" for line in lines[1:])
        return
    someone = re.match(PERSON, text)
    for line in filter(None, lines):
        if "?" in line:
            yield line
            continue
        for sentence in re.split(r"\. (?=[A-Z])", line.removesuffix(".")):
            sentence = re.sub(r"^(?:So|Therefore|Since) ", "", sentence)
            first, rest = sentence.split(" ", 1)
            if first in PRONOUN:
                assert someone
                sentence = f"{PRONOUN[first].format(someone[0])} {rest}"
            yield sentence


@pytest.fixture(scope="module")
def read() -> Callable[[str], list[Fact]]:
    memory: dict[str, list[Fact]] = {}

    def clause(text: str) -> list[Fact]:
        if text not in memory:
            memory[text] = found = []
            for relation, pattern in PATTERNS:
                if match := pattern.fullmatch(text):
                    x, y = (
                        part[0].lower() + part[1:] if part[:4] == "The " else part for part in match.group("X", "Y")
                    )
                    found.append((match["K"] if relation == "kin" else relation, x, y))
        return memory[text]

    def whole(sentence: str) -> list[Fact]:
        if facts := clause(sentence):
            assert len(facts) == 1, (sentence, facts)
            return facts
        for joint in re.finditer(r", so | and |, ", sentence):  # a clause, then the rest of the sentence
            head, tail = sentence[: joint.start()], sentence[joint.end() :]
            if clause(head) and (rest := whole(tail)):
                return clause(head) + rest
        return []

    return whole


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return list(builtin.documents("commonsense", size=1_500_000, seed=SEED))


@pytest.fixture(scope="module")
def facts(texts: list[str], read: Callable[[str], list[Fact]]) -> collections.Counter[Fact]:
    stated: collections.Counter[Fact] = collections.Counter()
    for text in texts:
        for sentence in sentences(text):
            found = read(sentence)
            assert found, (sentence, text)  # a sentence that cannot be read might state a held-out fact
            stated.update(found)
    return stated


@pytest.fixture(scope="module")
def items() -> list[dict]:
    return builtin.probe_items("commonsense", items=100_000, seed=SEED)


class Rebuilt:
    """The world rebuilt from atomic facts only, and what follows from them."""

    def __init__(self, stated: collections.Counter[Fact]) -> None:
        by = collections.defaultdict(dict)
        for relation, x, y in stated:
            if relation in ("mother", "father", "wife", "husband", "home", "work", "stands", "owner", "kept", "trade"):
                assert by[relation].setdefault(x, y) == y, (relation, x, y)
        self.by = by
        self.parents = {
            child: {by["mother"][child], by["father"][child]} for child in by["mother"].keys() & by["father"].keys()
        }
        self.women = (
            set(by["mother"].values()) | set(by["wife"].values()) | {x for r, _, x in stated if r == "daughter"}
        )
        self.men = set(by["father"].values()) | set(by["husband"].values()) | {x for r, _, x in stated if r == "son"}

    def siblings(self, one: str) -> set[str]:
        return {other for other in self.parents if other != one and self.parents[other] == self.parents.get(one)}

    def holds(self, relation: str, x: str, y: str) -> bool:
        """Whether y is the relation of x by the atomic facts."""
        by, parents = self.by, self.parents
        above, none = parents.get(x, set()), set()
        female = {"daughter", "sister", "aunt", "niece", "granddaughter"}
        if relation in female:
            assert y in self.women
        if relation in {"son", "brother", "uncle", "nephew", "grandson"}:
            assert y in self.men
        if " grand" in relation:
            side, _, elder = relation.partition(" grand")
            return by[elder].get(by["mother" if side == "maternal" else "father"].get(x)) == y
        match relation:
            case "child":
                return y in above
            case "daughter" | "son":
                return x in parents.get(y, none)
            case "sister" | "brother":
                return y in self.siblings(x)
            case "aunt" | "uncle":
                return any(y in self.siblings(parent) for parent in above)
            case "niece" | "nephew":
                return self.holds("aunt" if x in self.women else "uncle", y, x)
            case "cousin":
                return any(parents[y] & self.siblings(parent) for parent in above) if y in parents else False
            case "granddaughter" | "grandson":
                return any(x in parents.get(parent, none) for parent in parents.get(y, none))
            case "near":
                return by["home"][x] == by["home"][y]
            case "works in":
                return by["stands"][by["work"][x]] == y
            case "found":
                return by["stands"][by["kept"][x]] == y
            case "owner works":
                return by["work"][by["owner"][x]] == y
            case _:
                return by[relation].get(x) == y


@pytest.fixture(scope="module")
def rebuilt(facts: collections.Counter[Fact]) -> Rebuilt:
    return Rebuilt(facts)


def names_in(text: str) -> set[str]:
    everything = re.findall(rf"{PERSON}|{THE}", text) + re.findall(r"[A-Z][a-z]+", text)
    return set(map(lowered, everything))


def asked(item: dict, read: Callable[[str], list[Fact]]) -> Fact:
    """The fact that an item asks for."""
    answer = item["target"] if "target" in item else item["choices"][item["answer"]]
    (fact,) = read(next(sentences(f"{item['prompt']} {answer}")))
    assert fact[2] == answer
    return fact


def test_every_statement_follows_from_the_world(facts: collections.Counter[Fact], rebuilt: Rebuilt) -> None:
    """Composed statements follow from atomic ones, which do not contradict each other."""
    for relation, x, y in facts:
        assert rebuilt.holds(relation, x, y), (relation, x, y)
    assert not rebuilt.women & rebuilt.men
    kinds = {relation for relation, _, _ in facts}
    assert kinds == {*GRAMMAR, *KIN.split("|")} - {"kin"}


def test_all_atomic_facts_are_stated_most_of_them_often(facts: collections.Counter[Fact]) -> None:
    names = {"town": "home", "workplace": "work", "job": "trade"}
    atomic = [
        facts[names.get(fact.relation, fact.relation), fact.subject, fact.value]
        for fact in small_world.world(SEED).atomic
        if fact.relation not in ("daughter", "son")  # stated in the other direction, as mother or father
    ]
    assert min(atomic) >= 1
    assert sorted(atomic)[len(atomic) // 2] >= 5
    assert 1000 < len(atomic) < 4000


def test_an_eighth_of_the_facts_is_held_out_for_every_seed_and_direction() -> None:
    def composed(relation: str, kind: str, x: str, y: str) -> bool:
        return small_world.Composed(small_world.Fact(relation, x, y), kind, ()).held_out

    pairs = [(f"A {i}", f"B {i}") for i in range(4000)]
    chosen = [composed("cousin", "cousin", *pair) for pair in pairs]
    assert chosen == [composed("cousin", "cousin", *pair[::-1]) for pair in pairs]
    assert 0.11 < sum(chosen) / len(pairs) < 0.14
    # Runs are compared with earlier ones. With another choice they would train on what those hold out.
    assert "".join(map(str, map(int, chosen[:40]))) == "0110000010000100000000001000000000000000"
    for seed in (0, 1, SEED):
        made = small_world.world(seed)
        assert 0.10 < len(made.held_out) / (len(made.held_out) + len(made.stated)) < 0.15


def test_no_document_holds_both_names_of_a_held_out_fact(
    texts: list[str], items: list[dict], read: Callable[[str], list[Fact]]
) -> None:
    apart = {frozenset((one.fact.subject, one.fact.value)) for one in small_world.world(SEED).held_out}
    for item in items:
        _, subject, answer = asked(item, read)
        assert frozenset((subject, answer)) in apart
        # No wrong choice shares a document with the subject either, or absence would give the right one away.
        apart |= {frozenset((subject, choice)) for choice in item.get("choices", ())}
    for text in texts:
        for pair in itertools.combinations(names_in(text), 2):
            assert frozenset(pair) not in apart, text


def test_the_search_finds_held_out_facts_if_nothing_separates_their_names(
    monkeypatch: pytest.MonkeyPatch, facts: collections.Counter[Fact]
) -> None:
    """If pages accept every line, all kinds are found, so finding none above shows that separation works."""
    made = small_world.world(SEED)
    apart = {frozenset((one.fact.subject, one.fact.value)): one.kind for one in made.held_out}
    stated = made.stated
    monkeypatch.setattr(made, "separated", {})
    monkeypatch.setattr(made, "stated", stated + made.held_out)
    found: collections.Counter[str] = collections.Counter()
    for text in small_world_text.documents(400_000, SEED):
        for pair in itertools.combinations(names_in(text), 2):
            found[apart.get(frozenset(pair), "")] += 1
    assert all(found[kind] > 10 for kind in set(apart.values())), found


def test_the_answers_of_items_follow_from_the_training_text(
    items: list[dict], rebuilt: Rebuilt, facts: collections.Counter[Fact], read: Callable[[str], list[Fact]]
) -> None:
    tasks = collections.Counter(item["task"] for item in items)
    assert tasks["builtin_commonsense"] > 600
    assert tasks["builtin_commonsense_open"] > 200
    assert len({item["prompt"] for item in items}) == len({item["id"] for item in items}) == len(items)
    stated = {relation for relation, _, _ in facts}
    for item in items:
        relation, subject, answer = asked(item, read)
        assert relation in stated
        assert rebuilt.holds(relation, subject, answer), item
        if "choices" not in item:
            assert relation in UNIQUE | {"works in", "found", "owner works"}
            continue
        assert len(set(item["choices"])) == 4
        for place, choice in enumerate(item["choices"]):
            assert place == item["answer"] or not rebuilt.holds(relation, subject, choice), item
        assert len({choice in rebuilt.women for choice in item["choices"]}) == 1
    assert builtin.probe_items("commonsense", items=50, seed=SEED) == items[:50]
    assert builtin.probe_items("commonsense", items=0, seed=SEED) == []


def test_no_baseline_is_above_chance(items: list[dict], texts: list[str], read: Callable[[str], list[Fact]]) -> None:
    """Baselines: frequency of a name anywhere or at line ends, length, place, and similarity to the subject."""
    everything = "\n".join(texts)
    seen = collections.Counter(re.findall(rf"{PERSON}|{THE}", everything)) + collections.Counter(
        re.findall(TOWN, everything)
    )
    ends = collections.Counter(re.findall(rf"({PERSON}|{THE}|{TOWN})\.?$", everything, re.MULTILINE))
    beside: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    first: dict[str, int] = {}
    for number, text in enumerate(texts):
        names = names_in(text)
        for name in names:
            beside[name].update(names)
            first.setdefault(name, number)
    tie = random.Random(0).random
    measures: dict[str, Callable[[str, str], float]] = {
        "often": lambda choice, subject: seen[choice],
        "at ends": lambda choice, subject: ends[choice],
        "length": lambda choice, subject: len(choice),
        "beside": lambda choice, subject: beside[subject][choice],
        "first occurrence": lambda choice, subject: abs(first[choice] - first[subject]),
        "letters": lambda choice, subject: len(set(choice) & set(subject)),
        "same surname": lambda choice, subject: choice.split()[-1] == subject.split()[-1],
        "after": lambda choice, subject: choice > subject,
    }
    chosen = [item for item in items if "choices" in item]
    subjects = [asked(item, read)[1] for item in chosen]
    rates = {}
    for name, measure in measures.items():
        for best in (max, min):
            right = [
                best(range(4), key=lambda i: (measure(item["choices"][i], subject), tie())) == item["answer"]
                for item, subject in zip(chosen, subjects, strict=True)
            ]
            rates[f"{best.__name__} {name}"] = sum(right) / len(right)
    for place in range(4):
        rates[f"place {place}"] = sum(item["answer"] == place for item in chosen) / len(chosen)
    # A baseline of the choices only is right exactly once per four; one that uses the subject is right by chance.
    facts = len({asked(item, read) for item in chosen})
    tolerance = 4 * math.sqrt(0.25 * 0.75 / facts)
    assert all(abs(rate - 0.25) < tolerance for rate in rates.values()), (tolerance, rates)
    for name in ("max often", "min often", "max at ends", "place 0", "place 1", "place 2", "place 3"):
        assert abs(rates[name] - 0.25) < 0.02, (name, rates)


def test_documents_are_short_and_varied(texts: list[str]) -> None:
    lengths = sorted(map(len, texts))
    assert lengths[len(lengths) // 2] < 300
    assert lengths[-1] < 2000
    assert len(set(texts)) > 0.995 * len(texts)
    everything = "\n".join(texts)
    for phrase in ("Q: ", "Therefore ", "Since ", "The children of", "She ", "His ", "- the "):
        assert phrase in everything
    assert not re.search(r"[{}]|\b(?:a [aeiou]|an [^aeiou])", everything)


def test_the_world_depends_on_the_seed_and_not_on_the_process() -> None:
    assert small_world.world(0).atomic != small_world.world(1).atomic
    code = (
        "from moetrain.data import builtin\n"
        "print(builtin.probe_items('commonsense', items=300, seed=3))\n"
        "print(list(builtin.documents('commonsense', size=50_000, seed=3)))"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": salt}, capture_output=True)
        for salt in ("1", "2")
    ]
    assert all(run.returncode == 0 for run in runs), runs
    assert runs[0].stdout == runs[1].stdout
