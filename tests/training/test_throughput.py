import pytest
import torch

from moetrain.training import throughput
from moetrain.training.throughput import Clock


class Device:
    """A device with work queued, and the time it takes to finish it."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        self.busy_until = 0.0
        monkeypatch.setattr(throughput.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(torch.cuda, "synchronize", self.finish)

    def finish(self, device=None):
        self.now = max(self.now, self.busy_until)

    def queue(self, seconds, host=0.1):
        self.now += host
        self.busy_until = max(self.now, self.busy_until) + seconds


def test_waiting_for_queued_training_is_time_spent_training(monkeypatch):
    device, clock = Device(monkeypatch), Clock(torch.device("cuda"))
    for _ in range(10):
        with clock.measure("train"):
            device.queue(1.0)
        clock.add_tokens(500)
    with clock.measure("panel"):
        device.queue(2.0)
    assert clock.spent("train") == pytest.approx(10.1)
    assert clock.spent("panel") == pytest.approx(2.1)
    assert clock.rate() == pytest.approx(5000 / 10.1)
    assert clock.share("panel") == pytest.approx(2.1 / 12.2)
    with clock.measure("train"):
        device.queue(1.0)
    clock.add_tokens(500)
    clock.settle()
    assert clock.rate_since_last() == pytest.approx(5500 / 11.2)


def test_on_cpu_nothing_is_queued(monkeypatch):
    device, clock = Device(monkeypatch), Clock(torch.device("cpu"))
    with clock.measure("train"):
        device.now += 3
    with clock.measure("panel"):
        device.now += 1
    assert clock.seconds == {"train": 3, "panel": 1}


def test_the_matmul_rate_is_flops_over_the_median_time(monkeypatch):
    times = iter([0.0, 9.0, 10.0, 12.0, 20.0, 21.0, 30.0, 34.0])  # the first product, which warms up, does not count
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: next(times))
    throughput.matmul_rate.cache_clear()
    before = torch.random.get_rng_state()
    assert throughput.matmul_rate(torch.device("cpu"), torch.float32) == 2 * 2048**3 / 2.0
    assert torch.equal(torch.random.get_rng_state(), before)
    throughput.matmul_rate.cache_clear()
