"""The tools as one family: each shows how it is used, and says what is wrong with its input in one line."""

import importlib
import re
from pathlib import Path

import pytest

from tests.tools.test_prepare_data import TOOLS

NAMES = sorted(path.stem for path in TOOLS.glob("*.py") if path.stem != "__init__")
README = Path(__file__).parents[2] / "README.md"

# By tool, a command line whose input is not there; PLACE is a path that is not.
BAD = {
    "bench": ["plan", "PLACE.yaml", "--tokens-per-second", "9"],
    "bench_preparation": ["PLACE.yaml"],
    "compare": ["PLACE", "PLACE-too"],
    "export_hf": ["PLACE", "OUT"],
    "instruct_probe": ["PLACE", "PLACE.jsonl", "--instructions", "PLACE.jsonl"],
    "monitor_transformers": ["--steps", "0"],
    "ngram": ["PLACE"],
    "plot_run": ["PLACE", "pathway/cosine", "-o", "OUT.png"],
    "prepare_data": ["PLACE.yaml"],
    "probe": ["PLACE", "PLACE.jsonl"],
    "replay": ["PLACE", "--output", "OUT"],
    "replay_step": ["PLACE"],
    "report": ["PLACE"],
    "restart": ["--times", "many"],
    "soak": ["--minutes", "many"],
    "theory_toy": ["--models", "1"],
    "train_tokenizer": ["PLACE.yaml"],
    "validate_monitor": ["tables", "--results", "PLACE"],
}


@pytest.fixture
def tool(request, monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))  # as python tools/NAME.py has it
    return importlib.import_module(f"tools.{request.param}")


def short(tool):
    return tool.__name__.rpartition(".")[2]


def status_of(tool, words):
    try:
        return tool.main(words)
    except SystemExit as left:
        return left.code


@pytest.mark.parametrize("tool", NAMES, indirect=True)
def test_help_has_a_command_to_copy(tool, capsys):
    assert status_of(tool, ["--help"]) == 0
    said = capsys.readouterr().out
    assert re.search(rf"^ +(\w+=\S+ )?python tools/{short(tool)}\.py ", said, re.MULTILINE)
    assert "usage:" in said


@pytest.mark.parametrize("tool", sorted(set(NAMES) & set(BAD)), indirect=True)
def test_input_that_is_not_there_is_one_line_and_status_2(tool, capsys, tmp_path):
    words = [
        word.replace("PLACE", str(tmp_path / "none")).replace("OUT", str(tmp_path / "out")) for word in BAD[short(tool)]
    ]
    assert status_of(tool, words) == 2
    said = capsys.readouterr().err
    (line,) = [line for line in said.splitlines() if "error: " in line]
    assert len(line.split("error: ")[1]) > 20
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_every_tool_is_held_to_it_and_listed():
    listed = README.read_text()
    for name in NAMES:
        assert name in BAD, f"{name}: give a command line whose input is not there"
        assert f"`{name}.py`" in listed, f"{name}: not in the README's list of tools"
