import numpy as np
import pytest

from moetrain import grokking as g


def test_mean_of_samples_excludes_nan():
    estimate = g.mean_of_samples([1.0, np.nan, 2.0, 6.0])
    assert (estimate.mean, estimate.samples, estimate.pairs) == (3.0, 3, 0)
    assert 1 <= estimate.low < 3 < estimate.high <= 6


def test_mean_of_nothing_is_nan():
    estimate = g.mean_of_samples([np.nan, np.nan])
    assert np.isnan([estimate.mean, estimate.low, estimate.high]).all()
    assert estimate.samples == 0


def test_interval_has_the_width_of_normal_theory():
    values = np.random.default_rng(0).normal(5, 2, size=400)
    estimate = g.mean_of_samples(values)
    half = 1.96 * values.std() / 20
    assert estimate.high - estimate.mean == pytest.approx(half, rel=0.1)
    assert estimate.mean - estimate.low == pytest.approx(half, rel=0.1)


def test_estimate_cannot_be_changed():
    with pytest.raises(AttributeError):
        g.mean_of_samples([1.0]).mean = 2.0


def test_the_jackknife_of_a_mean_has_its_standard_error():
    """For a mean and groups of equal size, the jackknife error is exactly the standard error of the group means."""
    values = np.random.default_rng(0).normal(size=64)
    estimate = g.jackknife(lambda which: float(values[which].mean()), 64, seed=3)
    groups = np.random.default_rng(3).permutation(64).reshape(8, 8)  # group n: every eighth from the nth
    means = values[groups].mean(0)
    reach = 2.3646242510102993 * means.std(ddof=1) / np.sqrt(8)
    assert estimate.mean == values.mean()
    assert (estimate.low, estimate.high) == pytest.approx((values.mean() - reach, values.mean() + reach))
    assert (estimate.samples, estimate.pairs) == (64, 0)


def test_the_jackknife_interval_has_its_nominal_coverage():
    """In 300 draws of a variance, about 95% of the intervals contain the true one."""
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(300):
        values = rng.normal(size=64)
        estimate = g.jackknife(lambda which, x=values: float(x[which].var(ddof=1)), 64)
        held += estimate.low <= 1 <= estimate.high
    assert 0.90 < held / 300 < 0.99


def test_too_few_samples_have_no_jackknife_interval():
    few = g.jackknife(lambda which: float(len(which)), 15)
    assert few.mean == 15.0
    assert np.isnan([few.low, few.high]).all()


def routing(samples, seed):
    weights = np.random.default_rng(seed).dirichlet(np.full(6, 0.4), (samples, 3))
    return weights, np.random.default_rng(9).normal(size=(3, 6, 5))


def all_estimates(weights, rows, documents):
    """Every estimate from routing that can resample documents."""
    halves = np.roll(weights, 1, axis=2) * 0.3 + weights * 0.7
    consistency = g.group_consistency(weights, rows, documents=documents)
    spread = g.jackknife(lambda which: g.spread(weights[which]), len(weights), documents=documents)
    return {
        "d_path": g.d_path_both(weights, documents=documents)[0],
        "d_path_norm": g.d_path_both(weights, documents=documents)[1],
        "individuality": g.individuality(weights, halves, documents=documents),
        "sharing": g.sharing(weights, halves[:20], documents=documents),
        "cosine": consistency.cosine,
        "consistency": consistency.consistency,
        "spread": spread,
        "d_eff": g.d_eff_estimate(weights, documents=documents),
    }


def test_samples_that_are_documents_of_their_own_have_the_same_bits():
    weights, rows = routing(64, 0)
    names = np.random.default_rng(1).permutation(10**6)[:64].astype(np.uint64)
    assert repr(all_estimates(weights, rows, names)) == repr(all_estimates(weights, rows, None))


def test_intervals_are_as_wide_as_those_of_the_documents_alone():
    """Four nearly equal samples of each of 16 documents say hardly more than one of each."""
    few, rows = routing(16, 2)
    noise = np.random.default_rng(3).dirichlet(np.ones(6), (64, 3))
    weights, documents = 0.97 * np.repeat(few, 4, axis=0) + 0.03 * noise, np.repeat(np.arange(16), 4)
    by_document, by_sample = (all_estimates(weights, rows, each) for each in (documents, None))
    alone = all_estimates(few, rows, None)
    for name in ("d_path", "d_path_norm", "cosine", "consistency", "spread", "d_eff"):
        widths = [each[name].high - each[name].low for each in (by_document, by_sample, alone)]
        assert widths[0] > (1.2 if name == "consistency" else 1.5) * widths[1], name
        if np.isfinite(widths[2]) and name not in ("consistency", "d_path", "d_path_norm"):
            assert 0.6 < widths[0] / widths[2] < 1.6, name
    for name, estimate in by_document.items():
        value = "median" if name == "consistency" else "mean"
        assert getattr(estimate, value) == getattr(by_sample[name], value)


def test_below_three_documents_there_is_no_interval():
    weights, rows = routing(64, 4)
    for name, estimate in all_estimates(weights, rows, np.arange(64) % 2).items():
        assert np.isnan([estimate.low, estimate.high]).all(), name
    with pytest.raises(ValueError, match="3 documents for 64 samples: pass the document of each sample"):
        g.d_path_both(weights, documents=np.arange(3))
