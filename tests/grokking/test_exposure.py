import numpy as np
import pytest

from moetrain.grokking import exposure_bucket, mean_per_token


def test_the_mean_is_per_token_and_its_interval_that_of_resampled_documents():
    rng = np.random.default_rng(0)
    documents = np.repeat(np.arange(60), rng.integers(1, 5, 60))
    tokens = rng.integers(5, 200, len(documents)).astype(float)
    level = rng.normal(3.0, 0.8, 60)[documents]  # samples of one document are alike
    sums = tokens * (level + rng.normal(0, 0.1, len(documents)))
    found = mean_per_token(sums, tokens, documents)
    assert found.mean == pytest.approx(sums.sum() / tokens.sum())
    assert found.samples == 60
    members = [np.flatnonzero(documents == d) for d in range(60)]
    drawn = [np.concatenate([members[d] for d in rng.integers(0, 60, 60)]) for _ in range(4000)]
    means = [sums[which].sum() / tokens[which].sum() for which in drawn]
    low, high = np.percentile(means, [2.5, 97.5])
    assert found.high - found.low == pytest.approx(high - low, rel=0.1)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(500):
        documents = np.repeat(np.arange(40), 3)
        level = rng.normal(2.0, 1.0, 40)[documents]
        found = mean_per_token(10 * level, np.full(120, 10.0), documents)
        covered += found.low <= 2.0 <= found.high
    assert 0.92 <= covered / 500 <= 0.98


def test_samples_of_one_document_count_as_one():
    """Ten copies of each sample change neither the mean nor the interval."""
    rng = np.random.default_rng(2)
    documents, sums = np.arange(30), rng.gamma(3.0, 20.0, 30)
    one = mean_per_token(sums, np.full(30, 20.0), documents)
    ten = mean_per_token(np.repeat(sums, 10), np.full(300, 20.0), np.repeat(documents, 10))
    assert (ten.mean, ten.low, ten.high, ten.samples) == pytest.approx((one.mean, one.low, one.high, one.samples))


def test_without_tokens_or_with_one_document_there_is_no_interval():
    nothing = mean_per_token([], [], [])
    assert np.isnan([nothing.mean, nothing.low, nothing.high]).all()
    single = mean_per_token([4.0, 8.0], [2.0, 2.0], [7, 7])
    assert single.mean == 3.0
    assert np.isnan(single.low)
    with pytest.raises(ValueError, match="1 sums, 2 token counts, 2 documents"):
        mean_per_token([1.0], [1.0, 2.0], [1, 2])


def test_buckets_are_powers_of_two():
    assert exposure_bucket(np.arange(18)).tolist() == [0, 1, 2, 2, 4, 4, 4, 4, *[8] * 8, 16, 16]
