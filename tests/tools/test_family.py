"""What all tools have in common: help with an example, errors in one line, a row in the README."""

import importlib
import re
from pathlib import Path

import pytest

from tests.tools.test_prepare_data import TOOLS

NAMES = sorted(path.stem for path in TOOLS.glob("*.py") if path.stem != "__init__")
README = Path(__file__).parents[2] / "README.md"

# A command line with missing input for each tool; PLACE is a path that does not exist.
BAD = {
    "bench": ["plan", "PLACE.yaml", "--tokens-per-second", "9"],
    "bench_preparation": ["PLACE.yaml"],
    "compare": ["PLACE", "PLACE-too"],
    "dense_pathways": ["run", "--only", "PLACE"],
    "export_hf": ["PLACE", "OUT"],
    "instruct_probe": ["PLACE", "PLACE.jsonl", "--instructions", "PLACE.jsonl"],
    "monitor_transformers": ["--steps", "0"],
    "monitor_trainer": ["--steps", "0"],
    "muon_trial": ["loss", "--seeds", "many"],
    "ngram": ["PLACE"],
    "paper": ["figure4", "PLACE"],
    "plot_run": ["PLACE", "pathway/cosine", "-o", "OUT.png"],
    "prepare_data": ["PLACE.yaml"],
    "probe": ["PLACE", "PLACE.jsonl"],
    "replay": ["PLACE", "--output", "OUT"],
    "replay_step": ["PLACE"],
    "report": ["PLACE"],
    "restart": ["--times", "many"],
    "sharded_memory": ["PLACE.yaml"],
    "soak": ["--minutes", "many"],
    "theory_toy": ["--models", "1"],
    "train_tokenizer": ["PLACE.yaml"],
    "validate_monitor": ["tables", "--results", "PLACE"],
}


@pytest.fixture
def tool(request):
    return importlib.import_module(f"tools.{request.param}")


def short(tool):
    return tool.__name__.rpartition(".")[2]


def status_of(tool, words):
    try:
        return tool.main(words)
    except SystemExit as left:
        return left.code


@pytest.mark.parametrize("tool", NAMES, indirect=True)
def test_help_shows_an_example(tool, capsys):
    assert status_of(tool, ["--help"]) == 0
    printed = capsys.readouterr().out
    assert re.search(rf"^ +(\w+=\S+ )?(python|torchrun .*) tools/{short(tool)}\.py ", printed, re.MULTILINE)
    assert "usage:" in printed


@pytest.mark.parametrize("tool", sorted(set(NAMES) & set(BAD)), indirect=True)
def test_missing_input_is_one_line_and_status_2(tool, capsys, tmp_path):
    words = [
        word.replace("PLACE", str(tmp_path / "none")).replace("OUT", str(tmp_path / "out")) for word in BAD[short(tool)]
    ]
    assert status_of(tool, words) == 2
    errors = capsys.readouterr().err
    (line,) = [line for line in errors.splitlines() if "error: " in line]
    assert len(line.split("error: ")[1]) > 20
    assert "Traceback" not in errors
    assert not (tmp_path / "out").exists()


def test_every_tool_is_tested_and_listed_in_the_readme():
    listed = README.read_text()
    for name in NAMES:
        assert name in BAD, f"{name}: give a command line with missing input"
        assert f"`{name}.py`" in listed, f"{name}: not in the README's list of tools"
