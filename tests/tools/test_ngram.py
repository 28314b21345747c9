"""Kneser-Ney on arrays, compared with an implementation of the definition on dictionaries."""

import collections
import itertools
import math
from collections.abc import Callable

import ngram
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

Sequences = list[list[int]]


def nats(train: Sequences, test: Sequences, order: int, vocab_size: int) -> float:
    return ngram.kneser_ney_nats([np.array(s, int) for s in train], [np.array(s, int) for s in test], order, vocab_size)


def reference(train: Sequences, order: int, vocab_size: int) -> Callable[[tuple[int, ...], int], float]:
    """The probability of a token after a history from the start of its sequence."""
    occurrences: dict[tuple[int, ...], int] = collections.Counter()
    starting: dict[tuple[int, ...], int] = collections.Counter()
    before: dict[tuple[int, ...], set[int]] = collections.defaultdict(set)
    for sequence in train:
        for end in range(2, len(sequence) + 1):  # the first token is not predicted
            for start in range(max(end - order, 0), end):
                gram = tuple(sequence[start:end])
                occurrences[gram] += 1
                if start == 0:
                    starting[gram] += 1
                else:
                    before[gram].add(sequence[start - 1])
    adjusted = {
        gram: count if len(gram) == order else len(before[gram]) + starting[gram] for gram, count in occurrences.items()
    }

    def probability(history: tuple[int, ...], token: int) -> float:
        context = history[len(history) - order + 1 :] if len(history) >= order else history
        return backed_off(context, token)

    def backed_off(context: tuple[int, ...], token: int) -> float:
        lower = backed_off(context[1:], token) if context else 1 / vocab_size
        after = {gram[-1]: a for gram, a in adjusted.items() if gram[:-1] == context}
        if not after:
            return lower
        of_length = [a for gram, a in adjusted.items() if len(gram) == len(context) + 1]
        n1, n2 = of_length.count(1), of_length.count(2)
        discount = n1 / (n1 + 2 * n2) if n1 else 0.5
        return (max(after.get(token, 0) - discount, 0) + discount * len(after) * lower) / sum(after.values())

    return probability


def reference_nats(train: Sequences, test: Sequences, order: int, vocab_size: int) -> float:
    probability = reference(train, order, vocab_size)
    return -sum(math.log(probability(tuple(s[:i]), s[i])) for s in test for i in range(1, len(s)))


@st.composite
def corpora(draw: st.DrawFn) -> tuple[Sequences, Sequences, int]:
    vocab_size = draw(st.integers(1, 6))
    sequences = st.lists(st.lists(st.integers(0, vocab_size - 1), max_size=12), max_size=6)
    return draw(sequences), draw(sequences), vocab_size


@settings(max_examples=200, deadline=None)
@given(corpora(), st.sampled_from([1, 2, 3, 5]))
def test_equals_the_reference(corpus: tuple[Sequences, Sequences, int], order: int) -> None:
    train, test, vocab_size = corpus
    assert nats(train, test, order, vocab_size) == pytest.approx(
        reference_nats(train, test, order, vocab_size), abs=1e-9
    )


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_equals_the_reference_on_marked_text(order: int) -> None:
    train, test = marked_text(0, 30), marked_text(1, 6)
    assert nats(train, test, order, 12) == pytest.approx(reference_nats(train, test, order, 12), rel=1e-12)


def marked_text(seed: int, sequences: int) -> Sequences:
    """Tokens with skewed bigrams; 0 begins, 1 ends, 11 never occurs."""
    stream = np.random.default_rng(seed)
    text = []
    for _ in range(sequences):
        body = [2]
        for _ in range(int(stream.integers(1, 20))):
            body.append(2 + int(body[-1] * 3 + stream.geometric(0.5)) % 9)
        text.append([0, *body, 1])
    return text


@settings(max_examples=100, deadline=None)
@given(corpora(), st.sampled_from([1, 2, 3, 5]), st.data())
def test_probabilities_sum_to_one_in_any_context(
    corpus: tuple[Sequences, Sequences, int], order: int, data: st.DataObject
) -> None:
    train, _, vocab_size = corpus
    context = data.draw(st.lists(st.integers(0, vocab_size - 1), min_size=1, max_size=7))
    seen = [s[: len(s) // 2] for s in train if len(s) > 1]
    for history in (context, *seen):
        before = nats(train, [history], order, vocab_size)
        each = [math.exp(before - nats(train, [[*history, token]], order, vocab_size)) for token in range(vocab_size)]
        assert sum(each) == pytest.approx(1)
        assert min(each) > 0


def test_a_unigram_computed_by_hand() -> None:
    # Predicted are 1, 1, 2: D = 1 / (1 + 2), so P(1) = (2 - 1/3) / 3 + (1/3 * 2 / 3) / 3 = 17/27, and so on.
    for token, expected in enumerate((2 / 27, 17 / 27, 8 / 27)):
        assert nats([[0, 1, 1, 2]], [[0, token]], 1, 3) == pytest.approx(-math.log(expected))


def test_a_token_seen_in_one_context_is_unlikely_in_others() -> None:
    """The property of Kneser-Ney smoothing: 3 is as frequent as 4, but follows only 2."""
    train = [[0, 2, 3, 1]] * 6 + [[0, other, 4, 1] for other in (5, 6, 7, 8, 9, 10)]
    assert nats(train, [[0, 11, 3]], 2, 12) > nats(train, [[0, 11, 4]], 2, 12) + 1
    assert nats(train, [[0, 11, 3]], 1, 12) == pytest.approx(nats(train, [[0, 11, 4]], 1, 12))


def test_no_context_crosses_sequences() -> None:
    train, test = marked_text(0, 20), marked_text(1, 5)
    whole = nats(train, test, 5, 12)
    assert nats(train[::-1], test[::-1], 5, 12) == pytest.approx(whole, rel=1e-12)
    assert sum(nats(train, [s], 5, 12) for s in test) == pytest.approx(whole, rel=1e-12)
    assert nats([list(itertools.chain(*train))], test, 5, 12) != pytest.approx(whole, rel=1e-3)


def test_begin_marks_are_not_scored_and_without_training_text_tokens_are_uniform() -> None:
    assert nats([[0, 1]], [[0], [], [2]], 3, 4) == 0
    assert nats([], [[0, 3, 2, 1]], 3, 4) == pytest.approx(3 * math.log(4))
    assert nats([[0]], [], 3, 4) == 0


def test_a_bigram_beats_a_unigram_with_a_large_vocabulary() -> None:
    stream = np.random.default_rng(0)
    steps = stream.integers(0, 3, size=(300, 50))
    text = [np.concatenate([[0], np.cumsum(row) * 997 % 199_000 + 1]) for row in steps]
    unigram, bigram = (ngram.kneser_ney_nats(text[:250], text[250:], order, 200_000) for order in (1, 2))
    assert bigram < 0.5 * unigram
    assert bigram / (50 * 50) > math.log(3) * 0.9


def test_impossible_arguments_are_refused() -> None:
    for order, vocab_size in ((0, 4), (2, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            nats([[0, 1]], [[0, 1]], order, vocab_size)
    for token in (-1, 4):
        with pytest.raises(ValueError, match=r"0\.\.3"):
            nats([[0, 1]], [[0, token]], 2, 4)
