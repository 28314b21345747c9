"""Whatever routing and losses come: defined results, what cannot count is counted, and no number is poisoned."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain import grokking
from moetrain.metrics import table
from moetrain.routing.answers import AnswerRouting
from moetrain.routing.panel import HELDOUT, SEEN, TO_COME
from moetrain.routing.panel_metrics import expert_load, panel_cells, panel_metrics
from moetrain.routing.panel_monitor import PanelMonitor
from moetrain.routing.recorder import SampleRouting
from moetrain.routing.store import StoredReading, TrainingContext, read_reading, write_reading
from moetrain.routing.stream import StreamMonitor

DOMAINS = ["a", "b"]
shapes = st.tuples(st.integers(1, 4), st.sampled_from([1, 2, 8, 300]))


def rng_routing(rng, samples, layers, experts, broken):
    """Halves of samples' routing, some of them NaN or infinite."""
    even, odd = (rng.dirichlet(np.full(experts, 0.3), (samples, layers)).astype(np.float32) for _ in range(2))
    for bad in broken:
        if bad < samples:
            (even if bad % 2 else odd)[bad, rng.integers(layers), rng.integers(experts)] = [np.nan, np.inf][
                bad % 3 == 0
            ]
    return even, odd


@settings(deadline=None, max_examples=15)
@given(shapes, st.lists(st.integers(0, 12), max_size=4), st.integers(1, 12), st.integers(2, 6), st.integers(0, 9999))
def test_streaming_metrics_of_any_routing(shape, broken, samples, window, seed):
    layers, experts = shape
    rng = np.random.default_rng(seed)
    even, odd = rng_routing(rng, samples, layers, experts, broken)
    numbers = np.arange(samples)
    records = SampleRouting(numbers, numbers, numbers % 2, even, odd, np.zeros_like(even))
    monitor = StreamMonitor(DOMAINS, window, 0.7)
    monitor.add(records)
    assert monitor.not_finite == len({bad for bad in broken if bad < samples})
    for reading in monitor.measure(rng.normal(size=(layers, experts, 5))):
        assert reading.metrics["d_path"].samples == window
        assert math.isfinite(reading.metrics["d_path"].mean)
        assert math.isfinite(reading.metrics["spread"].mean)
        assert math.isnan(reading.metrics["cosine"].mean) == (layers == 1)


def some_answers(rng, size, layers, experts, broken):
    """Two answer tokens of each other sample, some routed by NaN."""
    member = np.repeat(np.arange(0, size, 2), 2).astype(np.int32)
    weights = rng.dirichlet(np.full(experts, 0.3), (len(member), layers)).astype(np.float16)
    weights[np.isin(member, broken), 0, 0] = np.nan
    place = np.tile(np.arange(2), len(member) // 2).astype(np.int16)
    return AnswerRouting(member, place, rng.integers(0, 3, len(member)).astype(np.int32), weights)


def a_reading(rng, layers, experts, cells, broken, losses=None, step=5):
    """A stored reading whose cells have the given sizes, (domain, cell) by (domain, cell)."""
    domain = np.array([DOMAINS[d] for d, _, n in cells for _ in range(n)], object)
    cell = np.array([c for _, c, n in cells for _ in range(n)], np.int8)
    size = len(cell)
    even, odd = rng_routing(rng, size, layers, experts, broken)
    rows = rng.normal(size=(layers, experts, 5))
    loss = rng.random(size).astype(np.float32)
    for bad in losses or ():
        if bad < size:
            loss[bad] = [np.nan, np.inf][bad % 2]
    return StoredReading(
        step=step,
        domain=domain,
        cell=cell,
        document=np.arange(size).astype(np.uint64),
        piece=np.zeros(size, np.int32),
        first_step=np.where(cell == SEEN, 1, 0),
        tokens=rng.integers(1, 4, size).astype(np.int32),
        loss=loss,
        initial=np.full(size, 2, np.float32),
        difficulty=rng.random(size).astype(np.float32),
        claim_gain=rng.normal(size=size).astype(np.float32),
        claim=rng.random(size).astype(np.float32),
        even=even.astype(np.float16),
        odd=odd.astype(np.float16),
        counts=np.ones((size, layers, experts), np.uint16),
        inputs=np.zeros((size, layers, 0), np.float16),
        blocks=grokking.gram_blocks(rows),
        answers=some_answers(rng, size, layers, experts, broken),
    )


sizes = st.lists(
    st.tuples(st.integers(0, 1), st.sampled_from([SEEN, TO_COME, HELDOUT]), st.integers(0, 40)), min_size=1, max_size=6
)
bad = st.lists(st.integers(0, 20), max_size=5)


@settings(deadline=None, max_examples=30)
@given(shapes, sizes, bad, bad, st.integers(0, 9999))
def test_panel_metrics_of_any_reading(shape, cells, broken, losses, seed):
    stored = a_reading(np.random.default_rng(seed), *shape, cells, broken, losses)
    found = panel_metrics(stored, DOMAINS, 0.7, 40)
    assert all(math.isfinite(estimate.mean) for estimate in found.values())
    for domain in DOMAINS:
        seen = panel_cells(stored, domain, 0.7, 40)["seen"]
        for name in ("d_path", "d_eff"):
            assert table.find(name).layers(seen).shape == (shape[0],)
    assert np.isfinite(expert_load(stored)).all()


class FixedPanel:
    """Five seen samples of each domain, then 21 held-out ones of each, as far as a monitor asks."""

    first_step = np.repeat([1, 0], [10, 42])
    samples = SimpleNamespace(document=np.arange(52))

    def __len__(self):
        return 52

    def members(self, domain, cell):
        return {SEEN: np.arange(5) + 5 * domain, HELDOUT: np.arange(21) + 10 + 21 * domain}.get(cell, np.arange(0))

    def names(self, members):
        return [str(member) for member in members]


@settings(deadline=None, max_examples=15)
@given(shapes, st.lists(bad, min_size=4, max_size=7), st.booleans(), st.integers(0, 9999))
def test_the_panel_monitor_accepts_any_readings(shape, losses, eps, seed):
    rng = np.random.default_rng(seed)
    cells = [(0, SEEN, 5), (1, SEEN, 5), (0, HELDOUT, 21), (1, HELDOUT, 21)]
    monitor = PanelMonitor(FixedPanel(), DOMAINS, 0.7, 40, dict.fromkeys(DOMAINS, 0.5 if eps else None))
    for step, broken in enumerate(losses, start=1):
        stored = a_reading(rng, *shape, cells, broken, broken, step)
        points = monitor.take(replace(stored, training_context=TrainingContext(100 * step)))
        assert all(math.isfinite(estimate.mean) for estimate in points.metrics.values())
        assert set(points.phases) == set(DOMAINS)
    again = PanelMonitor(FixedPanel(), DOMAINS, 0.7, 40, dict.fromkeys(DOMAINS, 0.5 if eps else None))
    again.load_state(monitor.state())
    assert again.state().keys() == monitor.state().keys()


@pytest.mark.parametrize("experts", [256, 257, 1000])
def test_more_experts_than_a_byte_holds(tmp_path, experts):
    stored = a_reading(np.random.default_rng(0), 2, experts, [(0, SEEN, 6), (1, SEEN, 6)], [])
    write_reading(tmp_path, stored)
    back = read_reading(tmp_path, 5)
    assert repr(panel_metrics(back, DOMAINS, 0.7, 40)) == repr(panel_metrics(stored, DOMAINS, 0.7, 40))  # NaN is NaN
    symbols = np.concatenate(grokking.pathways(back.weights))
    assert symbols.max() > 255 or experts == 256


def test_a_broken_sample_does_not_change_other_domains():
    rng = np.random.default_rng(3)
    whole = a_reading(rng, 3, 8, [(0, SEEN, 20), (1, SEEN, 20)], [])
    broken = a_reading(np.random.default_rng(3), 3, 8, [(0, SEEN, 20), (1, SEEN, 20)], [])
    broken.even[2] = np.nan
    found, expected = panel_metrics(broken, DOMAINS, 0.7, 40), panel_metrics(whole, DOMAINS, 0.7, 40)
    assert found["pathway/d_path/a"].samples == 19
    untouched = [tag for tag in expected if tag.endswith("/b") and "sharing" not in tag]
    assert len(untouched) > 8
    assert all(repr(found[tag]) == repr(expected[tag]) for tag in untouched)
