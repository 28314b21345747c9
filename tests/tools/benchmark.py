"""Running a benchmark by its command line."""

import json

import bench
import torch
from benchmarks.configs import load_configs


def settings_of(words):
    """The settings that command-line words give."""
    return load_configs(bench.parse(["train", *words]))[0]


def run(tmp_path, *words):
    """Run a benchmark by its command line; returns the result it wrote."""
    assert bench.main([*words, "--json", str(tmp_path / "result.json")]) == 0
    text = (tmp_path / "result.json").read_text()
    assert "NaN" not in text
    result = json.loads(text)
    assert result["command"].startswith("python tools/bench.py " + words[0])
    assert result["machine"]["torch"] == torch.__version__
    assert result["machine"]["processor"]
    assert len(result["date"]) == 10
    return result
