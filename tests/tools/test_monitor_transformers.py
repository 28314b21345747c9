"""The example of the monitor in a transformers training loop."""

import importlib.util
import math
from pathlib import Path

import pytest

pytest.importorskip("transformers")
SPEC = importlib.util.spec_from_file_location(
    "monitor_transformers", Path(__file__).parents[2] / "tools" / "monitor_transformers.py"
)
example = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(example)


def test_both_domains_are_read_once_their_windows_are_full():
    readings = example.train(steps=20, every=5, batch=16)
    assert [step for step, _ in readings] == [5, 10, 15, 20]
    assert readings[0][1] == []  # 80 samples of two domains fill no window of 64
    last = {reading.domain: reading.metrics for reading in readings[-1][1]}
    assert set(last) == {"counting", "noise"}
    for metrics in last.values():
        assert metrics["d_path"].samples == 64
        assert metrics["d_path"].low < metrics["d_path"].mean < metrics["d_path"].high
        assert all(math.isfinite(estimate.mean) for estimate in metrics.values())


def test_the_command_prints_one_line_per_reading(capsys):
    assert example.main(["--steps", "12", "--every", "12"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("step 12  ") and "cosine" in line for line in lines)
