import random

import numpy as np
import pytest
import torch

from moetrain.distributed.mesh import ParallelLayout
from moetrain.model_input import PackedTokens
from moetrain.probes.generation import generate, is_exact, is_generated
from moetrain.probes.scoring import prepare, score
from moetrain.probes.tasks import tasks_of
from tests.distributed.layouts import in_ranks
from tests.probes.conftest import item, small_model, some_items
from tests.probes.references import logits, mean_and_error

ONE_RANK = ParallelLayout()
NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva")


def fact(name, number):
    return f"{number} plus {name} is", f"{name}{number}"


FACTS = [fact(name, number) for name in NAMES for number in range(3)]


@pytest.fixture(scope="module")
def trained(tokenizer):
    """A model trained to memorize the facts, each between its marks."""
    torch.set_num_threads(1)  # the autouse fixture runs later
    model = small_model(tokenizer.vocab_size, initializer_range=0.05)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    texts = [[tokenizer.begin_id, *tokenizer.encode(f"{a} {b}"), tokenizer.end_id] for a, b in FACTS]
    tokens = torch.tensor([t for text in texts for t in text])[None]
    positions = torch.cat([torch.arange(len(text)) for text in texts])[None]
    lengths = [len(text) for text in texts]
    spans = torch.tensor(list(zip(np.cumsum(lengths) - lengths, lengths, strict=True)))
    targets = tokens.roll(-1).clone()
    targets[tokens == tokenizer.end_id] = -100
    zeros = torch.zeros_like(tokens)
    inputs = PackedTokens(tokens, targets, positions, slots_BT=zeros, recorded_BT=zeros - 1, spans_N2=spans)
    for _ in range(60):
        output = model(inputs)
        (output.loss_sum / tokens.numel()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model


def questions(facts):
    return [item(prompt, target, task="facts", name=prompt) for prompt, target in facts]


def scored(model, tokenizer, items, max_new_tokens=16, layout=ONE_RANK):
    prepared = prepare(tasks_of(items), tokenizer, 64, 256)
    return score(model, prepared, layout, max_new_tokens)


def test_memorized_facts_are_answered_exactly(trained, tokenizer):
    found = scored(trained, tokenizer, questions(FACTS))["facts"].metrics
    assert (found["exact_match"].value, found["exact_match"].n) == (1.0, len(FACTS))
    assert found["accuracy"].value == 1.0
    wrong = questions([(prompt, target if n % 4 else target + "0") for n, (prompt, target) in enumerate(FACTS)])
    found = scored(trained, tokenizer, wrong)["facts"].metrics["exact_match"]
    assert (found.value, found.error) == pytest.approx(mean_and_error([float(n % 4 > 0) for n in range(len(FACTS))]))
    # Greedy accuracy and exact match differ where the target is a prefix of the answer.
    short = questions([(prompt, target[:-1]) for prompt, target in FACTS])
    found = scored(trained, tokenizer, short)["facts"].metrics
    assert found["exact_match"].value == 0.0
    assert found["accuracy"].value > 0.5
    assert scored(trained, tokenizer, questions(FACTS), max_new_tokens=1)["facts"].metrics["exact_match"].value == 0.0
    assert "exact_match" not in scored(trained, tokenizer, questions(FACTS), max_new_tokens=0)["facts"].metrics


def test_ranks_share_the_questions(trained, tokenizer):
    items = questions([(prompt, target if n % 3 else "?") for n, (prompt, target) in enumerate(FACTS)])
    whole = scored(trained, tokenizer, items)["facts"].metrics["exact_match"]
    assert 0 < whole.value < 1
    for joined in in_ranks(3, lambda layout: scored(trained, tokenizer, items, layout=layout)):
        assert joined["facts"].metrics["exact_match"] == whole


def slow_answer(model, tokenizer, prompt, context_tokens, most):
    """One prompt, one token at a time, with all logits."""
    tokens = [tokenizer.begin_id, *tokenizer.encode(prompt)]
    new = []
    for _ in range(most):
        read = tokens + new
        if len(read) > context_tokens:
            read = [read[0], *read[len(read) - context_tokens + 1 :]]
        token = int(logits(model, read)[-1].argmax())
        if token == tokenizer.end_id:
            break
        new.append(token)
        if "\n" in tokenizer.decode(new).strip(" "):
            break
    return tokenizer.decode(new)


@pytest.mark.parametrize("context_tokens", [64, 9])
def test_batched_answers_equal_those_of_one_prompt_at_a_time(trained, tokenizer, context_tokens):
    rng = random.Random(3)
    prompts = [prompt for prompt, _ in FACTS[:6]] + ["Ada has", "", "Dan plus Eva", "3 plus 3 plus 3 plus 3 is"]
    rng.shuffle(prompts)
    ids = [np.array([tokenizer.begin_id, *tokenizer.encode(prompt)]) for prompt in prompts]
    found = generate(trained, ids, tokenizer, ParallelLayout(), context_tokens, 40, 12)
    assert found == [slow_answer(trained, tokenizer, prompt, context_tokens, 12) for prompt in prompts]
    assert generate(trained, ids, tokenizer, ParallelLayout(), context_tokens, 1000, 12) == found
    assert generate(trained, [], tokenizer, ParallelLayout(), context_tokens, 40, 12) == []


@pytest.mark.parametrize(
    ("text", "target", "same"),
    [
        (" 42", "42", True),
        ("\n42\nand more", "42", True),
        ("42.", "42", True),
        (" 42 .", "42", True),
        ("4.2", "4.2", True),
        ("42", "42.", True),
        ("421", "42", False),
        ("4 2", "42", False),
        ("Ada", "ada", False),
        ("", "42", False),
        ("\n", "42", False),
        ("it is 42", "42", False),
    ],
)
def test_an_exact_match_compares_the_first_line(text, target, same):
    assert is_exact(text, item("?", target)) == same


def test_only_short_answers_without_worked_solutions_are_generated(model, tokenizer):
    items = some_items(4)
    kinds = {task.name: is_generated(task) for task in tasks_of(items)}
    assert kinds == {"mc": False, "open": False, "text": False}
    plain = [{key: value for key, value in each.items() if key != "solution"} for each in items]
    assert [task.name for task in tasks_of(plain) if is_generated(task)] == ["open"]
    found = scored(model, tokenizer, items)
    assert not any("exact_match" in each.metrics for each in found.values())
