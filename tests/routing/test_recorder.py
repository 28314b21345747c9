from types import SimpleNamespace

import numpy as np
import pytest
import torch

from moetrain import grokking
from moetrain.routing.recorder import SampleRouting, mean_routing, start_record
from moetrain.routing.stream import StreamMonitor
from tests.distributed.layouts import in_ranks


def test_long_enough_samples_are_recorded_in_the_order_of_the_stream():
    torch.manual_seed(0)
    layers, rows, slots, experts = 2, 2, 3, 4
    sums, counts = torch.rand(layers, rows, 2 * slots, experts), torch.rand(layers, rows, 2 * slots, experts)
    samples = torch.tensor([[5, 9, -1], [7, 3, 8]])
    domains = torch.tensor([[0, 1, -1], [1, 0, 0]])
    whole = torch.tensor([[True, False, False], [True, False, True]])
    routing = SimpleNamespace(sums_LBRE=sums, counts_LBRE=counts)
    batch = SimpleNamespace(samples_BS=samples, domains_BS=domains, compared_BS=whole)
    records = start_record(routing, batch, first_order=60).wait()
    assert records.order.tolist() == [60, 63, 65]
    assert records.sample.tolist() == [5, 7, 8]
    assert records.domain.tolist() == [0, 1, 0]
    for number, (row, slot) in enumerate([(0, 0), (1, 0), (1, 2)]):
        assert np.array_equal(records.even_SLE[number], sums[:, row, 2 * slot])
        assert np.array_equal(records.odd_SLE[number], sums[:, row, 2 * slot + 1])
        both = counts[:, row, 2 * slot : 2 * slot + 2].sum(1)
        assert np.allclose(records.counts_SLE[number], both)


def test_weights_are_the_token_weighted_mean_and_sum_to_one():
    even, odd = np.array([[[3.0, 1.0]]], np.float32), np.array([[[0.0, 2.0]]], np.float32)
    assert mean_routing(even, odd).tolist() == [[[0.5, 0.5]]]


def records(orders, domains, seed=0, layers=3, experts=8):
    rng = np.random.default_rng(seed)
    n = len(orders)
    probs = rng.dirichlet(np.ones(experts), (2, n, layers)).astype(np.float32)
    even, odd = (probs * 8).astype(np.float32)
    return SampleRouting(np.array(orders), np.array(orders) + 100, np.array(domains), even, odd, even + odd)


def test_a_window_holds_the_newest_samples_of_each_domain():
    monitor = StreamMonitor(["a", "b"], size=4, tau=0.7)
    for start in range(0, 30, 5):
        orders = list(range(start, start + 5))
        monitor.add(records(orders, [o % 3 == 0 for o in orders], seed=start))
    windows = monitor.windows()
    assert windows[0].order.tolist() == [25, 26, 28, 29]
    assert windows[1].order.tolist() == [18, 21, 24, 27]


def test_windows_of_several_ranks_equal_those_of_one():
    every = records(list(range(40)), [o % 2 for o in range(40)])
    one = StreamMonitor(["a", "b"], 8, 0.7)
    one.add(every)

    def train(layout):
        part = StreamMonitor(["a", "b"], 8, 0.7, layout)
        part.add(every.take(every.order // 4 % 3 == layout.rank))
        return part.windows(), part.state(), sum(map(len, part._newest_of_all_ranks().values()))

    (windows, state, _), *others = every_rank = in_ranks(3, train)
    assert sum(sent for _, _, sent in every_rank) == 16  # each of the newest once, and no other
    assert all((own, kept) == ({}, {}) for own, kept, _ in others)
    for domain, window in one.windows().items():
        assert np.array_equal(windows[domain].order, window.order)
        assert np.array_equal(windows[domain].even_SLE, window.even_SLE)

    def resume(layout):
        part = StreamMonitor(["a", "b"], 8, 0.7, layout)
        part.load_state(state, main_process=layout.is_main)
        return part.state()

    again = in_ranks(2, resume)[0]
    assert again.keys() == state.keys()
    assert all(torch.equal(state[key], value) for key, value in again.items())


def test_streaming_metrics_need_full_windows():
    monitor = StreamMonitor(["a", "b"], size=6, tau=0.7)
    monitor.add(records(list(range(9)), [0] * 6 + [1] * 3))
    rows = np.random.default_rng(1).normal(size=(3, 8, 16))
    (reading,) = monitor.measure(rows)
    assert reading.domain == "a"
    weights = monitor.windows()[0].weights
    assert reading.metrics["d_path"] == grokking.d_path(weights)
    assert reading.metrics["d_path_norm"] == grokking.d_path(weights, normalized=True)
    assert reading.metrics["cosine"].mean == pytest.approx(grokking.cosine(weights, rows).mean())
    assert reading.metrics["spread"].mean == grokking.spread(weights)
    safe = grokking.max_cosine(weights, rows) > 0.05
    if safe.any():
        expected = np.median(grokking.inconsistency(weights, rows)[safe])
        assert reading.metrics["inconsistency"].mean == pytest.approx(expected, rel=1e-4)
    assert reading.metrics["inconsistency"].samples == safe.sum()


def test_pending_copies_are_added_in_order_and_waited_for_when_read():
    at_once, later = StreamMonitor(["a", "b"], 6, 0.7), StreamMonitor(["a", "b"], 6, 0.7)
    arrived = []
    for start in range(0, 12, 3):
        part = records(list(range(start, start + 3)), [o % 2 for o in range(start, start + 3)], seed=start)
        at_once.add(part)
        copy = SimpleNamespace(arrived=False)
        later.add(SimpleNamespace(copy=copy, wait=lambda part=part: arrived.append(part) or part))
        assert arrived == []
    for domain, window in at_once.windows().items():
        assert np.array_equal(later.windows()[domain].order, window.order)
        assert np.array_equal(later.windows()[domain].even_SLE, window.even_SLE)
    assert [int(part.order[0]) for part in arrived] == [0, 3, 6, 9]


def test_the_number_of_pending_copies_is_bounded():
    monitor, waited = StreamMonitor(["a"], 4, 0.7), []
    for start in range(70):
        part = records([start], [0])
        monitor.add(SimpleNamespace(copy=SimpleNamespace(arrived=False), wait=lambda p=part: waited.append(p) or p))
    assert len(waited) == 70 - 64


def test_routing_that_is_not_finite_is_dropped_and_counted():
    bad = records([0, 1, 2], [0, 0, 0])
    bad.even_SLE[1, 0, 0] = np.nan
    monitor = StreamMonitor(["a"], size=2, tau=0.7)
    monitor.add(bad)
    assert monitor.windows()[0].order.tolist() == [0, 2]
    assert monitor.not_finite == 1
