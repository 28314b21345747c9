import json

import numpy as np
import pytest

from tools import soak


def samples(memory, threads=12, files=30):
    """Twenty minutes with a sample every 5 s."""
    return [soak.Sample(5.0 * n, 4.0 * n, int(value), threads, files) for n, value in enumerate(memory)]


def test_a_leak_grows_and_noise_and_a_filling_cache_do_not():
    noise = 2**20 * np.random.default_rng(0).standard_normal(240)
    flat = 500 * 2**20 + noise
    assert not soak.trend(samples(flat), "memory").grows
    filling = flat - 300 * 2**20 * np.exp(-np.arange(240) / 10)
    assert not soak.trend(samples(filling), "memory").grows
    leaking = flat + 2**20 * np.arange(240) / 12  # a megabyte a minute
    found = soak.trend(samples(leaking), "memory")
    assert found.grows
    assert found.low < 60 * 2**20 < found.high
    assert not soak.trend(samples(leaking), "threads").grows


def test_correlated_samples_are_not_a_trend():
    """Levels that differ between minutes are not a trend, however often they are sampled."""
    draw = np.random.default_rng(3)
    grows = 0
    for _ in range(40):
        level = 500 * 2**20 + 8 * 2**20 * np.repeat(draw.standard_normal(20), 12)
        grows += soak.trend(samples(level), "memory").grows
    assert grows <= 4  # 5% on each side, and the interval must also be above the tolerance


def test_growing_threads_are_detected():
    growing = [soak.Sample(5.0 * n, 4.0 * n, 10**9, 12 + n // 20, 30) for n in range(240)]
    assert soak.trend(growing, "threads").grows


@pytest.mark.slow
def test_the_command_trains_samples_and_stops_the_run(tmp_path, capsys):
    small = ["data.domains.code.size=300000", "data.domains.math.size=100000", "data.heldout_share=0.1"]
    words = ["--minutes", "0.3", "--every", "0.5", "--json", str(tmp_path / "soak.json")]
    status = soak.main([*words, *small, f"data.cache_dir={tmp_path}"])
    assert status in (0, 1)  # a few seconds are too short for a trend
    result = json.loads((tmp_path / "soak.json").read_text())
    assert result["trends"].keys() == {"memory", "threads", "files"}
    assert all(sample["memory"] > 50 * 2**20 and sample["files"] > 3 for sample in result["samples"])
    assert result["steps"] > 0
    assert result["processor_seconds"] > 1
    assert "slope/hour" in capsys.readouterr().out
