from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moetrain.data.corpus import prepare_corpus
from moetrain.data.packing import Samples
from moetrain.data.stream import training_stream
from moetrain.routing import sample_store as module
from moetrain.routing.recorder import SampleRouting
from moetrain.routing.sample_store import SampleStore, read_samples, top_experts
from moetrain.routing.store import StoreError
from moetrain.train import train

DOMAINS = ["stories", "sums"]
PLACES = 10  # of samples a step


def some_samples(count):
    whole = np.arange(count)
    return Samples(
        domain=(whole % 2).astype(np.int16),
        document=whole.astype(np.uint64) + 2**63,
        piece=whole.astype(np.int32),
        start=whole,
        length=whole.astype(np.int32),
        answer_start=whole.astype(np.int32),
        answer_length=whole.astype(np.int32),
    )


def some_records(rng, first, count, layers=3, experts=8):
    weights = rng.dirichlet(np.ones(experts), (count, layers))
    numbers = np.arange(first, first + count)
    return SampleRouting.from_weights(weights, numbers, numbers % 2, first)


@given(
    st.integers(1, 6),
    st.integers(1, 3),
    st.integers(1, 300),
    st.integers(1, 400),
    st.integers(0, 2**32 - 1),
    st.booleans(),
)
def test_the_top_experts_are_stored_in_order(samples, layers, experts, top, seed, ties):
    rng = np.random.default_rng(seed)
    weights = rng.integers(0, 3, (samples, layers, experts)) / 2 if ties else rng.random((samples, layers, experts))
    kept, shares = top_experts(weights, top)
    assert kept.dtype == (np.uint8 if experts <= 256 else np.uint16)
    for s in range(samples):
        for layer in range(layers):
            ranked = sorted(range(experts), key=lambda e: (-weights[s, layer, e], e))[:top]
            assert kept[s, layer].tolist() == ranked
            assert np.array_equal(shares[s, layer], weights[s, layer, ranked].astype(np.float16))


def test_added_samples_are_read_back(tmp_path):
    rng = np.random.default_rng(0)
    store = SampleStore(tmp_path, 3, 2, some_samples(30), DOMAINS, PLACES)
    parts = [some_records(rng, 0, 20), some_records(rng, 20, 0), some_records(rng, 20, 10)]
    for part in parts:
        store.add(part)
    assert len(store) == 30
    store.write(everything=True)
    assert len(store) == 0
    store.write(everything=True)  # nothing to write
    (table,) = read_samples(tmp_path)
    assert [path.name for path in (tmp_path / "routing").iterdir()] == ["samples_00000003_003.parquet"]
    frame = table.to_pandas()
    assert frame.step.tolist() == [1] * 10 + [2] * 10 + [3] * 10
    assert frame.document.tolist() == [2**63 + n for n in range(30)]
    assert frame.domain.tolist() == [DOMAINS[n % 2] for n in range(30)]
    weights = np.concatenate([part.weights for part in parts])
    experts, shares = top_experts(weights, 2)
    assert np.array_equal(np.stack(frame.experts).reshape(experts.shape), experts)
    assert np.array_equal(np.stack(frame.shares).reshape(shares.shape), shares)
    assert table.schema.metadata == {b"layers": b"3", b"top": b"2"}


def test_on_a_full_disk_samples_are_kept_up_to_a_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FILE_SAMPLES", 10)
    monkeypatch.setattr(module, "_MOST_HELD", 40)
    rng = np.random.default_rng(0)
    store = SampleStore(tmp_path, 0, 2, some_samples(100), DOMAINS, PLACES)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pq, "write_table", full)
        for first in range(0, 60, 10):
            store.add(some_records(rng, first, 10))
            with pytest.raises(OSError, match="No space"):
                store.write()
    assert (len(store), store.lost) == (40, 20)
    assert list((tmp_path / "routing").iterdir()) == []
    store.write(everything=True)
    (table,) = read_samples(tmp_path)
    assert table["order"].to_pylist() == list(range(20, 60))


def test_a_truncated_file_is_named(tmp_path):
    store = SampleStore(tmp_path, 0, 2, some_samples(10), DOMAINS, PLACES)
    store.add(some_records(np.random.default_rng(0), 0, 10))
    store.write(everything=True)
    (path,) = (tmp_path / "routing").iterdir()
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(StoreError, match=r"samples_00000001_000\.parquet: truncated or corrupt"):
        list(read_samples(tmp_path))


def test_a_run_stores_each_sample_it_trains_on_once(make_settings, tmp_path):
    settings = make_settings("monitor.store_top=2", "train.checkpoint_every=5")
    assert train(settings) == 0
    frames = [table.to_pandas() for table in read_samples(tmp_path / "runs" / "run")]
    assert len(frames) == 3  # one a checkpoint: after 5, 10 and 12 steps
    stored = Counter((row.step, row.document, row.piece) for frame in frames for row in frame.itertuples())
    stream = training_stream(prepare_corpus(settings), settings)
    samples = stream.samples
    met = Counter(
        (step + 1, int(samples.document[n]), int(samples.piece[n]))
        for step in range(settings.train.max_steps or stream.steps)
        for n in stream._step_samples(step)
        if samples.length[n] >= settings.panel.tokens
    )
    assert len(met) > 50
    assert stored == met
