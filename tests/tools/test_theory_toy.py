"""The toy with few models: its data, its measures and its output."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import theory_toy as toy
from scipy.stats import pearsonr, spearmanr

from moetrain import grokking as g


def test_a_small_run_writes_numbers_and_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    arguments = ["--models", "6", "--steps", "3", "--output", str(tmp_path / "deep" / "toy")]
    assert toy.main(arguments) == 0
    text = (tmp_path / "deep" / "toy.json").read_text()
    result = json.loads(text)
    assert "NaN" not in text
    assert result["command"] == " ".join(["python", "tools/theory_toy.py", *arguments])
    assert result["hardware"]
    assert len(result["date"]) == 10
    assert [m["family"] for m in result["models"]] == [family for family in toy.FAMILIES for _ in range(6)]
    pooled = result["correlations"]["pooled"]["d_path ~ d_eff"]
    columns = [[m[name] for m in result["models"]] for name in ("d_path", "d_eff")]
    assert pooled["n"] == 24
    assert pooled["pearson"]["value"] == pytest.approx(pearsonr(*columns).statistic, abs=1e-4)
    assert pooled["spearman"]["value"] == pytest.approx(spearmanr(*columns).statistic, abs=1e-4)
    assert pooled["pearson"]["low"] <= pooled["pearson"]["value"] <= pooled["pearson"]["high"]
    assert (tmp_path / "deep" / "toy.png").read_bytes().startswith(b"\x89PNG")
    assert "D_path" in capsys.readouterr().out


def test_a_model_is_measured_by_the_definitions_and_repeats() -> None:
    row = toy.plan(5)[0]
    model = toy.run_model(**row, steps=2)
    assert model == toy.run_model(**row, steps=2)
    rng = np.random.default_rng([2506, 21551, row["seed"]])
    inputs, _, _, _ = toy.draw_data(row["clusters"], row["scatter"], rng)
    weights = toy.route(inputs, rng.normal(size=(16, 100)), row["sharpness"])
    assert weights.shape == (200, 16)
    np.testing.assert_allclose(weights.sum(axis=1), 1)
    assert (model.d_path, model.d_eff) == (g.d_path(weights[:, None]).mean, g.d_eff(weights[:, None]))
    assert 1 <= model.d_eff <= 16  # the kernel's rank is at most the number of experts
    assert model.d_eff_200 <= 16
    assert model.entropy == pytest.approx(-(weights * np.log(weights)).sum(axis=1).mean())


def test_training_lowers_the_error() -> None:
    row = toy.plan(5)[0]
    little, much = toy.run_model(**row, steps=1), toy.run_model(**row, steps=60)
    assert much.train_error < 0.5 * little.train_error
    assert much.d_eff == little.d_eff  # the router is frozen


def test_data_has_the_requested_clusters_and_scatter() -> None:
    rng = np.random.default_rng(0)
    inputs, targets, test_inputs, test_targets = toy.draw_data(4, 0.01, rng)
    assert (inputs.shape, test_inputs.shape) == ((200, 100), (1000, 100))
    assert (len(targets), len(test_targets)) == (200, 1000)
    distances = np.linalg.norm(inputs[:, None] - inputs[None], axis=2)
    assert ((distances < 4).sum(axis=1) == 50).all()
    assert np.linalg.norm(inputs, axis=1) == pytest.approx(10, abs=1)


def test_the_dependence_on_entropy_is_removed() -> None:
    rng = np.random.default_rng(0)
    entropy = rng.normal(size=300)
    x, y = entropy + 0.3 * rng.normal(size=300), entropy**2 - 2 * entropy + 0.3 * rng.normal(size=300)
    found = toy.correlate_models(x, y, entropy)
    assert found["pearson"]["high"] < -0.3
    assert found["pearson_without_entropy"]["low"] < 0 < found["pearson_without_entropy"]["high"]
    own = toy.correlate_models(entropy, y, entropy)
    assert math.isnan(own["pearson_without_entropy"]["value"])
    assert not math.isnan(own["pearson"]["value"])
    assert math.isnan(toy.correlate_models(np.ones(300), y, entropy)["spearman"]["value"])


def test_too_few_models_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in ((["--models", "4"], "at least 5 models"), (["--scatter", "0"], "a share above 0")):
        with pytest.raises(SystemExit):
            toy.main(arguments)
        assert words in capsys.readouterr().err
