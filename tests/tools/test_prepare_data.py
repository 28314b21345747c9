import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from moetrain.config import load_settings
from moetrain.data.corpus import prepare_corpus
from moetrain.data.tokenizer import load_tokenizer

TOOLS = Path(__file__).parents[2] / "tools"


def load_tool(name):
    # By path, because tools/ is not a package.
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


prepare_data, train_tokenizer = load_tool("prepare_data"), load_tool("train_tokenizer")


@pytest.fixture
def arguments(corpus_folder, tmp_path):
    (tmp_path / "run.yaml").write_text("tokenizer: {vocab_size: 320}\n")
    base = [
        f"data.root={corpus_folder}",
        "data.domains.stories.path=stories.jsonl",
        "data.domains.sums.path=sums.jsonl",
    ]
    base += [f"data.cache_dir={tmp_path / 'cache'}", "data.heldout_share=0.1", "panel.tokens=16", "data.seq_len=64"]
    return [str(tmp_path / "run.yaml"), *base]


def test_the_summary_describes_the_corpus(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    more = ["--json", str(tmp_path / "data.json"), "--figure", str(tmp_path / "data.png")]
    assert prepare_data.main([*arguments, *more, "data.domains.sums.repeats=2"]) == 0
    printed = capsys.readouterr().out
    for part in ("stories", "sums", "duplicates", "bytes/token", "a vocabulary of 320"):
        assert part in printed
    record = json.loads((tmp_path / "data.json").read_text())
    corpus = prepare_corpus(load_settings(arguments[0], [*arguments[1:], "data.domains.sums.repeats=2"]))
    assert record["corpus"] == corpus.fingerprint
    for domain in corpus.domains:
        found = record["domains"][domain.name]
        assert found["documents"] == 400
        assert found["tokens"] == len(domain.tokens)
        assert found["bytes_per_token"] == pytest.approx(found["text_bytes"] / found["tokens"])
        assert found["length_median"] <= found["length_95"] <= found["length_max"] == domain.index["length"].max()
        assert 0.5 < found["long_share"] < 1
    assert (tmp_path / "data.png").read_bytes()[:4] == b"\x89PNG"


def test_the_tokenizer_is_written_and_equals_the_run_s(arguments, tmp_path, capsys):
    more = ["--json", str(tmp_path / "numbers.json"), "--output", str(tmp_path / "own.model")]
    assert train_tokenizer.main([*arguments, *more]) == 0
    assert "320 tokens" in capsys.readouterr().out
    record = json.loads((tmp_path / "numbers.json").read_text())
    corpus = prepare_corpus(load_settings(arguments[0], arguments[1:]))
    assert record["tokenizer"] == corpus.tokenizer.fingerprint == load_tokenizer(tmp_path / "own.model").fingerprint
    assert all(row["bytes_per_token"] > 1 for row in record["domains"].values())


@pytest.mark.parametrize("tool", [prepare_data, train_tokenizer])
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.domains.sums.path=none.jsonl", "no file at"),
        ("data.domain.x=1", "did you mean"),
        ("data.domains.sums.filter=exec('x')", "is not allowed in a filter"),
        ("tokenizer.model=/no/such.model", "cannot be used"),
    ],
)
def test_errors_are_one_line_with_exit_status_2(arguments, capsys, tool, override, message):
    assert tool.main([*arguments, override]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error


@pytest.mark.parametrize("tool", ["prepare_data", "train_tokenizer"])
def test_help_has_an_example(tool):
    done = subprocess.run(
        [sys.executable, str(TOOLS / f"{tool}.py"), "--help"], capture_output=True, text=True, check=True
    )
    assert f"python tools/{tool}.py configs/four_domains.yaml" in done.stdout
