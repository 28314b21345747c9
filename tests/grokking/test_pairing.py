from itertools import permutations

import numpy as np
import pytest

from moetrain import grokking as g

from .references import cosine_of

PANEL = g.ReadingTimes(steps=[0, 100, 200, 400], tokens=[0, 1000, 2000, 4000])
PROBE = g.ReadingTimes(steps=[50, 300, 700], tokens=[500, 3000, 7000])


def groups_of(labels):
    return {int(label): np.flatnonzero(np.array(labels) == label) for label in sorted(set(labels))}


@pytest.mark.parametrize(("train_labels", "test_labels"), [(3, 3), (4, 2), (2, 4), (1, 1)])
@pytest.mark.parametrize("seed", range(4))
def test_matching_is_the_best_of_all_by_mean_pairwise_cosine(train_labels, test_labels, seed):
    rng = np.random.default_rng(seed)
    train, test = rng.normal(size=(14, 5)), rng.normal(size=(11, 5))
    train_groups = groups_of([3 * (i % train_labels) for i in range(14)])
    test_groups = groups_of([2 * (i % test_labels) + 1 for i in range(11)])

    def similarity(a, b):
        return np.mean([cosine_of(train[i], test[j]) for i in train_groups[a] for j in test_groups[b]])

    short, long = sorted((list(train_groups), list(test_groups)), key=len)
    flip = len(train_groups) > len(test_groups)
    matchings = [
        [(b, a) if flip else (a, b) for a, b in zip(short, order, strict=True)]
        for order in permutations(long, len(short))
    ]
    best = max(matchings, key=lambda matching: sum(similarity(a, b) for a, b in matching))
    pairs = g.pair_groups(train_groups, test_groups, train, test)
    assert [(p.memorized_at, p.generalized_at) for p in pairs] == sorted(best)
    for p in pairs:
        assert p.similarity == pytest.approx(similarity(p.memorized_at, p.generalized_at))
        assert (p.samples, p.items) == (len(train_groups[p.memorized_at]), len(test_groups[p.generalized_at]))


def test_length_of_an_embedding_does_not_matter():
    rng = np.random.default_rng(0)
    train, test = rng.normal(size=(6, 4)), rng.normal(size=(6, 4))
    groups = groups_of([0, 0, 1, 1, 2, 2])
    scaled = train * rng.uniform(0.1, 10, size=(6, 1))
    for a, b in zip(
        g.pair_groups(groups, groups, train, test), g.pair_groups(groups, groups, scaled, test), strict=True
    ):
        assert a.similarity == pytest.approx(b.similarity)


def test_without_groups_there_are_no_pairs():
    assert g.pair_groups({}, {0: np.array([0])}, [[1.0]], [[1.0]]) == []
    assert g.mean_delay([], PANEL, PROBE) is None


def test_delay_in_steps_and_tokens_with_its_resolution():
    # Memorized between steps 100 and 200, generalized between 300 and 700.
    pair = g.GroupPair(memorized_at=2, generalized_at=2, similarity=1.0, samples=5, items=5)
    assert g.delay(pair, PANEL, PROBE) == g.Delay(500, 5000, 400, 4000)
    # Generalized at the first reading: at any time since the start of the run.
    first = g.GroupPair(memorized_at=3, generalized_at=0, similarity=1.0, samples=5, items=5)
    assert g.delay(first, PANEL, PROBE) == g.Delay(-350, -3500, 200, 2000)
    start = g.GroupPair(memorized_at=1, generalized_at=0, similarity=1.0, samples=5, items=5)
    late = g.ReadingTimes(steps=[150, 300], tokens=[1500, 3000])
    assert g.delay(start, PANEL, late) == g.Delay(50, 500, 150, 1500)


def test_true_delay_lies_within_the_resolution():
    rng = np.random.default_rng(0)
    for _ in range(300):
        panel, probe = (np.unique(rng.integers(1, 1000, size=12)) for _ in range(2))
        true_memorized, true_generalized = rng.uniform(0, min(panel[-1], probe[-1]), size=2)
        pair = g.GroupPair(
            int(np.searchsorted(panel, true_memorized)), int(np.searchsorted(probe, true_generalized)), 1.0, 1, 1
        )
        found = g.delay(pair, g.ReadingTimes(panel, panel), g.ReadingTimes(probe, probe))
        assert abs(found.steps - (true_generalized - true_memorized)) < found.steps_resolution


def test_mean_delay_is_weighted_by_items():
    pairs = [g.GroupPair(2, 2, 1.0, samples=9, items=3), g.GroupPair(3, 0, 1.0, samples=1, items=1)]
    delay = g.mean_delay(pairs, PANEL, PROBE)
    assert (delay.steps, delay.tokens) == ((3 * 500 - 350) / 4, (3 * 5000 - 3500) / 4)
    assert delay.steps_resolution == (3 * 400 + 200) / 4


GROUPS = {0: np.array([0, 1])}
PAIR = g.GroupPair(2, 2, 1.0, 1, 1)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: g.pair_groups(GROUPS, GROUPS, np.ones((2, 3)), np.ones((2, 4))), "train_embeddings are 3 wide"),
        (
            lambda: g.pair_groups(GROUPS, GROUPS, np.ones((2, 3)), np.zeros((2, 3))),
            "test_embeddings holds a zero vector",
        ),
        (lambda: g.pair_groups(GROUPS, GROUPS, np.ones(3), np.ones((2, 3))), "train_embeddings has shape"),
        (
            lambda: g.pair_groups(GROUPS, GROUPS, np.ones((2, 3)) * np.nan, np.ones((2, 3))),
            "train_embeddings holds NaN",
        ),
        (lambda: g.delay(PAIR, PANEL, g.ReadingTimes([1, 2], [1, 2])), "probe has 2 readings"),
        (lambda: g.delay(PAIR, g.ReadingTimes([1, 2, 3], [1, 2]), PROBE), "panel has 3 steps and 2 tokens"),
        (lambda: g.delay(PAIR, g.ReadingTimes([1, 3, 2], [1, 2, 3]), PROBE), "panel times do not ascend"),
    ],
)
def test_errors_name_the_argument(call, words):
    with pytest.raises(ValueError, match=words):
        call()
