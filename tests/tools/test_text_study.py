"""The study on natural text: truths, separation and error rates on made-up readings; its plan; router memory."""

import numpy as np
import pandas as pd
import pytest
from validity import plan, router_memory, separation, text_study
from validity.text_study import BETWEEN, GENERAL, MEMORY

from moetrain.config import load_settings

STEPS = [0, 50, 100, 150, 200]
TRUE = {"once": 0.02, "times_4": 0.09, "times_64": 0.5}


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch):
    monkeypatch.setattr(separation, "RESAMPLES", 50)


@pytest.fixture(scope="module")
def runs():
    return plan.read_plan("text")


def made_up(runs):
    """Readings in which the measured share is the true one, and a routing metric is noise."""
    rng = np.random.default_rng(0)
    rows = []
    for run in runs:
        for domain, share in TRUE.items():
            for number, step in enumerate(STEPS):
                now = share * number / 4
                loss = 6.0 - 0.8 * number
                curves = {
                    "loss/panel_seen": (loss, 80),
                    "loss/panel_unseen": (loss + now * (6.0 - loss), 80),
                    "pathway/cosine": (rng.random(), 80),
                    "true/share": (now, 160),
                    "true/gap": (now * (6.0 - loss), 160),
                }
                if step:
                    curves["memorized/share"] = (now, 160)
                for metric, (value, n) in curves.items():
                    rows.append((domain, step, metric, value, value - 0.01, value + 0.01, n, run.name))
    return pd.DataFrame(rows, columns=["domain", "step", "metric", "value", "low", "high", "n", "run"])


@pytest.fixture(scope="module")
def table(runs):
    return made_up(runs)


def test_every_planned_run_has_valid_settings_and_other_sources_by_seed(runs, tmp_path, monkeypatch):
    monkeypatch.setenv("MOETRAIN_DATA", str(tmp_path))
    sources = []
    for run in runs:
        base = plan.STUDIES["text"] / "base.yaml"
        settings = load_settings(base, [*run.overrides, f"run.output_dir={tmp_path}"])
        assert settings.run.seed == run.seed
        assert settings.data.domains["times_64"].repeats == 64
        filters = [domain.filter for domain in settings.data.domains.values() if domain.filter]
        assert len(set(filters)) == len(filters)  # no source twice in a run
        sources.append(settings.data.domains["times_16"].filter)
    assert len(set(sources)) >= 5
    assert len({run.seed for run in runs}) == len(runs)
    assert sum(run.part == "test" for run in runs) >= 12


def test_truth_is_the_share_of_texts_set_apart(table, runs):
    units = text_study.make_units(table, runs).set_index(["run", "domain"])
    assert set(units.xs("once", level="domain")["truth"]) == {GENERAL}
    assert set(units.xs("times_4", level="domain")["truth"]) == {BETWEEN}
    assert set(units.xs("times_64", level="domain")["truth"]) == {MEMORY}
    assert units["true share"].max() == 0.5


def test_separation_of_a_measure_and_of_noise(table, runs):
    found = text_study.separation(text_study.make_units(table, runs)).set_index("measure")
    share, noise = found.loc["memorized share"], found.loc["cosine"]
    assert (share["sign"], share["auc"]) == ("+", 1.0)
    assert noise["low"] < 0.5 < noise["high"]
    assert share["memorized"] == share["carries over"] == sum(run.part == "test" for run in runs)


def test_verdicts_rates_and_how_early(table, runs):
    found = text_study.report(table, runs)
    rates = found["error rates on the test runs"].set_index("rate")
    count = sum(run.part == "test" for run in runs)
    assert rates.loc[text_study.GIVEN, ["units", "of"]].tolist() == [2 * count, 2 * count]
    assert rates.loc[text_study.RIGHT, "share"] == 1
    assert rates.loc[text_study.FALSE_ALARMS, ["units", "of"]].tolist() == [0, count]
    assert rates.loc["readings with a verdict against their truth", "units"] == 0
    early = found["how early"].iloc[0]
    assert early["units"] == count
    numbers = text_study.summary(found, table, runs)
    assert numbers["auc_heldout"] == 1
    assert numbers["verdict_share"] == 1
    assert numbers["false_alarm_rate"] == 0
    assert numbers["units"] == {"carries_over": count, "memorized": count}


def test_a_wrong_verdict_is_counted(table, runs):
    turned = table.copy()
    wrong = (turned["metric"] == "memorized/share") & (turned["domain"] == "once")
    turned.loc[wrong, ["value", "low", "high"]] = [0.4, 0.35, 0.45]
    rates = text_study.report(turned, runs)["error rates on the test runs"].set_index("rate")
    assert rates.loc[text_study.FALSE_ALARMS, "share"] == 1
    assert rates.loc["units with a verdict against the truth at any reading", "units"] > 0


def test_the_figure_is_drawn(table, runs, tmp_path):
    pytest.importorskip("matplotlib")
    from validity.text_figures import draw

    draw(table, text_study.make_units(table, runs), tmp_path / "study.png")
    assert (tmp_path / "study.png").stat().st_size > 10_000


def test_readings_of_other_runs_are_kept(table, tmp_path):
    first, second = sorted(table["run"].unique())[:2]
    text_study.save(table[table["run"] == first], tmp_path)
    text_study.save(table[table["run"] == second], tmp_path)
    text_study.save(table[table["run"] == first].head(3), tmp_path)
    kept = text_study.load(tmp_path).groupby("run").size()
    assert kept[first] == 3
    assert kept[second] == (table["run"] == second).sum()
    with pytest.raises(plan.StudyError, match="measure --study text"):
        text_study.load(tmp_path / "none")


@pytest.mark.parametrize(("shift", "expected"), [(0.0, 0.5), (3.0, 1.0)])
def test_membership_by_other_documents(shift, expected):
    rng = np.random.default_rng(0)
    label = np.arange(80) < 40
    features = rng.normal(size=(80, 6)) + shift * label[:, None]
    documents = np.repeat(np.arange(40), 2)
    assert router_memory.membership(features, label, documents) == pytest.approx(expected, abs=0.2)


def test_a_document_that_is_recognized_is_not_membership():
    """Both samples of a document are alike: predicted from each other they would give an AUC of 1."""
    rng = np.random.default_rng(1)
    documents = np.repeat(np.arange(60), 2)
    features = 5 * rng.normal(size=(60, 30))[documents] + 0.1 * rng.normal(size=(120, 30))
    assert router_memory.membership(features, documents < 30, documents) == pytest.approx(0.5, abs=0.2)


def worths():
    rows = []
    for domain, passes, true, measured in (("a", 1.0, 1.0, 0.9), ("a", 8.0, 0.5, 0.6), ("b", 4.0, 0.8, 0.75)):
        for metric, value in (("repeat/passes", passes), ("true/worth", true), ("repeat/worth", measured)):
            rows.append((domain, int(10 * passes), metric, value, value - 0.15, value + 0.15, 9, "r"))
    return pd.DataFrame(rows, columns=["domain", "step", "metric", "value", "low", "high", "n", "run"])


def test_measured_worths_are_compared_with_true_ones(tmp_path):
    from validity import repeat_truth
    from validity.text_figures import draw_worth

    repeat_truth.save(worths(), tmp_path)
    repeat_truth.save(worths().assign(run="s"), tmp_path)
    numbers = repeat_truth.tables(pd.read_parquet(tmp_path / repeat_truth.FILE))["measured against true worth"]
    found = numbers.set_index("number")["value"]
    assert found["units"] == 6
    assert found["mean of measured minus true"] == pytest.approx(-0.05 / 3)
    assert found["rank correlation"] == pytest.approx(1.0)
    assert found["share of intervals that hold the truth"] == 1
    draw_worth(tmp_path / repeat_truth.FILE, tmp_path / "worth.png")
    assert (tmp_path / "worth.png").stat().st_size > 5_000
