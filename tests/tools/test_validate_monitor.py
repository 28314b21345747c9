"""The validity study's plan, truths, separation and error rates, on readings made up so that the answers are known."""

import json
import runpy
import sys

import numpy as np
import pandas as pd
import pytest
import validate_monitor as validate
from scipy.stats import mannwhitneyu
from validity import plan, readings, separation, units, verdicts

from moetrain.config import load_settings

STEPS = np.arange(0, 1700, 80)


def made_up(runs, noise=0.0, seed=0):
    """Readings of runs with a domain that generalizes and one that does not, as the study measures them."""
    rng = np.random.default_rng(seed)
    rows = []
    rise = np.clip((STEPS - 400) / 800, 0, 1)
    for run in runs:
        for domain, heldout, left_out in (("modular", rise, 0.4 * rise), ("random", 0.02 + 0 * rise, 0.03 + 0 * rise)):
            values = {
                "trained_accuracy": np.clip(STEPS / 500, 0, 1),
                "heldout_accuracy": heldout,
                "kernel/left_out": np.clip(left_out + noise * rng.normal(size=len(STEPS)), 0, 1),
                "loss/panel_seen": 4 * np.exp(-STEPS / 150) + 0.1,
                "loss/panel_heldout": 4 * np.exp(-STEPS / 150) * heldout + 4.1 * (1 - heldout),
                "memorized/share": 0.9 * (1 - heldout),
                "pathway/d_path_norm": 0.7 + 0.01 * rng.normal(size=len(STEPS)),
                "length": np.full(len(STEPS), 10.0),
            }
            for metric, curve in values.items():
                rows += [(run, domain, int(step), metric, v, v, v, 128) for step, v in zip(STEPS, curve, strict=True)]
        for metric in ("entropy", "load_cv"):
            rows += [(run, "", int(step), metric, rng.random(), np.nan, np.nan, 1) for step in STEPS]
    return pd.DataFrame(rows, columns=["run", "domain", "step", "metric", "value", "low", "high", "n"])


@pytest.fixture(scope="module")
def runs():
    return plan.read_plan()


@pytest.fixture(scope="module")
def judged(runs):
    table = made_up([run.name for run in runs], noise=0.01)
    found = units.make_units(table, runs)
    return table, found, verdicts.judge(table, found)


def test_the_plan_has_fit_and_test_runs(runs):
    parts = {part: [run for run in runs if run.part == part] for part in ("fit", "test")}
    assert len(parts["fit"]) >= 12
    assert len(parts["test"]) >= 21
    assert len({run.seed for run in runs}) == len(runs)
    assert {run.variant for run in parts["test"]} - {run.variant for run in parts["fit"]}


def test_every_planned_run_has_valid_settings(runs, tmp_path):
    for run in runs:
        settings = load_settings(plan.STUDIES["planted"] / "base.yaml", [*run.overrides, f"run.output_dir={tmp_path}"])
        assert settings.run.seed == run.seed
        assert settings.panel.samples >= 96  # for leave-one-out accuracy


def test_truth_follows_held_out_accuracy(judged):
    _, found, _ = judged
    assert set(found.loc[found["domain"] == "modular", "truth"]) == {"generalizes"}
    assert set(found.loc[found["domain"] == "random", "truth"]) == {"memorized"}
    one = found[found["domain"] == "modular"].iloc[0]
    assert one["memorized"] == 560  # the first reading whose mean with the one before reaches 0.9
    assert one["half_rise"] == 800
    assert one["kernel/left_out"] == pytest.approx(0.4, abs=0.02)


def test_auc_is_mann_whitneys(judged):
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 6, 30), rng.integers(1, 8, 20)
    assert separation.auc(a, b) == pytest.approx(mannwhitneyu(a, b).statistic / (30 * 20))
    assert np.isnan(separation.auc(a, b[:0]))


def test_auc_of_a_separating_metric_and_of_noise(judged, monkeypatch):
    monkeypatch.setattr(separation, "RESAMPLES", 50)
    _, found, _ = judged
    table = separation.tables(found)["at the end"].set_index("measure")
    assert table.loc["leave-one-out accuracy", "auc"] == 1
    assert table.loc["leave-one-out accuracy", "sign"] == "+"
    distance = table.loc["D_path, normalised"]
    assert distance["low"] <= 0.5 <= distance["high"]
    assert 0 < distance["low"] < distance["auc"] < distance["high"] < 1


def test_the_yardstick_removes_differences_between_runs():
    rows = []
    for run, level in enumerate((0.0, 0.3, 0.1, 0.6)):
        part = "fit" if run < 2 else "test"
        for domain, truth, more in (
            ("random", "memorized", 0.0),
            ("rule", "generalizes", 0.2),
            ("other", "memorized", 0.1),
        ):
            rows.append((str(run), part, domain, truth, level + more))
    made = pd.DataFrame(rows, columns=["run", "part", "domain", "truth", "kernel/left_out"])
    found = separation.yardstick(made, resample=False).set_index("measure")
    assert list(found["auc"]) == [0.75, 1.0]
    assert list(found["generalize"]) == list(found["memorized"]) == [2, 2]


def test_verdicts_and_their_rates(judged):
    _, _, rows = judged
    test = rows[rows["part"] == "test"]
    rates = verdicts.rates(test).set_index("rate")
    assert rates.loc["of those, rightly", "share"] == 1
    assert rates.loc["memorized units called generalizing at the end", "units"] == 0
    assert rates.loc["memorized units called generalizing at the end", "high"] > 0  # zero of few is not a rate of zero
    early = test[test["truth"] == "generalizes"]
    assert (early["since"] > early["half_rise"] - 500).all()
    by_variant = verdicts.by_variant(test)
    assert (by_variant["right"] == by_variant["units"]).all()


def test_the_share_of_older_runs_follows_from_the_gap():
    keys = ["domain", "step", "metric", "value", "low", "high", "n", "run"]
    rows = [
        ("d", 0, "loss/panel_heldout", 6.0, 6.0, 6.0, 9, "a"),
        ("d", 80, "loss/panel_heldout", 4.0, 4.0, 4.0, 9, "a"),
    ]
    rows += [
        ("d", 80, "loss/panel_seen", 2.0, 2.0, 2.0, 9, "a"),
        ("d", 80, "memorized/gap_heldout", 2.0, 1.0, 3.0, 18, "a"),
    ]
    old = pd.DataFrame(rows, columns=keys)
    found = readings.with_share(old)
    share = found[found["metric"] == "memorized/share"].iloc[0]
    assert share[["step", "value", "low", "high", "n"]].tolist() == [80, 0.5, 0.25, 0.75, 18]
    assert readings.with_share(found) is found


def test_tables_are_saved_and_loaded(judged, tmp_path):
    table, _, _ = judged
    empty = pd.DataFrame({"run": ["a"], "domain": ["b"]})
    readings.save({"readings": table} | dict.fromkeys(readings.TABLES[1:], empty), tmp_path)
    again = readings.load(tmp_path)
    np.testing.assert_allclose(again["readings"]["value"], table["value"], rtol=1e-6)
    (tmp_path / "layers.parquet").unlink()
    with pytest.raises(plan.StudyError, match=r"layers\.parquet: missing"):
        readings.load(tmp_path)


def test_measuring_again_replaces_only_the_rows_of_these_runs(tmp_path):
    def tables(*rows):
        return dict.fromkeys(readings.TABLES, pd.DataFrame(rows, columns=["run", "value"]))

    before, new = tables(("a", 1.0), ("a", 2.0), ("b", 3.0)), tables(("a", 4.0), ("c", 5.0))
    assert readings.renew(new, tmp_path) is new
    readings.save(before, tmp_path)
    for frame in readings.renew(new, tmp_path).values():
        assert list(frame.itertuples(index=False, name=None)) == [("b", 3.0), ("a", 4.0), ("c", 5.0)]


@pytest.mark.slow
def test_the_committed_numbers_follow_from_the_tables():
    tables = readings.load(validate.RESULTS / "planted")
    found = validate.report(tables, plan.read_plan())
    numbers = validate.summary(found, tables)
    assert numbers["runs"] == {"fit": 15, "test": 22}
    assert json.loads(validate.SUMMARY.read_text())["planted"] == numbers
    low, high = numbers["auc_heldout_interval"]
    assert 0.5 < low < numbers["auc_heldout"] < high <= 1
    judged = found["verdicts on the test runs"].set_index("truth")
    wrong = judged.loc["memorized", ["generalizing", "settled"]].sum()
    assert numbers["false_alarm_rate"] == pytest.approx(wrong / judged.loc["memorized"].sum(), abs=1e-6)


def test_errors_are_one_line(capsys, tmp_path):
    assert validate.main(["tables", "--results", str(tmp_path)]) == 2
    assert "readings.parquet: missing" in capsys.readouterr().err
    assert validate.main(["measure", "--output", str(tmp_path)]) == 2
    assert "no finished run" in capsys.readouterr().err
    assert validate.main(["run", "--only", "99_base"]) == 2
    assert "99_base" in capsys.readouterr().err


def test_missing_pandas_is_an_error_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(SystemExit, match=r"moetrain\[report\]"):
        runpy.run_path(validate.__file__)
