import copy
import json
import math
import statistics
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain.distributed.mesh import ParallelLayout
from moetrain.model_input import PackedTokens
from moetrain.probes.requests import Request, make_requests, pack_requests, scored_hidden_states, split_prompt
from moetrain.probes.scoring import prepare, score
from moetrain.probes.tasks import ENOUGH, tasks_of
from tests.distributed.layouts import in_ranks
from tests.probes.conftest import item, small_model, some_items
from tests.probes.references import answer_tokens, log_probability, logits, mean_and_error, parted

LONG = 10_000


def scored(model, tokenizer, items, context_tokens=LONG, batch_tokens=256):
    return score(model, prepare(tasks_of(items), tokenizer, context_tokens, batch_tokens), ParallelLayout())


# Values


@pytest.mark.parametrize("context_tokens", [LONG, 40])
def test_log_probabilities_equal_those_of_one_choice_at_a_time(model, tokenizer, context_tokens):
    items = some_items()
    found = scored(model, tokenizer, items, context_tokens)
    assert list(found) == ["mc", "open", "text"]
    cut = 0
    for name, result in found.items():
        assert [each["id"] for each in result.task.items] == [each["id"] for each in items if each["task"] == name]
        for each, values in zip(result.task.items, result.log_probs, strict=True):
            answers = each.get("choices", [each.get("target")])
            slow = [
                log_probability(model, tokenizer, each["prompt"], each["sep"] + answer, context_tokens)[0]
                for answer in answers
            ]
            assert values == pytest.approx(slow, abs=1e-4)
        cut += result.cut
    assert (cut > 0) == (context_tokens == 40)


def test_metrics_are_their_definitions(model, tokenizer):
    items = some_items(30)
    found = scored(model, tokenizer, items)
    slow = {name: [] for name in ("accuracy", "accuracy_per_character", "soft", "bpb", "chance")}
    for each in (each for each in items if each["task"] == "mc"):
        sums = [log_probability(model, tokenizer, each["prompt"], " " + choice)[0] for choice in each["choices"]]
        by_character = [total / len(choice) for total, choice in zip(sums, each["choices"], strict=True)]
        right = each["answer"]
        slow["accuracy"].append(float(sums.index(max(sums)) == right))
        slow["accuracy_per_character"].append(float(by_character.index(max(by_character)) == right))
        slow["soft"].append(math.exp(sums[right]) / math.fsum(map(math.exp, sums)))
        slow["bpb"].append(-sums[right] / math.log(2) / len(each["choices"][right].encode()))
        slow["chance"].append(1 / len(each["choices"]))
    assert 0 < statistics.mean(slow["accuracy"]) < 1
    assert slow["accuracy"] != slow["accuracy_per_character"]
    metrics = found["mc"].metrics
    assert metrics.keys() == {"accuracy", "accuracy_per_character", "accuracy_centred", "soft", "bpb"}
    for name in ("accuracy", "accuracy_per_character", "soft", "bpb"):
        mean, error = mean_and_error(slow[name])
        assert (metrics[name].value, metrics[name].error) == pytest.approx((mean, error), rel=1e-4)
        assert metrics[name].n == 30
        assert metrics[name].high - metrics[name].low == pytest.approx(2 * 1.96 * error, rel=1e-3)
    chance = statistics.mean(slow["chance"])
    assert found["mc"].task.chance == pytest.approx(chance)
    centred = metrics["accuracy_centred"]
    assert centred.value == pytest.approx((metrics["accuracy"].value - chance) / (1 - chance))
    assert centred.error == pytest.approx(metrics["accuracy"].error / (1 - chance))
    assert found["mc"].correct.tolist() == [bool(x) for x in slow["accuracy"]]


def test_the_last_layer_is_scored_in_float32_so_that_choices_do_not_tie(tokenizer):
    """In bf16 the first of two choices would win each tie."""
    model = small_model(tokenizer.vocab_size, initializer_range=0.02)
    model.dtype = torch.bfloat16
    digits = [str(digit) for digit in range(10)]
    items = [item(f"{n} plus {n}", n % 10, task="mc", name=str(n), choices=digits) for n in range(40)]
    found = scored(model, tokenizer, items)["mc"]
    assert found.ties == 0
    assert all(len(set(row.tolist())) == 10 for row in found.log_probs)
    rounded = [torch.from_numpy(row).bfloat16().tolist() for row in found.log_probs]
    assert all(len(set(row)) < 10 for row in rounded)  # of numbers that bf16 cannot tell apart


def test_a_tie_counts_in_part_and_the_order_of_choices_does_not_matter(model, tokenizer):
    choices = {"a": ["Ada", "Ada", "Ben"], "b": ["Ben", "Ada", "Ada"], "c": ["Ada", "Ben", "Ben"]}
    items = [
        item("Who?", choices[name].index(right), task="mc", name=f"{name}{right}", choices=choices[name])
        for name in choices
        for right in ("Ada", "Ben")
    ]
    found = scored(model, tokenizer, items)["mc"]
    wins = "Ada" if found.log_probs[0][0] > found.log_probs[0][2] else "Ben"
    twice = {name for name in choices if choices[name].count(wins) == 2}
    expected = [
        (0.5 if name in twice else 1.0) if right == wins else 0.0 for name in choices for right in ("Ada", "Ben")
    ]
    assert found.metrics["accuracy"].value == pytest.approx(statistics.mean(expected))
    assert found.metrics["accuracy_per_character"].value == found.metrics["accuracy"].value
    assert found.correct.tolist() == [value == 1.0 for value in expected]
    assert found.ties == found.summary()["ties"] == found.as_dict()["ties"] == len(twice)


def test_open_answers_and_long_texts(model, tokenizer):
    items = some_items()
    # One target is the greedy answer of the model.
    context = tokenizer.encode("3 plus 3 is")
    greedy = int(logits(model, [tokenizer.begin_id, *context])[-1].argmax())
    text = tokenizer.decode([*context, greedy])[len("3 plus 3 is") :]
    assert tokenizer.encode("3 plus 3 is" + text) == [*context, greedy], (
        "the greedy answer must be encoded as the same token"
    )
    items.append(item("3 plus 3 is", text, task="open", name="greedy", sep=""))
    found = scored(model, tokenizer, items)
    opened = [each for each in items if each["task"] == "open"]
    slow = [log_probability(model, tokenizer, x["prompt"], x["sep"] + x["target"]) for x in opened]
    assert found["open"].correct.tolist() == [greedy for _, greedy in slow]
    assert found["open"].correct[-1]
    bits = []
    for each in opened:
        answer = each.get("solution", each["target"])
        nats, _ = log_probability(model, tokenizer, each["prompt"], each["sep"] + answer)
        bits.append(-nats / math.log(2) / len(answer.encode()))
    assert found["open"].metrics["bpb"].value == pytest.approx(statistics.mean(bits), rel=1e-4)
    assert found["open"].metrics.keys() == {"accuracy", "accuracy_centred", "bpb"}
    assert found["open"].task.chance == 1 / len(opened)
    assert found["text"].task.kind == "likelihood"
    assert found["text"].metrics.keys() == {"bpb"}
    assert found["text"].correct is None


def test_the_bytes_of_a_cut_answer_are_those_that_remain(model, tokenizer):
    text = "Ada has a candle, so the candle belongs to Ada. " * 4
    only = item("Say:", text.strip(), task="long", sep=" ")
    whole = tokenizer.encode("Say: " + text.strip())
    found = scored(model, tokenizer, [only], context_tokens=20)["long"]
    kept = tokenizer.decode(whole[-20:])
    nats, _ = log_probability(model, tokenizer, "Say:", " " + text.strip(), 20)
    assert found.cut == 1
    assert found.metrics["bpb"].value == pytest.approx(-nats / math.log(2) / len(kept.encode()), rel=1e-4)
    assert math.isnan(found.metrics["bpb"].error)


def test_what_begins_another_request_is_read_with_it(model, tokenizer):
    begin = tokenizer.begin_id

    def asked(*tokens, first):
        return Request(np.array([begin, *tokens], np.int32), first)

    # Two choices of one token, a longer one of the same prompt, another prompt, and the beginning of the first.
    requests = [
        asked(5, 6, 7, first=3),
        asked(5, 6, 8, first=3),
        asked(5, 6, 8, 9, 10, first=3),
        asked(5, 7, 8, first=3),
        asked(5, 6, first=2),
    ]
    (batch,) = pack_requests(requests, tokenizer.end_id, LONG)
    assert batch.spans_X2.tolist() == [[0, 5], [5, 3], [8, 56]]  # and the padding
    assert sorted(batch.requests.tolist()) == [0, 1, 2, 3, 4]
    hidden_KD = scored_hidden_states(model, batch)
    starts = np.cumsum(batch.counts) - batch.counts
    for number, start, count in zip(batch.requests, starts, batch.counts, strict=True):
        request = requests[number]
        assert batch.targets_K[start : start + count].tolist() == request.tokens[request.first :].tolist()
        (alone,) = pack_requests([request], tokenizer.end_id, LONG)
        assert torch.allclose(hidden_KD[start : start + count], scored_hidden_states(model, alone), atol=1e-4)


def test_batches_change_results_only_by_rounding(model, tokenizer):
    items = some_items()
    alone = scored(model, tokenizer, items, batch_tokens=1)
    prepared = prepare(tasks_of(items), tokenizer, LONG, 1)
    texts = {request.tokens[:-1].tobytes() for request in prepared.requests}
    assert 1 < len(prepared.batches) <= len(texts)
    for batch_tokens in (300, 100_000):
        found = scored(model, tokenizer, items, batch_tokens=batch_tokens)
        for name, result in found.items():
            for one, other in zip(result.log_probs, alone[name].log_probs, strict=True):
                assert np.allclose(one, other, atol=1e-4)
    again = scored(model, tokenizer, items, batch_tokens=300)
    for name, result in scored(model, tokenizer, items, batch_tokens=300).items():
        assert all(map(np.array_equal, result.log_probs, again[name].log_probs))


def test_ranks_share_a_reading(model, tokenizer):
    prepared = prepare(tasks_of(some_items()), tokenizer, LONG, 256)
    whole = score(model, prepared, ParallelLayout())
    for joined in in_ranks(3, lambda layout: score(model, prepared, layout)):
        for name, result in whole.items():
            assert all(map(np.array_equal, result.log_probs, joined[name].log_probs))
            assert result.metrics == joined[name].metrics
            assert np.array_equal(result.correct, joined[name].correct)


def test_a_reading_converts_to_json_and_flags_too_few_items(model, tokenizer):
    items = some_items(ENOUGH)
    found = scored(model, tokenizer, [each for each in items if each["task"] == "mc"] + items[1:20:3])
    assert not found["mc"].too_few
    assert found["open"].too_few
    record = json.loads(json.dumps(found["mc"].as_dict(), allow_nan=False))
    assert record["accuracy"] == found["mc"].metrics["accuracy"].value
    assert record["accuracy_error"] == found["mc"].metrics["accuracy"].error
    assert record["n"] == ENOUGH
    assert record["items"][3] == {"id": "3", "choice_logprobs": found["mc"].log_probs[3].tolist()}
    json.dumps(scored(model, tokenizer, items[1:2])["open"].as_dict(), allow_nan=False)


# No effect on training


def test_scoring_does_not_affect_training(tokenizer):
    def trained(with_probes):
        model = small_model(tokenizer.vocab_size, initializer_range=0.02, balancing="bias")
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        prepared = prepare(tasks_of(some_items(4)), tokenizer, LONG, 256)
        for step in range(3):
            if with_probes:
                model.train(step % 2 == 0)
                score(model, prepared, ParallelLayout())
                assert model.training == (step % 2 == 0)
            tokens = torch.randint(0, tokenizer.vocab_size, (1, 64))
            output = model(PackedTokens.one_sample_per_row(tokens, tokens.roll(-1)))
            output.loss_sum.backward()
            if with_probes:  # accumulated gradients must stay
                kept = [p.grad.clone() for p in model.parameters() if p.grad is not None]
                score(model, prepared, ParallelLayout())
                now = [p.grad for p in model.parameters() if p.grad is not None]
                assert all(map(torch.equal, kept, now))
            optimizer.step()
            optimizer.zero_grad()
        return copy.deepcopy(model.state_dict()), torch.random.get_rng_state(), np.random.get_state()[1].tolist()

    plain, probed = trained(False), trained(True)
    assert all(torch.equal(one, probed[0][name]) for name, one in plain[0].items())
    assert torch.equal(plain[1], probed[1])
    assert plain[2] == probed[2]


# Splitting prompt and answer


@pytest.mark.parametrize(
    ("prompt", "sep", "answer", "context", "rest"),
    [
        ("Who?", " ", "Ada", "Who?", " Ada"),
        ("Who? ", "", "Ada", "Who?", " Ada"),
        ("Who?  ", " ", "Ada", "Who?", "   Ada"),
        ("Who?", "", "Ada", "Who?", "Ada"),
        ("Solution:", "\n", "42", "Solution:", "\n42"),
        ("def f():\n", "", "    pass", "def f():", "\n    pass"),
        (" ", "", "Ada", "", " Ada"),
    ],
)
def test_trailing_white_space_of_the_prompt_moves_to_the_answer(tokenizer, prompt, sep, answer, context, rest):
    assert split_prompt(prompt, sep + answer) == (context, rest)
    (request,) = make_requests([(prompt, sep, answer)], tokenizer, LONG)
    assert request.tokens[0] == tokenizer.begin_id
    assert request.tokens[1:].tolist() == tokenizer.encode(context + rest)
    assert request.first == 1 + len(tokenizer.encode(context))
    assert (request.characters, request.bytes_, request.cut) == (len(answer), len(answer.encode()), False)


texts = st.text(st.sampled_from("ab \n.é7▁😀"), min_size=1, max_size=12)


@given(texts, st.sampled_from(["", " ", "\n"]), texts, st.integers(1, 12))
@settings(max_examples=300, deadline=None)
def test_any_text_is_split_by_the_rule_and_has_a_scored_token(tokenizer, prompt, sep, answer, context_tokens):
    assert split_prompt(prompt, sep + answer) == parted(prompt, sep + answer)
    (request,) = make_requests([(prompt, sep, answer)], tokenizer, context_tokens)
    tokens, count = answer_tokens(tokenizer, prompt, sep + answer, context_tokens)
    assert request.tokens.tolist() == tokens
    assert request.read <= context_tokens
    assert 1 <= request.first < len(request.tokens)
    if count >= 1:
        assert len(request.tokens) - request.first == count
    assert request.cut == (len(tokenizer.encode(prompt + sep + answer)) > context_tokens)


def test_a_token_shared_by_prompt_and_answer_is_scored(tokenizer):
    one = next(
        word
        for word in ("candle", "belongs", "plus", "Ada", "has")
        if len(tokenizer.encode("so " + word)) == len(tokenizer.encode("so " + word[:-1]))
    )
    (request,) = make_requests([("so " + one[:-1], "", one[-1])], tokenizer, LONG)
    assert request.first == len(request.tokens) - 1
    assert request.bytes_ == 1


# Cost


def four_choice_items(count=200):
    rng = np.random.default_rng(0)
    words = np.array(["Ada", "Ben", "Cleo", "has", "a", "bread", "candle", "so", "the", "drum", "belongs", "to", "12"])

    def text(low, high):
        return " ".join(rng.choice(words, rng.integers(low, high)))

    return [
        item(f"{text(5, 25)}?", number % 4, task="mc", name=str(number), choices=[text(1, 7) for _ in range(4)])
        for number in range(count)
    ]


def test_batches_have_little_padding(tokenizer):
    prepared = prepare(tasks_of(four_choice_items()), tokenizer, LONG, 4096)
    needed = sum(request.read for request in prepared.requests)
    assert len(prepared.requests) == 800
    assert max(request.read for request in prepared.requests) <= 128
    assert prepared.tokens <= 1.02 * needed
    # No batch is much longer than requested, and together they hold each request once.
    assert max(len(batch.tokens_N) for batch in prepared.batches) <= 4096 + 128
    assert sorted(np.concatenate([batch.requests for batch in prepared.batches]).tolist()) == list(range(800))


@pytest.mark.slow
def test_scoring_takes_little_longer_than_its_forward_passes(tokenizer):
    model = small_model(tokenizer.vocab_size, hidden_size=128, num_hidden_layers=4, intermediate_size=64)
    prepared = prepare(tasks_of(four_choice_items()), tokenizer, LONG, 4096)

    @torch.no_grad()
    def forward_only():
        """The same requests in the order given, each predicting all its tokens."""
        waiting = list(prepared.requests)
        while waiting:
            row, length = [], 0
            while waiting and length + waiting[0].read <= 4096:
                row.append(waiting.pop(0))
                length += row[-1].read
            reads = [each.read for each in row]
            starts = np.cumsum(reads) - reads
            arrays = {
                "tokens_BT": np.concatenate([each.tokens[:-1] for each in row]),
                "targets_BT": np.concatenate([each.tokens[1:] for each in row]),
                "positions_BT": np.concatenate([np.arange(read) for read in reads]),
                "slots_BT": np.zeros(length),
                "recorded_BT": np.full(length, -1),
            }
            inputs = {name: torch.from_numpy(array.astype(np.int64))[None] for name, array in arrays.items()}
            model(PackedTokens(**inputs, spans_N2=torch.from_numpy(np.stack([starts, reads], 1)), slots_per_row=1))

    seconds = {forward_only: [], score: []}
    for _ in range(6):
        for function, arguments in ((forward_only, ()), (score, (model, prepared, ParallelLayout()))):
            began = time.process_time()
            function(*arguments)
            seconds[function].append(time.process_time() - began)
    ratio = statistics.median(seconds[score][1:]) / statistics.median(seconds[forward_only][1:])
    assert ratio <= 1.3, f"scoring takes {ratio:.2f} times as long as its forward passes"
