"""Planted and shuffled domains. The reader of the texts uses their numbers, not the code that generates them."""

import collections
import inspect
import json
import os
import re
import subprocess
import sys
from typing import get_args

import numpy as np
import pytest

from moetrain.config import SettingsError, describe_settings, load_settings
from moetrain.config.facts import FACT_OPTIONS, FactSettings
from moetrain.data import builtin
from moetrain.data.builtin import modular, random_answers
from moetrain.data.corpus import prepare_corpus
from moetrain.data.documents import DataError
from moetrain.data.packing import cut_samples
from moetrain.data.stream import training_stream, validation_streams
from moetrain.data.token_shards import shuffle
from moetrain.data.tokenizer import train_tokenizer

ALL = 10**9
OPERATIONS = ("add", "subtract", "multiply", "divide")
PLANTED = [
    *(("modular", {"operation": operation}) for operation in OPERATIONS),
    ("modular", {"modulus": 113, "trained_share": 0.3}),
    *(("random_answers", {"operation": operation}) for operation in OPERATIONS),
    ("random_answers", {"like": "math"}),
    *(("formal", {"rule": rule}) for rule in ("copy", "reverse", "brackets")),
]
each_domain = pytest.mark.parametrize(("name", "options"), PLANTED, ids=[f"{n}-{o}" for n, o in PLANTED])


def trained(name, seed=0, **options):
    return list(builtin.documents(name, size=ALL, seed=seed, **options))


def held_out(name, seed=0, **options):
    return list(builtin.held_out_documents(name, seed=seed, **options))


def question_and_answer(marked):
    start, end = marked.answer
    return marked.text[:start], marked.text[start:end]


def numbers(text):
    return [int(number) for number in re.findall(r"\d+", text)]


def relations(text, modulus):
    """Every additive and multiplicative fact that the three numbers of a text state in some order."""
    a, b, c = numbers(text)
    for x, y, z in ((a, b, c), (b, c, a), (a, c, b)):
        if (x + y - z) % modulus == 0:
            yield "additive", frozenset((x, y)), z
        if (x * y - z) % modulus == 0:
            yield "multiplicative", frozenset((x, y)), z


# Rules


@pytest.mark.parametrize("operation", OPERATIONS)
def test_modular_states_the_whole_table_correctly(operation):
    check = {
        "add": lambda a, b, c: (a + b - c) % 59 == 0,
        "subtract": lambda a, b, c: (a - b - c) % 59 == 0,
        "multiply": lambda a, b, c: (a * b - c) % 59 == 0,
        "divide": lambda a, b, c: (b * c - a) % 59 == 0,
    }[operation]
    both = [trained("modular", operation=operation), held_out("modular", operation=operation)]
    facts = [tuple(numbers(marked.text)) for part in both for marked in part]
    assert all(check(*fact) for fact in facts)
    assert len(set(facts)) == len(facts) == (59**2 if operation in ("add", "subtract") else 58**2)
    assert len(both[0]) / len(facts) == pytest.approx(0.6, abs=0.02)
    sign = {"add": "+", "subtract": "-", "multiply": "*", "divide": "/"}[operation]
    assert all(re.fullmatch(rf"\d\d {re.escape(sign)} \d\d = \d\d", m.text) for part in both for m in part)


@pytest.mark.parametrize("family", [OPERATIONS[:2], OPERATIONS[2:]])
@pytest.mark.parametrize("modulus", [7, 59])
def test_no_training_text_of_a_family_states_a_held_out_fact_in_any_order_or_inverse(family, modulus):
    kind = "additive" if family == OPERATIONS[:2] else "multiplicative"
    texts = [m.text for operation in family for m in trained("modular", operation=operation, modulus=modulus)]
    kept = [m.text for operation in family for m in held_out("modular", operation=operation, modulus=modulus)]
    asked = {
        relation
        for operation in family
        for item in builtin.probe_items("modular", items=ALL, seed=0, operation=operation, modulus=modulus)
        for relation in relations(f"{item['prompt']} {item.get('target') or item['choices'][item['answer']]}", modulus)
        if relation[0] == kind
    }

    def stated(text):
        # The statement with the sign of the text; its numbers may also fit another relation.
        a, b, c = numbers(text)
        inverse = "-" in text or "/" in text
        return kind, frozenset((b, c) if inverse else (a, b)), a if inverse else c

    trained_facts, kept_back = {stated(text) for text in texts}, {stated(text) for text in kept}
    assert len(trained_facts) > 10
    assert len(kept_back) > 5
    assert kept_back <= asked
    assert not trained_facts & kept_back
    assert not set(texts) & set(kept)


def test_the_split_depends_on_the_seed_and_is_balanced():
    splits = [modular.split(seed, 59, "additive", 0.6) for seed in (0, 1)]
    assert splits[0] != splits[1]
    for pairs, _ in splits:
        ordered = {fact for x, y in pairs for fact in ((x, y), (y, x))}
        for count in (
            collections.Counter(a for a, _ in ordered),
            collections.Counter((a + b) % 59 for a, b in ordered),
        ):
            assert set(count) == set(range(59))
            assert set(count.values()) <= {34, 35, 36, 37}


@pytest.mark.parametrize("rule", ["copy", "reverse", "brackets"])
@pytest.mark.parametrize("length", [6, 9])
def test_formal_follows_its_rule_and_no_training_text_holds_a_held_out_string(rule, length):
    def closed(string):
        """Whether all brackets are closed in the right order."""
        while (shorter := re.sub("05|16|27|38|49", "", string)) != string:
            string = shorter
        return not string

    texts, kept = (part("formal", rule=rule, length=length) for part in (trained, held_out))
    assert len(texts) == 1200
    assert len(kept) == 800
    everything = "\n".join(marked.text for marked in texts)
    for marked in [*texts, *kept]:
        word, string, _, answer = marked.text.split()
        assert word == rule
        assert len(string) == length
        truth = {"copy": answer == string, "reverse": answer[::-1] == string, "brackets": closed(string + answer)}
        assert truth[rule], marked
    for marked in kept:
        string = marked.text.split()[1]
        assert string not in everything
        assert string[::-1] not in everything


def test_copy_and_reverse_hold_out_the_same_strings():
    strings = [{m.text.split()[1] for m in held_out("formal", rule=rule)} for rule in ("copy", "reverse")]
    assert strings[0] == strings[1]


# Controls


@pytest.mark.parametrize("operation", OPERATIONS)
def test_random_answers_have_the_questions_and_the_answer_counts_of_the_rule(operation):
    for part in (trained, held_out):
        rule = [question_and_answer(marked) for marked in part("modular", operation=operation, sign="@")]
        null = [question_and_answer(marked) for marked in part("random_answers", operation=operation)]
        assert [question for question, _ in rule] == [question for question, _ in null]
        assert collections.Counter(a for _, a in rule) == collections.Counter(a for _, a in null)
        agree = np.mean([a == b for (_, a), (_, b) in zip(rule, null, strict=True)])
        assert agree < 0.035  # one in 59 by chance


def test_random_answers_like_math_are_uniform_and_each_pair_is_asked_in_one_order():
    seen, answers = set(), range(10, 100)
    for part in (trained, held_out):
        facts = [question_and_answer(marked) for marked in part("random_answers", like="math", count=3000)]
        counts = collections.Counter(int(answer) for _, answer in facts)
        assert set(counts) <= set(answers)
        assert max(counts.values()) - min(counts[answer] for answer in answers) <= 1
        operands = [frozenset(numbers(question)) for question, _ in facts]
        assert not seen & set(operands)
        assert len(set(operands)) == len(facts)
        seen |= set(operands)


def test_the_table_of_answers_is_fixed_by_seed_and_sign():
    def answers(**options):
        return [question_and_answer(marked)[1] for marked in trained("random_answers", **options)]

    first = answers()
    random_answers._like_modular.cache_clear()
    assert answers() == first
    assert np.mean(np.array(first) == np.array(answers(sign="!"))) < 0.035
    by_question = {seed: dict(map(question_and_answer, trained("random_answers", seed=seed))) for seed in (0, 1)}
    shared = set(by_question[0]) & set(by_question[1])
    assert len(shared) > 1000
    assert np.mean([by_question[0][q] == by_question[1][q] for q in shared]) < 0.04


# Baselines


def baselines(name, options):
    """Accuracy on held-out items of the most and least frequent training answers, overall and per operand."""
    table = [question_and_answer(marked) for marked in trained(name, **options)]
    overall = collections.Counter(answer for _, answer in table)
    by_operand = collections.defaultdict(collections.Counter)
    for question, answer in table:
        for place, operand in enumerate(numbers(question)):
            by_operand[place, operand][answer] += 1
    items = builtin.probe_items(name, items=ALL, seed=0, **options)
    scores = collections.defaultdict(list)
    ranked = [answer for answer, _ in overall.most_common()]
    for item in items:
        choices = item.get("choices")
        right = choices[item["answer"]] if choices else item["target"]
        kind = "choice" if choices else "open"
        for rank, guess in (("most", ranked[0]), ("least", ranked[-1])):
            if choices:
                guess = sorted(choices, key=lambda c: overall[c] * (1 if rank == "most" else -1))[-1]
            scores[kind, rank].append(guess == right)
        for place, operand in enumerate(numbers(item["prompt"])):
            counts = by_operand[place, operand]
            guess = max(choices or ranked, key=lambda c: counts[c])
            scores[kind, place].append(guess == right)
        for place in range(4 if choices else 0):
            scores[kind, "place", place].append(choices[place] == right)
            scores[kind, "rank", place].append(sorted(choices)[place] == right)
    return scores


@each_domain
def test_counting_answers_stays_at_chance(name, options):
    chance = {"choice": 0.25, "open": 1 / len({question_and_answer(m)[1] for m in trained(name, **options)})}
    scores = baselines(name, options)
    assert len(scores) >= 13
    for (kind, *what), right in scores.items():
        error = (chance[kind] * (1 - chance[kind]) / len(right)) ** 0.5
        assert len(right) >= 300
        assert np.mean(right) < chance[kind] + 3.5 * error, (kind, what)


# Form


@each_domain
def test_items_ask_for_each_fact_as_choice_and_open_in_the_words_of_the_text(name, options):
    for make, part, ending in (
        (builtin.probe_items, held_out, ""),
        (builtin.trained_items, trained, "_trained"),
    ):
        texts = {marked.text for marked in part(name, **options)}
        items = make(name, items=ALL, seed=0, **options)
        assert len({item["id"] for item in items}) == len(items) == 2 * len(texts)
        assert len({item["prompt"] for item in items}) == len(texts)
        assert [item["prompt"] for item in items[::2]] == [item["prompt"] for item in items[1::2]]
        assert make(name, items=9, seed=0, **options) == items[:9]
        for place, item in enumerate(items):
            assert (item["domain"], item["sep"]) == (name, " ")
            if place % 2 == 0:
                assert set(item) == {"domain", "task", "prompt", "choices", "answer", "sep", "id"}
                assert item["task"] == f"builtin_{name}{ending}"
                assert len(set(item["choices"])) == 4
                answer = item["choices"][item["answer"]]
            else:
                assert set(item) == {"domain", "task", "prompt", "target", "sep", "id"}
                assert item["task"] == f"builtin_{name}_open{ending}"
                answer = item["target"]
            whole = item["prompt"] + item["sep"] + answer
            assert any(whole + end in texts for end in ("", "."))


@each_domain
def test_every_fact_is_equally_long_and_its_answer_is_marked_exactly(name, options):
    texts = trained(name, **options)
    kept = held_out(name, **options)
    # With other text, as in a run: merges learned from it must not change the lengths of facts.
    beside = list(builtin.documents("math", size=50_000, seed=0))
    tokenizer = train_tokenizer([*beside, *(marked.text for marked in texts)], 500)
    lengths = set()
    for marked in [*texts[:400], *kept[:400]]:
        question, answer = question_and_answer(marked)
        ids = tokenizer.encode(marked.text)
        first, last = tokenizer.span(marked.text, ids, *marked.answer)
        lengths.add((len(ids), first, last))
        assert tokenizer.decode(ids[first:last]) == answer
        assert tokenizer.decode(ids[:first]) == question
    assert len(lengths) == 1
    assert {marked.heldout for marked in texts} == {False}
    assert {marked.heldout for marked in kept} == {True}


def test_a_smaller_size_is_a_prefix_and_the_table_ends():
    whole = trained("modular")
    part = list(builtin.documents("modular", size=100, seed=0))
    assert part == whole[: len(part)]
    assert 100 <= sum(len(marked.text) for marked in part) < 112
    assert len(whole) == len({marked.text for marked in whole}) < 59**2
    assert trained("modular", seed=1) != whole


def test_text_does_not_depend_on_the_process():
    code = (
        "import hashlib; from moetrain.data import builtin\n"
        "made = [(list(builtin.documents(n, size=10**9, seed=3)), list(builtin.held_out_documents(n, seed=3)),"
        " builtin.probe_items(n, items=50, seed=3), builtin.trained_items(n, items=50, seed=3))"
        " for n in builtin.PLANTED]\n"
        "print(hashlib.sha256(repr(made).encode()).hexdigest())"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": salt}, capture_output=True)
        for salt in ("1", "2")
    ]
    assert all(run.returncode == 0 for run in runs), runs
    assert runs[0].stdout == runs[1].stdout


# Answer spans


def test_a_span_holds_every_token_that_overlaps_it():
    tokenizer = train_tokenizer(["banana band and bandana " * 50], 290)
    for text in ("banana and band", "é ban\u2581ana 🎉 and"):
        ids = tokenizer.encode(text)
        sizes = tokenizer.token_bytes()[ids]
        begin = np.cumsum(sizes) - sizes
        for start in range(len(text)):
            for end in range(start + 1, len(text) + 1):
                span = range(len(text[:start].encode()), len(text[:end].encode()))
                touching = [n for n in range(len(ids)) if set(span) & set(range(begin[n], begin[n] + sizes[n]))]
                assert list(range(*tokenizer.span(text, ids, start, end))) == touching
    with pytest.raises(ValueError, match="not those of the text"):
        tokenizer.span("banana", tokenizer.encode("band"), 0, 1)


def planted_corpus(tmp_path, *overrides):
    settings = load_settings(
        None,
        [
            f"data.cache_dir={tmp_path}",
            "data.seq_len=32",
            "panel.tokens=8",
            "tokenizer.vocab_size=400",
            "train.batch_rows=2",
            *overrides,
        ],
    )
    return settings, prepare_corpus(settings)


def test_samples_of_planted_domains_mark_their_answers_in_every_copy(tmp_path):
    settings, corpus = planted_corpus(
        tmp_path,
        "data.domains.rule.builtin=modular",
        "data.domains.rule.repeats=3",
        "data.domains.null.builtin=random_answers",
    )
    stream = training_stream(corpus, settings)
    samples = stream.samples
    assert len(samples) == 4 * len(trained("modular"))
    assert len(set(samples.document.tolist())) == len(samples)
    assert (samples.answer_length == 2).all()
    expected = collections.Counter(
        {marked.text: 3 for marked in trained("modular")} | {m.text: 1 for m in trained("random_answers")}
    )
    found = collections.Counter()
    for sample in range(len(samples)):
        ids = stream.sequence(sample)[1:-1]
        text = corpus.tokenizer.decode(ids)
        start, length = samples.answer_start[sample], samples.answer_length[sample]
        assert corpus.tokenizer.decode(ids[start : start + length]) == text[-2:]
        found[text] += 1
    assert found == expected
    for name, stream in validation_streams(corpus, settings, 2).items():
        texts = {corpus.tokenizer.decode(stream.sequence(int(s))) for s in stream.rows.samples}
        kept = {m.text for m in held_out("modular" if name == "rule" else "random_answers")}
        assert texts <= kept
        assert len(texts) > 500


def test_lines_may_mark_an_answer_and_a_wrong_mark_is_a_bad_line(tmp_path):
    records = [
        {"text": "The capital of Peru is Lima, on the coast.", "answer": [23, 41]},
        {"text": "No answer is marked in this text at all."},
        {"text": "Here the field holds a word.", "answer": "word"},
        {"text": "Here it holds the number of a choice.", "answer": 2},
    ]
    wrong = [[5], [3, 3], [0, 99], [-1, 2], ["0", 2], [True, 2], [5, 2], []]
    records += [{"text": f"Wrong mark {n}.", "answer": answer} for n, answer in enumerate(wrong)]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, records)))
    base = [f"data.root={tmp_path}", "data.domains.d.path=d.jsonl", "data.heldout_share=1e-9"]
    _, corpus = planted_corpus(tmp_path, *base, "data.max_bad_share=0.7", "data.seq_len=10")
    domain = corpus.domains[0]
    assert domain.report.bad == len(wrong)
    assert "d.jsonl:5: answer [5] marks no characters of the text (13 long)" in domain.report.bad_places[0]
    assert (domain.index["answer_start"] >= 0).tolist() == [True, False, False, False]
    marked = domain.index[0]
    ids = domain.tokens[marked["start"] :][marked["answer_start"] : marked["answer_end"]]
    assert corpus.tokenizer.decode(ids).strip() == "Lima, on the coast"
    with pytest.raises(DataError, match="8 of 12 lines cannot be used"):
        planted_corpus(tmp_path / "other", *base)
    held = 0
    for seq_len in range(8, 40):
        samples = cut_samples(corpus, seq_len, heldout=False)
        for sample in np.flatnonzero(samples.answer_length):
            start = samples.start[sample] + samples.answer_start[sample]
            assert samples.document[sample] == marked["id"]
            assert domain.tokens[start : start + samples.answer_length[sample]].tolist() == ids.tolist()
            assert samples.answer_start[sample] + samples.answer_length[sample] <= samples.length[sample]
        assert (samples.answer_length > 0).sum() <= 1
        held += (samples.answer_length > 0).sum()
    assert 0 < held < 32  # if a cut divides the answer, no sample holds it


# Shuffled


def test_shuffling_keeps_each_documents_tokens_and_destroys_their_order(make_settings, tmp_path):
    plain = prepare_corpus(make_settings())
    model = tmp_path / "t.model"
    plain.tokenizer.save(model)
    settings = make_settings("data.domains.sums.shuffled=true", f"tokenizer.model={model}")
    corpus = prepare_corpus(settings)
    again = prepare_corpus(
        settings.model_copy(update={"data": settings.data.model_copy(update={"cache_dir": str(tmp_path)})})
    )
    other = prepare_corpus(make_settings("data.domains.sums.shuffled=true", f"tokenizer.model={model}", "run.seed=1"))
    assert np.array_equal(plain.domains[0].tokens, corpus.domains[0].tokens)
    before, after = plain.domains[1], corpus.domains[1]
    for column in ("start", "length", "text_bytes", "heldout"):
        assert np.array_equal(before.index[column], after.index[column])
    assert not np.isin(after.index["id"], before.index["id"]).any()
    assert np.array_equal(after.tokens, again.domains[1].tokens)
    assert not np.array_equal(after.tokens, other.domains[1].tokens)
    moved = 0.0
    for document in after.index:
        here = slice(document["start"], document["start"] + document["length"])
        ordered, scattered = before.tokens[here], after.tokens[here]
        assert np.array_equal(np.sort(ordered), np.sort(scattered))
        assert scattered.tolist() == shuffle(ordered.tolist(), 0, int(document["id"]))
        moved += np.mean(ordered[1:] == np.roll(scattered, 1)[1:])
    assert moved / len(after.index) < 0.2


def test_a_run_may_use_a_domain_both_in_order_and_shuffled(make_settings):
    settings = make_settings(
        "data.domains.noise.path=sums.jsonl", "data.domains.noise.shuffled=true", "data.domains.noise.repeats=2"
    )
    sums, noise = prepare_corpus(settings).domains[1:]
    assert noise.report.documents == sums.report.documents > 300
    assert noise.report.duplicates == 0
    assert not np.isin(noise.index["id"], sums.index["id"]).any()
    assert len(np.unique(noise.index["id"])) == len(noise.index)


def test_shuffled_answers_are_not_marked(tmp_path):
    _, corpus = planted_corpus(tmp_path, "data.domains.d.builtin=modular", "data.domains.d.shuffled=true")
    assert (corpus.domains[0].index["answer_start"] == -1).all()
    assert (cut_samples(corpus, 32, heldout=False).answer_length == 0).all()


# Options


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (
            ["builtin=modular", "facts.count=9"],
            ["facts.count has no effect with builtin modular: remove it", "facts.sign"],
        ),
        (["builtin=math", "facts.modulus=7"], ["facts.modulus has no effect with builtin math: remove it"]),
        (["path=x", "facts.modulus=7"], ["facts.modulus has no effect with path: remove it"]),
        (
            ["builtin=random_answers", "facts.like=math", "facts.modulus=7"],
            ["facts.modulus has no effect with builtin random_answers like math: remove it", "facts.count"],
        ),
        (
            ["builtin=random_answers", "facts.count=7"],
            ["facts.count has no effect with builtin random_answers: remove"],
        ),
        (["builtin=modular", "facts.modulus=57"], ["facts.modulus", "must be a prime such as 59", "57"]),
        (["builtin=modular", "facts.modulo=57"], ["facts.modulo", "did you mean data.domains.d.facts.modulus?"]),
        (["builtin=modular", "facts.operation=plus"], ["facts.operation", "'subtract'"]),
        (["builtin=modular", "facts.sign=ab"], ["facts.sign", "one visible character"]),
        (["builtin=modular", "facts.sign='3'"], ["facts.sign", "no digit"]),
        (["builtin=modular", "facts.trained_share=1"], ["facts.trained_share", "less than 1"]),
    ],
)
def test_a_wrong_option_is_one_line_with_key_and_remedy(overrides, parts):
    with pytest.raises(SettingsError) as caught:
        load_settings(None, [f"data.domains.d.{override}" for override in overrides])
    message = str(caught.value)
    assert "\n" not in message
    assert "data.domains.d" in message
    for part in parts:
        assert part in message


def test_settings_describe_the_options_and_defaults_of_the_built_in_domains(tmp_path):
    described = {key.rpartition(".")[2]: meaning for key, *_, meaning in describe_settings() if ".facts." in key}
    assert set(described) == set(FactSettings.model_fields)
    for name, table in builtin.TABLES.items():
        parameters = dict(list(inspect.signature(table).parameters.items())[1:])
        taken = {key for kind, keys in FACT_OPTIONS.items() if kind.split()[0] == name for key in keys}
        assert set(parameters) == taken
        for option, parameter in parameters.items():
            if option != "sign":
                assert f"default {parameter.default})" in described[option]
    assert get_args(modular.Operation) == OPERATIONS
    settings = load_settings(None, ["data.domains.d.builtin=modular", "data.domains.d.facts.modulus=7"])
    (tmp_path / "saved.yaml").write_text(settings.to_yaml())
    assert load_settings(tmp_path / "saved.yaml") == settings
    assert settings.data.domains["d"].facts.given() == {"modulus": 7}


def test_impossible_tables_and_unknown_names_are_errors(tmp_path):
    with pytest.raises(DataError, match=r"data\.domains\.d: there are hardly 3000 strings of length 5: lower count"):
        planted_corpus(
            tmp_path,
            "data.domains.d.builtin=formal",
            "data.domains.d.facts={rule: brackets, length: 5, count: 3000}",
        )
    with pytest.raises(DataError, match=r"data\.domains\.d: count 5000 .* there are 4005 facts like math"):
        planted_corpus(
            tmp_path, "data.domains.d.builtin=random_answers", "data.domains.d.facts={like: math, count: 5000}"
        )
    with pytest.raises(DataError, match=r"data\.domains\.d: no built-in domain 'modula': did you mean 'modular'"):
        planted_corpus(tmp_path, "data.domains.d.builtin=modula")
    with pytest.raises(ValueError, match=r"'math' takes no option 'modulus': none"):
        builtin.documents("math", size=1, seed=0, modulus=7)
    with pytest.raises(ValueError, match="prime from 5 to 199, got 57"):
        builtin.documents("modular", size=1, seed=0, modulus=57)
    with pytest.raises(ValueError, match="leaves no facts to train or to test"):
        builtin.documents("modular", size=1, seed=0, trained_share=0.0001)
    with pytest.raises(ValueError, match="'code' has no table of trained facts"):
        builtin.trained_items("code", items=1, seed=0)
