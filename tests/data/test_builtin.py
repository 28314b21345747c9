"""The built-in domains. The reader of arithmetic below does not use the generator's wording, only the numbers."""

import ast
import collections
import hashlib
import itertools
import math
import os
import random
import re
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain.data import builtin
from moetrain.data.builtin import arithmetic, operands, phrases
from moetrain.data.builtin.arithmetic_facts import held_out_pairs, show_held_out

WRITTEN = ("code", "math")  # for the planted domains see test_study_domains.py
ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
VALUES = {word: value for value, word in enumerate([*ONES.split(), "eighteen", "nineteen"])}
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
VALUES |= {word: 10 * place for place, word in enumerate(TENS.split(), 2)} | {"hundred": 100}
SPELLED = re.compile(rf"\b(?:{'|'.join(VALUES)})(?:[ -](?:{'|'.join(VALUES)}))*\b")
LABEL = re.compile(r"^(?:- |([a-z])\) |(\d+)\. )")
EXPRESSION = r"\(*\d+\)*(?: *[-+*/] *\(*\d+\)*)*"
CHAIN = re.compile(rf"(?<![-+*/] )(?<![\w.$:*/+-]){EXPRESSION}(?: *= *{EXPRESSION})*")
UNSAID = (  # numbers that a text rests on without showing them: words that all occur, then the number
    (("weeks", "days"), 7),
    (("dozen",), 12),
    (("years", "months"), 12),
    (("days", "hours"), 24),
    (("hours", "minutes"), 60),
    (("minutes", "seconds"), 60),
    (("cm", "mm"), 10),
    (("metres", "cm"), 100),
    (("km", "metres"), 1000),
    (("wice",), 2),
    (("ouble",), 2),
    (("Half",), 2),
    (("quarter",), 4),
    (("square", "perimeter"), 4),
    (("rectangle", "perimeter"), 2),
    (("fence",), 2),
    (("average",), 2),
    (("halfway",), 2),
)


def is_held_out(family: str, a: int, b: int) -> bool:
    return (min(a, b), max(a, b)) in held_out_pairs(family)


def in_figures(text: str) -> str:
    def value(match: re.Match[str]) -> str:
        total = 0
        for word in re.split("[ -]", match[0]):
            total = total * 100 if word == "hundred" else total + VALUES[word]
        return str(total)

    text = SPELLED.sub(value, text)
    text = re.sub(r"\$(\d+)\.(\d\d)\b", lambda match: str(100 * int(match[1]) + int(match[2])), text)
    text = re.sub(r"(\d+) h (\d+) min\b", r"\1 * 60 + \2", text)
    text = re.sub(r"(?<=\d) x (?=\d)", " * ", text)
    return text.replace("×", "*").replace("÷", "/").replace("//", "/")


def problems(text: str) -> Iterator[str]:
    """Each paragraph is a problem; after a title each line is one, together with its line of the answer key."""
    paragraphs = in_figures(text).split("\n\n")
    while paragraphs:
        title, *lines = paragraphs.pop(0).split("\n")
        if re.search(r"\d", title) or not title.endswith(":"):
            yield "\n".join([title, *lines])
            continue
        if paragraphs and paragraphs[0].startswith("Answers:\n"):
            key = paragraphs.pop(0).split("\n")[1:]
            assert [LABEL.match(line)[0] for line in lines] == [LABEL.match(line)[0] for line in key]
            lines = [f"{line} {LABEL.sub('', answer)}" for line, answer in zip(lines, key, strict=True)]
        yield from (LABEL.sub("", line) for line in lines)


def numbers_of(problem: str) -> list[int]:
    unsaid = [number for words, number in UNSAID if all(word in problem for word in words)]
    return [int(number) for number in re.findall(r"\d+", problem)] + unsaid


def facts_in(problem: str) -> Iterator[tuple[str, int, int]]:
    """Every fact whose operands and result are among the numbers, whatever the wording."""
    numbers = numbers_of(problem)
    for a, b in itertools.combinations(numbers, 2):
        if a + b in numbers:
            yield "additive", a, b
        if a * b in numbers:
            yield "multiplicative", a, b


def evaluate(node: ast.expr, facts: list[tuple[str, int, int]]) -> Fraction:
    """The value of an expression, noting the fact behind each of its steps."""
    if isinstance(node, ast.Constant):
        return Fraction(node.value)
    assert isinstance(node, ast.BinOp)
    left, right = evaluate(node.left, facts), evaluate(node.right, facts)
    if isinstance(node.op, ast.Add):
        facts.append(("additive", left, right))
        return left + right
    if isinstance(node.op, ast.Sub):
        facts.append(("additive", right, left - right))
        return left - right
    if isinstance(node.op, ast.Mult):
        facts.append(("multiplicative", left, right))
        return left * right
    facts.append(("multiplicative", right, left / right))
    return left / right


def chains(text: str) -> Iterator[tuple[list[Fraction], list[tuple[str, int, int]]]]:
    """The values between equals signs, and the facts that the steps rest on."""
    for match in CHAIN.finditer(in_figures(text)):
        if match[0].count("(") == match[0].count(")") and re.search("[-+*/=]", match[0]):
            facts: list[tuple[str, int, int]] = []
            yield [evaluate(ast.parse(side.strip(), mode="eval").body, facts) for side in match[0].split("=")], facts


def held_out_in(text: str) -> list[tuple[str, int, int]]:
    facts = [fact for problem in problems(text) for fact in facts_in(problem)]
    facts += [fact for _, noted in chains(text) for fact in noted]
    return [fact for fact in facts if is_held_out(*fact)]


@pytest.fixture(scope="module")
def training_text() -> list[str]:
    return list(builtin.documents("math", size=2_000_000, seed=5))


@pytest.fixture(scope="module")
def math_items() -> list[dict]:
    return builtin.probe_items("math", items=6000, seed=7)


# Held-out facts


def test_a_tenth_of_the_facts_is_held_out_and_the_choice_is_fixed() -> None:
    for family in ("additive", "multiplicative"):
        pairs = held_out_pairs(family)
        assert 0.09 < len(pairs) / math.comb(99, 2) < 0.11
        assert all(is_held_out(family, a, b) and is_held_out(family, b, a) for a, b in pairs)
        assert not any(is_held_out(family, small, other) for small in (0, 1) for other in range(1000))
        assert not any(is_held_out(family, 100, other) for other in range(1000))
    both = sorted(held_out_pairs("additive")), sorted(held_out_pairs("multiplicative"))
    # Runs are compared with earlier ones. With another choice they would train on what those hold out.
    assert hashlib.sha256(repr(both).encode()).hexdigest()[:16] == "1f63ede714c2eb58"


@given(st.lists(st.integers(0, 250), max_size=6))
def test_show_held_out_is_the_search_over_all_triples(numbers: list[int]) -> None:
    expected = any(
        result in numbers and is_held_out(family, a, b)
        for a in numbers
        for b in numbers
        for family, result in (("additive", a + b), ("multiplicative", a * b))
    )
    assert show_held_out(numbers) == expected


def test_training_text_states_no_held_out_fact(training_text: list[str]) -> None:
    found = [(text, held) for text in training_text if (held := held_out_in(text))]
    assert not found, found[:3]


@pytest.mark.parametrize("form", dict.fromkeys(arithmetic.FORMS), ids=lambda form: form.texts[0][:30])
def test_the_reader_finds_held_out_facts_in_every_form(form: arithmetic.Form) -> None:
    """Without the guard the reader finds them, so finding none above shows that the guard works."""
    if form.pattern in (operands.pair, operands.triplet, operands.digits, operands.rounding):
        return  # these state no sum and no product
    if form.pattern(lambda: 0.5, 2).get("k", 0) >= 100:
        return  # a factor of 100 or 1000: no small fact
    stream = random.Random(0)
    for text in form.texts + form.worded:
        spell = text in form.worded and stream.random() < 0.5
        for _ in range(100_000):
            numbers = form.pattern(stream.random, 2)
            if not show_held_out(numbers.values()) or (spell and max(numbers.values()) > 999):
                continue
            shown = {name: arithmetic.SPELLED[value] for name, value in numbers.items()} if spell else numbers
            if held_out_in(text.format_map(arithmetic.words(stream.random) | shown)):
                break
        else:
            pytest.fail(f"never found in {text!r}")


def test_the_reader_finds_held_out_facts_in_lists_and_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operands, "show_held_out", lambda numbers: False)
    texts = list(builtin.documents("math", size=500_000, seed=0))
    lists = [text for text in texts if re.match(r"[^\d\n]+:\n", text)]
    keys = [text for text in lists if "\n\nAnswers:\n" in text]
    assert len(keys) > 50
    for group in (keys, lists, texts):
        # One fact in ten is held out if both operands are small, as in most facts.
        assert sum(bool(held_out_in(text)) for text in group) / len(group) > 0.05


def test_worked_steps_are_correct_and_state_no_held_out_fact() -> None:
    stream = random.Random(1).random
    for kind in phrases.SINGLE + phrases.GROUPS["stories"]:
        for _ in range(500):
            work = kind.work.format_map(operands.draw(stream, kind.pattern, 2))
            steps = list(chains(work))
            assert steps
            assert all(len(set(values)) == 1 for values, _ in steps), work
            assert not held_out_in(work), work


# The text


def test_every_stated_answer_is_correct(training_text: list[str]) -> None:
    equations = triples = clocks = 0
    other = re.compile(
        "Which is larger|larger of|larger number|small|order|greater|max|min|Round|<|>|digit|hundreds|before|:\\d"
    )
    for text in training_text:
        for values, _ in chains(text):
            equations += len(values) > 1
            assert len(set(values)) == 1, text
        for problem in problems(text):
            numbers = numbers_of(problem)
            if len(numbers) == 3 and not other.search(problem):
                triples += 1
                assert any(c in (a + b, a * b) for a, b, c in itertools.permutations(numbers)), problem
            if clock := re.search(r"It is (\d+):(\d+).*in (\d+) minutes\?\nA: (\d+):(\d+)", problem):
                hour, minute, later, hour_then, minute_then = map(int, clock.groups())
                clocks += 1
                assert 60 * hour + minute + later == 60 * hour_then + minute_then
    assert equations > 5000
    assert triples > 5000
    assert clocks > 20


def test_math_documents_are_short_and_varied(training_text: list[str]) -> None:
    lengths = sorted(map(len, training_text))
    assert lengths[0] >= 20
    assert lengths[len(lengths) // 2] < 300
    assert sum(length > 800 for length in lengths) / len(lengths) < 0.01
    assert lengths[-1] < 2000
    assert len(set(training_text)) > 0.999 * len(training_text)
    words = collections.Counter(re.sub(r"\d+", "#", text) for text in training_text)
    assert len(words) > 0.6 * len(training_text)
    everything = "\n".join(training_text)
    for phrase in ("carry", "borrow", "Worksheet:", "Answers:", "Question:", "$", "weeks", "remainder", "twenty-"):
        assert phrase in everything
    assert "{" not in everything


def test_operands_cover_the_range_and_small_ones_are_more_likely(training_text: list[str]) -> None:
    pairs = collections.Counter()
    for text in training_text:
        pairs.update((int(a), int(b)) for a, b in re.findall(r"\b(\d+) \+ (\d+)\b", text))
    small = {pair for pair in pairs if max(pair) < 100}
    assert len(small) > 2500
    assert all(any(low <= max(pair) < low + 100 for pair in pairs) for low in range(0, 1000, 100))
    assert sum(pairs[pair] for pair in small) > 0.6 * pairs.total()


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(WRITTEN), st.integers(0, 60_000), st.integers(0, 60_000), st.integers(0, 2**40))
def test_a_smaller_size_is_a_prefix(name: str, size: int, other: int, seed: int) -> None:
    size, larger = sorted((size, other))
    texts = list(builtin.documents(name, size=size, seed=seed))
    assert texts == list(builtin.documents(name, size=larger, seed=seed))[: len(texts)]
    given_bytes = [len(text.encode()) for text in texts]
    assert sum(given_bytes) >= size
    assert sum(given_bytes[:-1]) < size or not texts


def test_text_depends_on_the_seed_and_not_on_the_process() -> None:
    for name in WRITTEN:
        first, second = (list(builtin.documents(name, size=50_000, seed=seed)) for seed in (0, 1))
        assert first != second
    code = (
        "import hashlib; from moetrain.data import builtin\n"
        "texts = [t for name in ('code', 'math') for t in builtin.documents(name, size=50_000, seed=3)]\n"
        "items = builtin.probe_items('math', items=50, seed=3)\n"
        "items += builtin.probe_items('code', items=20, seed=3, held_out=texts)\n"
        "print(hashlib.sha256(repr((texts, items)).encode()).hexdigest())"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": salt}, capture_output=True)
        for salt in ("1", "2")
    ]
    assert all(run.returncode == 0 for run in runs), runs
    assert runs[0].stdout == runs[1].stdout


# Probe items


def test_math_items_are_well_formed_and_their_answers_correct(math_items: list[dict]) -> None:
    assert len(math_items) == 6000
    assert len({item["prompt"] for item in math_items}) == len({item["id"] for item in math_items}) == 6000
    tasks = collections.Counter(item["task"] for item in math_items)
    assert tasks == {"builtin_math": 3000, "builtin_math_open": 3000}
    for item in math_items:
        assert item["domain"] == "math"
        assert item["sep"] == " "
        if item["task"] == "builtin_math":
            assert set(item) == {"domain", "task", "prompt", "choices", "answer", "sep", "id"}
            assert len(set(item["choices"])) == 4
            answer = item["choices"][item["answer"]]
        else:
            assert set(item) == {"domain", "task", "prompt", "target", "sep", "id"}
            answer = item["target"]
        # By the reader of the training text the fact is held out and the equation is true.
        whole = f"{item['prompt']} {answer}"
        assert held_out_in(whole), item
        assert all(len(set(values)) == 1 for values, _ in chains(whole)), item


def test_math_item_prompts_are_in_the_style_of_the_training_text(
    math_items: list[dict], training_text: list[str]
) -> None:
    def bare(text: str) -> str:
        names = "|".join(itertools.chain(phrases.NAMES, phrases.THINGS, phrases.HOLDERS, phrases.PLACES))
        return re.sub(r"\d+", "#", re.sub(rf"\b(?:{names})\b", "@", text))

    everything = bare("\n\n".join(training_text))
    forms = {bare(item["prompt"]) for item in math_items}
    assert len(forms) > 250
    assert all(form + " #" in everything for form in forms)


def test_no_baseline_is_above_chance(math_items: list[dict], training_text: list[str]) -> None:
    """Baselines: place, rank, distance, frequency in the training text anywhere or as an answer, and digits."""
    everything = "\n".join(training_text)
    seen = collections.Counter(re.findall(r"\d+", everything))
    answered = collections.Counter(re.findall(r" (\d+)\.?$", everything, re.MULTILINE))
    products = collections.Counter(re.findall(r"[×*] ?\d+ = (\d+)", everything))
    tie = random.Random(0).random
    measures: dict[str, Callable[[list[str], int], float]] = {
        "anywhere": lambda choices, i: seen[choices[i]],
        "answers": lambda choices, i: answered[choices[i]],
        "products": lambda choices, i: products[choices[i]],
        "value": lambda choices, i: int(choices[i]),
        "distance": lambda choices, i: sum(abs(int(choices[i]) - int(other)) for other in choices),
        "digits": lambda choices, i: sum(x == y for other in choices for x, y in zip(choices[i], other, strict=True)),
        "last digit": lambda choices, i: int(choices[i][-1]),
    }
    items = [item for item in math_items if "choices" in item]
    for item in items:
        assert len({len(choice) for choice in item["choices"]}) == 1
    by_operation = {"all": items}
    for item in items:
        a, b = map(int, re.findall(r"\d+", item["prompt"]))
        right = int(item["choices"][item["answer"]])
        operation = {a + b: "sum", abs(a - b): "difference", a * b: "product"}.get(right, "quotient")
        by_operation.setdefault(operation, []).append(item)
    assert len(by_operation) == 5
    for operation, group in by_operation.items():
        tolerance = 4.5 * math.sqrt(0.25 * 0.75 / len(group))
        places = collections.Counter(item["answer"] for item in group)
        ranks = collections.Counter(
            sorted(map(int, item["choices"])).index(int(item["choices"][item["answer"]])) for item in group
        )
        rates = {f"place {k}": places[k] / len(group) for k in range(4)}
        rates |= {f"rank {k}": ranks[k] / len(group) for k in range(4)}
        for name, measure in measures.items():
            for best in (max, min):
                right = [
                    best(range(4), key=lambda i: (measure(item["choices"], i), tie())) == item["answer"]
                    for item in group
                ]
                rates[f"{best.__name__} {name}"] = sum(right) / len(group)
        assert all(abs(rate - 0.25) < tolerance for rate in rates.values()), (operation, tolerance, rates)


# Code


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty standard library, to be filled."""
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    return tmp_path


def _write(root: Path, name: str, text: str | bytes) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())


def _texts(seed: int = 0) -> list[str]:
    return list(builtin.documents("code", size=10**9, seed=seed))


def test_code_skips_tests_tables_and_installed_packages(library: Path) -> None:
    kept = {"a.py": "a = 1\n", "pack/b.py": "b = 'é'\n", "encodings/idna.py": "c = 3\n", "testing.py": "d = 4\n"}
    for name, text in kept.items():
        _write(library, name, text)
    for folder in (
        "test",
        "x/tests",
        "idlelib/idle_test",
        "lib2to3/tests",
        "site-packages/y",
        "__pycache__",
        "pydoc_data",
    ):
        _write(library, f"{folder}/left.py", "left = 0\n")
    _write(library, "encodings/cp1.py", "decoding_table = ('left')\n")
    _write(library, "_sysconfigdata__linux_.py", "left = 0\n")
    _write(library, "latin.py", b"left = '\xe9'\n")
    _write(library, "empty.py", "")
    _write(library, "blank.py", "\n \n")
    _write(library, "readme.txt", "left")
    assert sorted(_texts()) == sorted(kept.values())


def test_the_order_of_code_depends_on_seed_and_path_only(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in range(20):
        _write(library, f"d{place % 3}/m{place}.py", f"x = {place}\n")
    texts = _texts()
    assert texts != sorted(texts)
    assert texts != _texts(seed=1)
    assert sorted(texts) == sorted(_texts(seed=1))
    walk = os.walk
    monkeypatch.setattr(os, "walk", lambda root: ((a, b, c[::-1]) for a, b, c in reversed(list(walk(root)))))
    assert _texts() == texts
    assert list(builtin.documents("code", size=1, seed=0)) == texts[:1]


def test_a_long_file_is_cut_before_definitions(library: Path) -> None:
    small = "@decorate(\n    1,\n)\n@again\ndef f():\n    '''\nnot a definition\n    '''\n" + "    x = 1\n" * 500
    large = "async def g():\n" + "    x = 1\n" * 6000
    tail = "class C:\n" + "    x = 1\n" * 1000
    text = "import os\n" + small * 12 + large + tail * 3
    _write(library, "long.py", text)
    _write(library, "short.py", text[:50_000])
    pieces = sorted(_texts(), key=len)
    pieces.remove(text[:50_000])
    ordered = sorted(pieces, key=text.index)
    assert "".join(ordered) == text
    assert len(ordered) == 4
    assert max(len(piece) for piece in pieces) == len(large)  # a definition is never cut itself
    assert all(piece.startswith(("@decorate", "async def", "class")) for piece in ordered[1:])
    assert not any(piece.rstrip().endswith((")", "@again")) for piece in ordered)


def test_the_real_library_is_large_and_parses() -> None:
    texts = list(builtin.documents("code", size=3_000_000, seed=0))
    assert sum(len(text.encode()) for text in texts) >= 3_000_000
    assert len(set(texts)) == len(texts)
    items = builtin.probe_items("code", items=200, seed=0, held_out=texts)
    assert len(items) == 200
    some = texts[:40]
    first = builtin.probe_items("code", items=100, seed=0, held_out=some)
    assert len(first) == 100
    assert first == builtin.probe_items("code", items=100, seed=0, held_out=reversed(some))
    assert first[:50] == builtin.probe_items("code", items=50, seed=0, held_out=some)
    assert first != builtin.probe_items("code", items=100, seed=1, held_out=some)
    assert len({item["id"] for item in items}) == 200
    for item in items:
        assert set(item) == {"domain", "task", "prompt", "target", "sep", "id"}
        assert (item["domain"], item["task"], item["sep"]) == ("code", "builtin_code", "")
        assert any(item["prompt"] + item["target"] in text for text in texts)
        assert 20 <= len(item["target"]) <= 400
        whole = "if True:\n" + item["prompt"] + item["target"] if item["prompt"][0] == " " else None
        function = ast.parse(whole or item["prompt"] + item["target"]).body[0]
        function = function.body[0] if isinstance(function, ast.If) else function
        assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        assert ast.get_docstring(function)
        assert len(function.body) > 1


HELD_OUT = '''
class C:
    @property
    def size(self, x=")"):
        """How many.

        Indeed.\x0c
        """
        # Why not.
        return len(self.values) + x

async def plain(x):
    "One line."
    await something(x)
    return x + 1

def undocumented(x):
    return something(x) + 1

def brief(x):
    """Body too short."""
    return x

def on_one_line(x): "doc"; return something_long(x)

def only():
    """No body at all, only this."""
'''


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_code_items_are_documented_functions(line_end: str) -> None:
    held_out = [HELD_OUT.replace("\n", line_end), "def broken(:\n", "nul \0", "", HELD_OUT]
    items = builtin.probe_items("code", items=9, seed=0, held_out=held_out)
    assert sorted((item["prompt"].split("(")[0].split()[-1], item["target"]) for item in items) == [
        ("plain", "    await something(x)\n    return x + 1"),
        ("size", "        # Why not.\n        return len(self.values) + x"),
    ]
    assert builtin.probe_items("code", items=0, seed=0, held_out=held_out) == []
    assert builtin.probe_items("code", items=5, seed=0) == []


# Names


def test_an_unknown_domain_name_gets_a_suggestion() -> None:
    with pytest.raises(ValueError, match=r"'maths'.*'math'"):
        builtin.documents("maths", size=1, seed=0)
    with pytest.raises(ValueError, match=r"'cod'.*'code'"):
        builtin.probe_items("cod", items=1, seed=0)
    with pytest.raises(ValueError, match="size"):
        builtin.documents("math", size=-1, seed=0)
    with pytest.raises(ValueError, match="items"):
        builtin.probe_items("math", items=-1, seed=0)
