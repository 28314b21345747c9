"""The benchmarks of a CUDA GPU on a machine without one: the outcome of each part."""

import json
import re
import sys
import time
from pathlib import Path

import bench
import pytest
import yaml
from benchmarks import card
from benchmarks.configs import KNOWN

from moetrain.config import load_settings
from tests.conftest import small_run

CONFIGS = Path(__file__).parents[2] / "configs"
GIB = 2**30


@pytest.fixture
def config(corpus_folder, tmp_path, tmp_path_factory):
    """A file with all settings of a small run."""
    path = tmp_path / "small.yaml"
    path.write_text("run: {name: small}\n")
    settings = load_settings(path, small_run(corpus_folder, tmp_path, tmp_path_factory.getbasetemp()))
    path.write_text(yaml.safe_dump(settings.model_dump(mode="json", exclude_defaults=True)))
    return path


def test_a_machine_without_a_gpu_is_an_error(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert bench.main(["card", "--output", str(tmp_path)]) == 2
    assert "no CUDA device here" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_every_part_is_a_valid_command():
    for benchmark, options, overrides in card.PARTS.values():
        if benchmark != "pytest":
            assert bench.parse([benchmark, *options, "--", str(KNOWN["olmoe_shape"]), *overrides])
            assert load_settings(KNOWN["olmoe_shape"], overrides)


def test_the_shape_equals_the_configuration():
    ours, full = (load_settings(path).model for path in (KNOWN["olmoe_shape"], CONFIGS / "olmoe_1b_7b.yaml"))
    assert ours == full


def test_layers_that_fit():
    settings = load_settings(KNOWN["olmoe_shape"], ["model.experts=grouped_mm"])
    large, small, none = (card.layers_that_fit(settings, memory) for memory in (139 * GIB, 79 * GIB, GIB))
    assert (large, none) == (16, 1)
    assert 6 < small < 12
    planned = card.predict(
        settings.model_copy(update={"model": settings.model.model_copy(update={"num_hidden_layers": small + 1})}),
        settings.tokenizer.vocab_size,
    )
    assert planned.peak > 0.93 * 79 * GIB
    megablocks = load_settings(KNOWN["olmoe_shape"], ["model.experts=megablocks"])
    assert card.layers_that_fit(megablocks, 79 * GIB) < small  # it saves more


def test_a_failed_part_gives_the_reason(config, tmp_path):
    found = card.run_part("part", card.Part("train", (), ("train.batch_rows=0",)), config, tmp_path, 100)
    assert set(found) == {"outcome"}
    assert re.fullmatch("failed with status 2: error: .*batch_rows.*", found["outcome"])
    assert (tmp_path / "part.log").stat().st_size


def test_a_part_has_a_time_limit(config, tmp_path):
    assert card.run_part("part", card.Part("experts"), config, tmp_path, 0.1) == {"outcome": "took longer than 0.1 s"}


def test_tests_are_counted_by_outcome(tmp_path):
    (tmp_path / "tests.xml").write_text(
        '<testsuites><testsuite><testcase name="a"/><testcase name="b"><failure/></testcase>'
        '<testcase name="c"><skipped/></testcase><testcase name="d"><error/></testcase></testsuite></testsuites>'
    )
    found = card.summary_of_tests(tmp_path / "tests.xml")
    assert found == {"outcome": "1 passed, 2 failed, 1 skipped", "failed": ["b", "d"]}


@pytest.mark.slow
def test_a_part_that_ran_too_long_is_ended_with_all_that_it_started(tmp_path):
    pid = tmp_path / "pid"
    child = f"import os, pathlib, time; pathlib.Path({str(pid)!r}).write_text(str(os.getpid())); time.sleep(600)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert card._run([sys.executable, "-c", parent], tmp_path / "log", 10) is None
    while _runs(pid.read_text()):
        time.sleep(0.05)


def _runs(pid):
    """Whether a process runs; it may be gone while it is looked at, or wait for its new parent to read its status."""
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_part_that_measured_and_then_failed_keeps_its_numbers(config, tmp_path, monkeypatch):
    def measure_and_fail(command, log, limit):
        result = {"pause_ratio": {}, "sides": {"thread": {"pause": [1.0, 4.0, 2.0]}}}
        Path(command[command.index("--json") + 1]).write_text(json.dumps(result))
        log.write_text("CUDA error\n")
        return -6

    monkeypatch.setattr(card, "_run", measure_and_fail)
    assert card.run_part("saving", card.PARTS["saving"], config, tmp_path, 9) == {
        "outcome": "measured, then failed with status -6: CUDA error",
        "pause_seconds": {"thread": 2.0},
    }


def test_the_numbers_so_far_are_written_after_each_part(config, tmp_path, monkeypatch, capsys):
    def one_result_then_interrupted(name, *_):
        if name == "saving":
            raise KeyboardInterrupt
        return {"outcome": "done"}

    monkeypatch.setattr(card, "card_memory", lambda: 80 * GIB)
    monkeypatch.setattr(card, "run_part", one_result_then_interrupted)
    parts = ("train_16k", "train_32k", "saving")
    words = ["card", str(config), "--output", str(tmp_path), "--only", *parts]
    settings = yaml.safe_load(config.read_text())
    settings["train"]["batch_rows"] = 12  # not in micro-batches of 8, as train_32k has
    config.write_text(yaml.safe_dump(settings))
    with pytest.raises(KeyboardInterrupt):
        bench.main(words)
    found = json.loads((tmp_path / "card.json").read_text())["parts"]
    assert found["train_16k"]["outcome"] == "done"
    assert found["train_16k"]["layers"] == settings["model"]["num_hidden_layers"]
    assert found["train_32k"]["outcome"].startswith("not run: ")
    assert "batch_rows 12" in found["train_32k"]["outcome"]
    assert "saving" not in found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_part_runs_or_says_why_not(config, tmp_path, monkeypatch, capsys):
    few = {"--tokens": "64", "--turns": "1", "--warmup": "0"}
    monkeypatch.setattr(card, "card_memory", lambda: 80 * GIB)
    monkeypatch.setattr(card, "PARTS", {name: _small(part, few) for name, part in card.PARTS.items()})
    figure = tmp_path / "rates.png"
    assert bench.main(["card", str(config), "--output", str(tmp_path / "card"), "--figure", str(figure)]) == 0
    found = json.loads((tmp_path / "card" / "card.json").read_text())["parts"]
    assert list(found) == list(card.PARTS)
    assert found["tests"]["outcome"].startswith("0 passed, 0 failed")
    for name in ("experts_16k", "experts_32k"):
        assert found[name]["milliseconds"].keys() == {"grouped_mm", "loop"}
        assert "megablocks" in found[name]["left_out"]
    assert "CUDA" in found["train_16k_megablocks"]["outcome"]
    trained = {name: part for name, part in found.items() if "layers" in part}
    del trained["train_16k_megablocks"]
    assert "train_16k_sharded_compiled" in trained
    assert "train_16k_muon" in trained
    for name, part in trained.items():
        assert part["outcome"] == "done", name
        assert part["layers"] == load_settings(config).model.num_hidden_layers
        assert part["tokens_per_second"] > 0
    sharded = {name: json.loads((tmp_path / "card" / f"{name}.json").read_text())["sharded"] for name in trained}
    assert [name for name, is_sharded in sharded.items() if is_sharded] == ["train_16k_sharded_compiled"]
    assert found["saving"]["pause_seconds"].keys() == {"at once", "thread"}
    assert 0 < found["monitor"]["shares"]["small"]["share"] < 1
    assert "tokens/s with" in " ".join(capsys.readouterr().out.split())
    assert figure.exists()


def _small(part, few):
    """A part with small numbers in place of its own, for a machine without a GPU."""
    if part.benchmark == "monitor":
        return part._replace(options=("--parts", "share", "--pairs", "5", "--steps", "5"))
    options = list(part.options)
    for place, word in enumerate(options[:-1]):
        options[place + 1] = few.get(word, options[place + 1])
    return part._replace(options=tuple(options))
