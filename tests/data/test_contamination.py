import gzip
import itertools
import json
import os
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain.config import load_settings
from moetrain.data import contamination
from moetrain.data.contamination import (
    clean,
    contaminated,
    words_of,
)
from moetrain.data.documents import Document, is_heldout
from moetrain.data.items import read_all_items

WORDS = [f"w{number}" for number in range(40)]


def item(prompt, target=None, *, choices=None, answer=0, task="t", name="a", sep=" "):
    rest = {"target": target or ""} if choices is None else {"choices": choices, "answer": answer}
    return {"domain": "d", "task": task, "id": name, "prompt": prompt, "sep": sep, **rest}


def is_found(probe, *texts):
    report = contaminated([probe], texts)
    assert len(report.found) == report.tasks[probe["task"]].contaminated
    return bool(report.found)


def counts(report):
    return {task: (each.items, each.too_short, each.contaminated) for task, each in report.tasks.items()}


# The rule


@pytest.mark.parametrize("length", [13, 14, 30])
def test_thirteen_consecutive_words_are_found_and_twelve_are_not(length):
    probe = item(" ".join(WORDS[:length]))
    for start in range(length - 12):
        assert is_found(probe, "before " + " ".join(WORDS[start : start + 13]) + " after")
    for start in range(length - 11):
        assert not is_found(probe, "before " + " ".join(WORDS[start : start + 12]) + " after")


@pytest.mark.parametrize("length", range(1, 13))
def test_all_words_of_a_short_prompt_must_occur_and_very_short_ones_are_not_searched_for(length):
    probe = item(" ".join(WORDS[:length]))
    report = contaminated([probe], ["before " + " ".join(WORDS[:length]) + " after"])
    assert counts(report) == {"t": (1, int(length < 4), int(length >= 4))}
    assert not is_found(probe, " ".join(WORDS[: length - 1]), " ".join(WORDS[1:length]))


def test_punctuation_case_and_line_breaks_make_no_difference():
    probe = item("Question: Don't the CATS — all nine of them! — sleep?\nAnswer:", "yes")
    assert is_found(probe, "x don't\nthe cats: all (nine) of_them, SLEEP x")
    assert not is_found(probe, "x dont the cats all nine of them sleep x")
    assert words_of("Ärger_um 3,5 kg²—naïve") == ["ärger", "um", "3", "5", "kg²", "naïve"]


def test_words_are_not_joined_from_one_text_to_the_next():
    probe = item("one two three four")
    assert not is_found(probe, "one two", "three four")
    assert is_found(probe, "one two", "three four", "one two three four")


def test_the_right_answer_counts_and_a_wrong_choice_does_not():
    choices = ["the red fox sleeps", "the blue whale sings", "the old dog barks"]
    probe = item("Who would sleep out in the long and very dark night of winter", choices=choices, answer=1)
    assert is_found(probe, "in the long and very dark night of winter the blue whale sings")
    assert not is_found(probe, "in the long and very dark night of winter the red fox sleeps")
    assert not is_found(probe, *choices)
    short = item("Then", choices=choices, answer=2)
    assert is_found(short, "and then the old dog barks")
    assert not is_found(short, "and then the red fox sleeps", "and then the blue whale sings")
    assert [each.part for each in contaminated([short], ["then the old dog barks"]).found] == ["answer"]


def test_the_target_of_a_code_item_counts():
    probe = item("def f(a):\n    return", "a + a + a + a + a + a + a + a + a + a", sep=" ")
    assert is_found(probe, "def f(a): return" + " + a" * 10)
    assert is_found(item("count down fr", "om ten", sep=""), "count down from ten")


def test_the_frame_of_a_question_is_not_part_of_the_item():
    assert counts(contaminated([item("Question: Why is it?\nAnswer:", "")], ["question why is it answer"])) == {
        "t": (1, 1, 0)
    }
    short = item("Question: What is heat?\nAnswer:", "energy")
    assert is_found(short, "what is heat: energy")
    assert is_found(short, "Problem: What is heat? Answer: energy.")
    assert not is_found(short, "Problem: What is heat? Answer: no idea.")
    long = item(f"Question: {' '.join(WORDS[:20])}\nAnswer:", " ".join(WORDS[20:]))
    text = f"{' '.join(WORDS[:20])} answer {' '.join(WORDS[20:])}".split()
    for start in range(8, 20):
        assert is_found(long, " ".join(text[start : start + 14]))
        assert not is_found(long, " ".join(text[start : start + 13])), "twelve words of the item"
    assert not is_found(long, " ".join([*text[8:20], "answer"])), "the frame's word is not one of thirteen"


def test_held_out_documents_do_not_count_as_training_text():
    probe, text = item("one two three four"), "one two three four five"
    assert not is_found(probe, Document(text, 7, True, len(text)))
    report = contaminated([probe], [Document("other", 5, False, 5), Document(text, 7, False, len(text)), text])
    assert [(each.where, each.words) for each in report.found] == [("0000000000000007", "one two three four")]
    assert contaminated([probe], ["x", text, text]).found[0].where == "text 1"


def test_items_are_counted_per_task_and_contaminated_ones_removed():
    items = [
        item("one two three four", task="b", name="1"),
        item("one two three four", task="a", name="1"),
        item("four three two one", task="a", name="2"),
        item("one", task="a", name="3"),
    ]
    report = contaminated(iter(items), iter(["zero one two three four"]))
    assert counts(report) == {"b": (1, 0, 1), "a": (3, 1, 1)}
    assert report.tasks["a"].share == 0.5
    assert [(each.task, each.id) for each in report.found] == [("b", "1"), ("a", "1")]
    assert clean(items, report) == items[2:]
    assert json.loads(json.dumps(report.as_dict()))["tasks"]["b"]["contaminated"] == 1
    assert contaminated([], ["text"]).tasks == {}
    assert counts(contaminated(items, [])) == {"b": (1, 0, 0), "a": (3, 1, 0)}


# Against an independent, slow reference


def reference(probe, text):
    """Whether a text holds an item, by comparing all pairs of runs."""

    def words(text):
        spaced = "".join(c if c.isalnum() else " " for c in text.lower())
        return spaced.split()

    def runs(words, n):
        return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}

    framed = re.fullmatch(r"Question: (.*)\nAnswer:", probe["prompt"], re.DOTALL)
    asked = words(framed[1] if framed else probe["prompt"])
    right = words(probe["target"] if "target" in probe else probe["choices"][probe["answer"]])
    there = words(text)
    for whole in (asked, asked + right):
        if len(whole) >= 4 and runs(whole, min(13, len(whole))) & runs(there, min(13, len(whole))):
            return True
    if not framed or len(asked + right) < 4:
        return False
    for start in range(len(asked)):  # with the word of the frame between them
        for end in range(1, len(right) + 1):
            n = len(asked) - start + end
            if n == 13 or (n == len(asked + right) and n < 13):
                run = (*asked[start:], "answer", *right[:end])
                if run in runs(there, n + 1):
                    return True
    return False


few = st.lists(st.sampled_from(["a", "b", "C"]), max_size=18).map(" ".join)
probes = st.lists(
    st.tuples(few, few, st.booleans(), st.booleans()).map(
        lambda drawn: item(
            f"Question: {drawn[0]}\nAnswer:" if drawn[2] else drawn[0],
            **({"target": drawn[1]} if drawn[3] else {"choices": ["a a a a", drawn[1]], "answer": 1}),
        )
    ),
    max_size=6,
)
pieces = st.lists(st.sampled_from(["a", "b", "c", "A. b", "answer", "c-a-b"]), max_size=60).map(" ".join)


@settings(deadline=None, max_examples=150)
@given(probes, st.lists(pieces, max_size=4), st.data(), st.sampled_from([1, 40, 10**6]), st.booleans())
def test_the_report_equals_that_of_a_slow_reference(items, texts, data, batch, collide):
    items = [{**probe, "id": str(number)} for number, probe in enumerate(items)]
    for probe in items:  # texts that hold most of an item
        whole = words_of(probe["prompt"].removeprefix("Question:") + " " + probe.get("target", ""))
        cut = data.draw(st.integers(0, 3))
        texts.append(" ".join(whole[cut:]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contamination, "_BATCH_CHARACTERS", batch)
        if collide:  # hashes with many collisions
            patch.setattr(contamination, "_word_hashes", lambda words: np.array([len(w) for w in words], np.uint64))
        report = contaminated(items, texts)
    wanted = {
        probe["id"]: f"text {next(n for n, text in enumerate(texts) if reference(probe, text))}"
        for probe in items
        if any(reference(probe, text) for text in texts)
    }
    assert {each.id: each.where for each in report.found} == wanted


def test_many_items_and_long_texts_agree_with_the_reference():
    random = np.random.default_rng(0)
    words = [f"w{n}" for n in range(300)]
    text = " ".join(random.choice(words, 20_000))
    there = text.split()
    items = []
    for number in range(400):
        start, length = random.integers(0, 19_000), int(random.integers(4, 40))
        run = there[start : start + length]
        if number % 2:
            run[int(random.integers(length))] = "other"
        items.append(item(" ".join(run), name=str(number)))
    report = contaminated(items, [text[: len(text) // 2], text[len(text) // 2 :]])
    found = {each.id for each in report.found}
    joined = [" ".join(there)]
    for probe in items:
        wanted = words_of(probe["prompt"])
        n = min(13, len(wanted))
        runs = [" ".join(wanted[i : i + n]) for i in range(len(wanted) - n + 1)]
        if probe["id"] in found:
            assert any(f" {run} " in f" {joined[0]} " for run in runs)
        elif probe["id"] not in found:
            halves = [f" {half} " for half in (text[: len(text) // 2], text[len(text) // 2 :])]
            assert not any(f" {run} " in half for run in runs for half in halves)
    assert 200 <= len(found) < 400


# Files and settings


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def chosen(folder, *overrides):
    return load_settings(None, [f"data.root={folder}", "data.domains.d.path=text.jsonl", *overrides])


@pytest.fixture
def folder(tmp_path):
    """Text, some of it held out, and items of two tasks: in training text, in held-out text, and in neither."""
    texts = [f"number {n} is a text of {n + 1} and {n * n} things" for n in range(1000)]
    heldout = [text for text in texts if is_heldout(text, 0.01)]
    train = next(text for text in texts if not is_heldout(text, 0.01))
    assert heldout
    write(tmp_path / "text.jsonl", [{"text": text} for text in texts])
    asked = {"train": train, "heldout": heldout[0], "none": "nobody wrote this yet"}
    write(tmp_path / "bench" / "t.jsonl", [item(text, "?", name=name) for name, text in asked.items()])
    asked = {"train": train, "x": "x"}
    write(tmp_path / "bench" / "u.jsonl.gz", [item(text, "?", task="u", name=name) for name, text in asked.items()])
    return tmp_path


def test_the_tool_prints_a_table_and_lists_the_items(folder, capsys):
    main = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "prepare_data.py"))["main"]
    (folder / "run.yaml").write_text("data: {domains: {d: {path: text.jsonl}}}\n")
    ours = [f"data.root={folder}", f"data.cache_dir={folder}/cache", "tokenizer.vocab_size=300"]
    files = [str(path) for path in sorted((folder / "bench").iterdir())]
    listed = folder / "found.json"
    given = [str(folder / "run.yaml"), *ours, "--contaminated-json", str(listed)]
    assert main([*given, "--probes", *files]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "task items too short contaminated share t 3 0 1 33.33% u 2 1 1 100.00% all 5 1 2 50.00%" in shown
    found = json.loads(listed.read_text())
    assert [(each["task"], each["id"]) for each in found["contaminated"]] == [("t", "train"), ("u", "train")]
    listed.unlink()
    assert main([*given, "probes.tasks=[bench/t.jsonl]"]) == 0
    assert list(json.loads(listed.read_text())["tasks"]) == ["t"]
    capsys.readouterr()
    assert main(given) == 2
    assert main([*given, "--probes", str(folder / "none.jsonl")]) == 2
    assert "--contaminated-json needs probe items" in "".join(capsys.readouterr())


@pytest.mark.skipif("MOETRAIN_DATA" not in os.environ, reason="MOETRAIN_DATA names no folder of real text")
def test_real_benchmarks_against_real_text():
    root = Path(os.environ["MOETRAIN_DATA"])
    items = read_all_items(root / "bench" / f"{name}.jsonl.gz" for name in ("gsm8k", "arc_easy", "sciq"))
    with gzip.open(root / "train" / "math.jsonl.gz", "rt") as file:
        texts = [json.loads(line)["text"] for line in itertools.islice(file, 2000)]
    report = contaminated(items, texts)
    assert [task for task in report.tasks] == ["gsm8k", "arc_easy", "sciq"]
    assert sum(each.contaminated for each in report.tasks.values()) <= 0.01 * len(items), "the text was kept clean"
    planted = [f"{texts[0]}\n{probe['prompt']} {probe['sep']}" for probe in items[::50]]
    found = {each.id for each in contaminated(items, [*texts, *planted]).found}
    assert {probe["id"] for probe in items[::50] if len(words_of(probe["prompt"])) >= 6} <= found
