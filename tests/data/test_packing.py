import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain.data.corpus import prepare_corpus
from moetrain.data.mixture import order_by_size, order_by_weights
from moetrain.data.packing import MARKS, Samples, cut_samples, pack_rows


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(3, 32), min_size=1, max_size=200), st.integers(1, 50), st.integers(0, 5))
def test_every_sample_is_packed_once_and_no_row_overflows(lengths, window, seed):
    lengths = np.array(lengths)
    order = np.random.default_rng(seed).permutation(len(lengths))
    rows = pack_rows(order, lengths, 32, window, seed)
    assert sorted(rows.samples.tolist()) == list(range(len(lengths)))
    for number in range(len(rows)):
        assert 0 < lengths[rows.row(number)].sum() <= 32
    again = pack_rows(order, lengths, 32, window, seed)
    assert np.array_equal(again.samples, rows.samples)
    assert np.array_equal(again.starts, rows.starts)


def test_rows_of_documents_like_real_ones_are_98_percent_full():
    rng = np.random.default_rng(0)
    pieces = np.concatenate([np.full(3000, 512), rng.integers(10, 512, 3000), rng.integers(10, 60, 5000)])
    rows = pack_rows(rng.permutation(len(pieces)), pieces, 512, 4096, 0)
    assert pieces.sum() / (len(rows) * 512) > 0.98


def test_samples_cover_each_document_once_in_pieces(make_settings):
    corpus = prepare_corpus(make_settings())
    for heldout in (False, True):
        samples = cut_samples(corpus, 20, heldout)
        assert samples.length.max() == 20 - MARKS
        for number, domain in enumerate(corpus.domains):
            for document in domain.index[domain.index["heldout"] == heldout][:50]:
                pieces = samples.take(np.flatnonzero((samples.domain == number) & (samples.document == document["id"])))
                assert pieces.piece.tolist() == list(range(len(pieces)))
                covered = np.concatenate(
                    [np.arange(s, s + n) for s, n in zip(pieces.start, pieces.length, strict=True)]
                )
                assert np.array_equal(covered, document["start"] + np.arange(document["length"]))
                assert (pieces.length[:-1] == 18).all()


def equal_samples(counts, length=10):
    domain = np.repeat(np.arange(len(counts)), counts).astype(np.int16)
    n = len(domain)
    return Samples(
        domain,
        np.arange(n).astype(np.uint64),
        np.zeros(n, np.int32),
        np.zeros(n, np.int64),
        np.full(n, length, np.int32),
        np.zeros(n, np.int32),
        np.zeros(n, np.int32),
    )


def test_by_size_takes_every_sample_once():
    order = order_by_size(equal_samples([30, 70]), seed=3)
    assert sorted(order.tolist()) == list(range(100))
    assert not np.array_equal(order, order_by_size(equal_samples([30, 70]), seed=4))


def test_by_weights_keeps_proportions_everywhere_and_ends_with_the_first_exhausted():
    samples = equal_samples([1000, 500])
    order = order_by_weights(samples, [(0, [1.0, 3.0])], seed=0)
    assert len(set(order.tolist())) == len(order)
    domains = samples.domain[order]
    assert (domains == 1).sum() == 500
    assert (domains == 0).sum() == pytest.approx(500 / 3, abs=1)
    for start in range(0, len(domains) - 80, 40):
        assert (domains[start : start + 80] == 1).mean() == pytest.approx(0.75, abs=0.03)


def test_weights_change_at_the_tokens_of_their_phase():
    samples = equal_samples([1000, 1000])  # of 12 tokens each with their marks
    order = order_by_weights(samples, [(0, [1.0, 0.0]), (2400, [1.0, 1.0]), (4800, [0.0, 1.0])], seed=0)
    domains = samples.domain[order]
    assert (domains[:200] == 0).all()
    assert (domains[200:400] == 1).mean() == pytest.approx(0.5, abs=0.02)
    assert (domains[405:] == 1).all()
    # The stream continues to the end of the only domain of the last phase, although the other is not exhausted.
    assert (domains == 1).sum() == 1000
    assert (domains == 0).sum() == pytest.approx(300, abs=2)


def test_an_exhausted_domain_ends_the_stream_in_the_first_phase_that_uses_it():
    samples = equal_samples([100, 1000])
    order = order_by_weights(samples, [(0, [1.0, 1.0]), (12 * 200, [0.0, 1.0]), (12 * 400, [1.0, 1.0])], seed=0)
    domains = samples.domain[order]
    # The domain is exhausted when the second phase begins. The third phase, from 400 samples on, uses it again.
    assert len(domains) == pytest.approx(400, abs=1)
    assert (domains == 0).sum() == 100


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(20, 200), min_size=2, max_size=4),
    st.lists(st.tuples(st.integers(1, 3000), st.lists(st.floats(0.1, 5), min_size=4, max_size=4)), max_size=3),
)
def test_no_sample_is_repeated_with_any_phases(counts, later):
    samples = equal_samples(counts)
    starts = sorted({start for start, _ in later})
    phases = [(0, [1.0] * len(counts))]
    phases += [(start, weights[: len(counts)]) for start, (_, weights) in zip(starts, later, strict=False)]
    order = order_by_weights(samples, phases, seed=0)
    assert len(set(order.tolist())) == len(order) > 0
    used = np.bincount(samples.domain[order], minlength=len(counts))
    assert (used == np.array(counts)).any() or min(np.array(counts) - used) <= 1


@pytest.mark.parametrize("by_weights", [False, True])
def test_copies_of_a_text_lie_within_the_set_share_of_the_stream(by_weights):
    copies, texts = 12, 300
    samples = equal_samples([copies * texts] * 2)
    samples.start[:] = np.arange(copies * texts * 2) % texts  # each text `copies` times, in both domains

    def ordered(within):
        if by_weights:
            return order_by_weights(samples, [(0, [1.0, 1.0])], 0, within)
        return order_by_size(samples, 0, within)

    order = ordered([1.0, 0.1])
    assert sorted(order.tolist()) == sorted(ordered([]).tolist())
    reach = {0: [], 1: []}
    for domain in (0, 1):
        for text in range(texts):
            (place,) = np.nonzero((samples.domain[order] == domain) & (samples.start[order] == text))
            assert len(place) == copies
            reach[domain].append((place.max() - place.min()) / len(order))
    assert np.median(reach[0]) > 0.7
    assert max(reach[1]) < 0.13  # a tenth, and the samples of the other domain in between
    first = np.array([np.nonzero(samples.start[order[samples.domain[order] == 1]] == t)[0][0] for t in range(texts)])
    thirds = np.histogram(first, bins=3, range=(0, copies * texts))[0]
    assert (thirds > texts / 5).all()  # texts begin all over the stream
    assert np.array_equal(ordered([1.0, 1.0]), ordered([]))
    assert np.array_equal(order, ordered([1.0, 0.1]))
