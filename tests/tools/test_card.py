"""The benchmarks of a CUDA GPU on a machine without one: the outcome of each part."""

import json
import re
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
def test_all_kinds_of_parts(config, tmp_path, monkeypatch, capsys):
    short = ("--turns", "1", "--warmup", "0")
    parts = {
        "tests": card.Part("pytest"),
        "experts": card.Part("experts", ("--tokens", "64", "--turns", "1")),
        "train": card.Part("train", short, ("model.experts=grouped_mm",)),
        "megablocks": card.Part("train", short, ("model.experts=megablocks",)),
        "monitor": card.Part("monitor", ("--parts", "share", "--pairs", "5", "--steps", "5")),
    }
    monkeypatch.setattr(card, "card_memory", lambda: 80 * GIB)
    monkeypatch.setattr(card, "PARTS", parts)
    figure = tmp_path / "rates.png"
    assert bench.main(["card", str(config), "--output", str(tmp_path / "card"), "--figure", str(figure)]) == 0
    found = json.loads((tmp_path / "card" / "card.json").read_text())["parts"]
    assert found["tests"]["outcome"].startswith("0 passed, 0 failed")
    assert found["experts"]["milliseconds"].keys() == {"grouped_mm", "loop"}
    assert "megablocks" in found["experts"]["left_out"]
    assert found["train"]["layers"] == load_settings(config).model.num_hidden_layers
    assert found["train"]["tokens_per_second"] > 0
    assert "CUDA" in found["megablocks"]["outcome"]
    assert 0 < found["monitor"]["shares"]["small"]["share"] < 1
    assert "tokens/s with" in " ".join(capsys.readouterr().out.split())
    assert figure.exists()
