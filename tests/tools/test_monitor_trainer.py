"""The example of the callback in transformers' Trainer."""

import json

import pytest
import yaml

from tests.tools.test_prepare_data import load_tool

pytest.importorskip("transformers")
tool = load_tool("monitor_trainer")


def test_the_example_trains_with_and_without_the_monitor(tmp_path, capsys, monkeypatch):
    for name, size in (("REPEATS", 4), ("REPEATED", 10), ("FRESH", 40), ("HELDOUT", 10)):
        monkeypatch.setattr(tool, name, size)
    assert tool.main(["qwen3_moe", "--steps", "2", "--output", str(tmp_path / "watched")]) == 0
    summary = json.loads((tmp_path / "watched" / "monitor" / "summary.json").read_text())
    assert summary["steps"] == 2
    assert set(summary["domains"]) == {"repeated", "fresh"}
    settings = yaml.safe_load((tmp_path / "watched" / "monitor" / "config.yaml").read_text())
    repeats = {name: domain["repeats"] for name, domain in settings["data"]["domains"].items()}
    assert repeats == {"repeated": 4, "fresh": 1}
    assert "2 steps in" in capsys.readouterr().out
    assert tool.main(["olmoe", "--steps", "1", "--without", "--output", str(tmp_path / "alone")]) == 0
    assert "without the monitor" in capsys.readouterr().out
    assert not (tmp_path / "alone" / "monitor").exists()


def test_its_data_are_pieces_that_differ():
    train, heldout = tool.data_sets(0)
    by_domain = {
        name: {tuple(row["input_ids"]) for row in train if row["source"] == name} for name in ("repeated", "fresh")
    }
    held = {tuple(row["input_ids"]) for row in heldout}
    assert len(by_domain["repeated"]) == tool.REPEATED
    assert len(by_domain["fresh"]) == tool.FRESH
    assert not held & (by_domain["repeated"] | by_domain["fresh"])
