"""Gaps, shares and claim ratios, with intervals over documents."""

import math

import numpy as np
import pytest

from moetrain import grokking as g


def grouped(rng, documents, pieces, between, within, mean):
    """Losses of the pieces of documents, and their documents."""
    losses = mean + between * rng.normal(size=(documents, 1)) + within * rng.normal(size=(documents, pieces))
    return losses.ravel(), np.repeat(np.arange(documents), pieces)


def test_gap_is_positive_where_seen_samples_have_lower_loss():
    rng = np.random.default_rng(0)
    unseen, seen = rng.normal(2.0, 0.3, size=64), rng.normal(1.5, 0.3, size=80)
    gap = g.memorized_gap(unseen, seen)
    assert gap.mean == pytest.approx(unseen.mean() - seen.mean())
    assert 0.3 < gap.low < gap.mean < gap.high < 0.7
    assert (gap.samples, gap.pairs) == (144, 0)
    assert g.memorized_gap(unseen, seen) == gap


def test_interval_of_the_gap_covers_it_where_samples_of_a_document_are_alike():
    """Intervals over samples would be too narrow by the square root of 8."""
    rng = np.random.default_rng(1)
    held = []
    for _ in range(300):
        unseen, unseen_documents = grouped(rng, 12, 8, 0.5, 0.1, 2.0)
        seen, seen_documents = grouped(rng, 16, 8, 0.5, 0.1, 1.0)
        gap = g.memorized_gap(unseen, seen, unseen_documents, seen_documents)
        assert gap.samples == 28
        held.append(gap.low <= 1 <= gap.high)
    assert 0.92 <= np.mean(held) <= 0.985


def test_gap_of_an_empty_cell_is_nan():
    gap = g.memorized_gap([], [1.0, 2.0])
    assert np.isnan([gap.mean, gap.low, gap.high]).all()
    assert gap.samples == 2


def test_one_document_has_no_interval():
    for estimate in (
        g.memorized_gap([1.0, 2.0], [1.0], np.array([1, 1]), np.array([2])),
        g.memorized_share([1.0, 2.0], [1.0], 3.0, np.array([1, 1]), np.array([2])),
        g.mean_over_documents([1.0, 2.0], np.array([7, 7])),
    ):
        assert math.isfinite(estimate.mean)
        assert math.isnan(estimate.low)
        assert math.isnan(estimate.high)


def test_mean_over_documents_weights_samples_alike():
    mean = g.mean_over_documents([1.0, 1.0, 4.0], np.array([5, 5, 6]))
    assert (mean.mean, mean.samples) == (2.0, 2)
    assert mean.low < 2 < mean.high
    assert math.isnan(g.mean_over_documents([], np.array([])).mean)


@pytest.mark.parametrize(("unseen", "expected"), [(2.0, 0.0), (4.0, 0.5), (6.0, 1.0), (8.0, 1.5)])
def test_share_of_what_was_learned(unseen, expected):
    share = g.memorized_share(np.full(8, unseen), np.full(9, 2.0), initial=6.0)
    assert (share.mean, share.low, share.high, share.samples) == (expected, expected, expected, 17)


def test_the_share_does_not_depend_on_the_unit_of_the_loss():
    rng = np.random.default_rng(2)
    unseen, seen = rng.normal(4, 1, 40), rng.normal(3, 1, 50)
    share, bits = g.memorized_share(unseen, seen, 7.0), g.memorized_share(unseen / 8, seen / 8, 7.0 / 8)
    assert (bits.mean, bits.low, bits.high) == pytest.approx((share.mean, share.low, share.high), rel=1e-12)


def test_without_anything_learned_there_is_no_share():
    for seen, initial in ((3.0, 3.1), (3.0, 2.0), (3.0, math.nan)):
        assert math.isnan(g.memorized_share(np.full(8, 3.0), np.full(8, seen), initial).mean)


def with_difficulty(rng, documents, memorized):
    """Losses that follow their texts' difficulty, and the difficulties: seen texts are easier by chance or not."""
    hard_u, hard_s = rng.normal(5, 0.8, documents), rng.normal(5, 0.8, documents)
    noise = 0.2 * rng.normal(size=(2, documents))
    return 0.7 * hard_u + noise[0], 0.7 * hard_s - memorized + noise[1], hard_u, hard_s


def test_interval_of_the_share_covers_it_and_is_narrower_with_difficulties():
    rng = np.random.default_rng(3)
    held, widths, initial = [], [], 7.0
    truth = 0.5 / (initial - (0.7 * 5 - 0.5))
    for _ in range(300):
        unseen, seen, hard_u, hard_s = with_difficulty(rng, 24, 0.5)
        plain = g.memorized_share(unseen, seen, initial)
        adjusted = g.memorized_share(unseen, seen, initial, None, None, hard_u, hard_s)
        held.append([each.low <= truth <= each.high for each in (plain, adjusted)])
        widths.append((adjusted.high - adjusted.low) / (plain.high - plain.low))
    assert np.all(np.abs(np.mean(held, axis=0) - 0.95) < 0.035)
    assert np.median(widths) < 0.5


def test_texts_that_are_merely_easier_are_not_memorized():
    rng = np.random.default_rng(4)
    hard_u, hard_s = rng.normal(6, 0.5, 40), rng.normal(4, 0.5, 40)
    unseen, seen = 0.7 * hard_u, 0.7 * hard_s
    assert g.memorized_share(unseen, seen, 7.0).mean > 0.3
    assert g.memorized_share(unseen, seen, 7.0, None, None, hard_u, hard_s).mean == pytest.approx(0, abs=1e-9)
    alike = np.ones(40)  # a difficulty that does not vary changes nothing
    plain = g.memorized_share(unseen, seen, 7.0)
    assert g.memorized_share(unseen, seen, 7.0, None, None, alike, alike) == plain


def test_claim_ratio_is_gain_over_claim():
    ratio = g.claim_ratio([2.0, 4.0, 3.0], [1.0, 2.0, 3.0], np.array([1, 2, 3]))
    assert (ratio.mean, ratio.samples) == (1.5, 3)
    assert ratio.low < 1.5 < ratio.high
    assert math.isnan(g.claim_ratio([2.0], [0.05], np.array([1])).mean)
    assert math.isnan(g.claim_ratio([], [], np.array([])).mean)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: g.memorized_gap([1.0], [math.nan]), "seen holds NaN"),
        (lambda: g.memorized_gap([math.inf], [1.0]), "unseen holds NaN or infinite"),
        (lambda: g.memorized_share([1.0], [1.0], 2.0, np.array([1, 2])), "unseen: 1 losses and 2 documents"),
        (lambda: g.memorized_share([1.0], [1.0], 2.0, None, None, [1.0, 2.0], [1.0]), "unseen_difficulty: 2 losses"),
        (lambda: g.mean_over_documents([1.0], np.array([1, 2])), "1 losses and 2 documents"),
        (lambda: g.claim_ratio([1.0, 2.0], [1.0], np.array([1])), "give one of each"),
    ],
)
def test_errors_name_the_argument(call, words):
    with pytest.raises(ValueError, match=words):
        call()
