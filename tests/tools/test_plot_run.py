import json

import numpy as np
import pytest

from moetrain.config import load_settings
from moetrain.train import train
from tests.conftest import small_run
from tests.trainer.reading import scalars
from tools.plot_run import main, panel_series, probe_series


@pytest.fixture(scope="module")
def run(corpus_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("drawn")
    base = small_run(corpus_folder, out, tmp_path_factory.getbasetemp())
    assert (
        train(load_settings(None, [*base, "probes.tasks=[quiz.jsonl]", "probes.readings=3", "train.max_steps=6"])) == 0
    )
    return out / "runs" / "run"


def test_curves_are_those_of_tensorboard_with_intervals(run):
    shown = scalars(run)
    settings = load_settings(run / "config.yaml")
    steps = json.loads((run / "summary.json").read_text())["steps"]
    panel, probes = panel_series(run, settings, steps), probe_series(run, "*")
    for metric, domain in (
        ("pathway/d_path", "sums"),
        ("loss/panel_heldout", "stories"),
        ("pathway/cosine", "sums"),
    ):
        points = panel[metric][domain]
        assert [(step, np.float32(value)) for step, value, _, _ in points] == shown[f"{metric}/{domain}"]
        assert any(low < value < high for _, value, low, high in points)
    accuracy = [(step, pytest.approx(value)) for step, value, _, _ in probes["probes/accuracy"]["adding"]]
    assert accuracy == shown["probe/adding/accuracy"]
    assert set(probe_series(run, "own*")["probes/accuracy"]) == {"owners"}


def test_a_figure_is_drawn(run, tmp_path):
    out = tmp_path / "curves.svg"
    assert main([str(run), "pathway/cosine", "probes/bpb", "--tasks", "adding", "-o", str(out)]) == 0
    text = out.read_text()
    assert "<svg" in text
    assert text.count("<path") > 10


def test_an_unknown_metric_is_an_error(run, tmp_path, capsys):
    assert main([str(run), "pathway/cosin", "-o", str(tmp_path / "x.png")]) == 2
    assert "no pathway/cosin: there are" in capsys.readouterr().err
    assert main([str(tmp_path / "no_run"), "pathway/cosine", "-o", str(tmp_path / "x.png")]) == 2
