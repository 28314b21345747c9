"""Whole runs in turns, and how costs grow with size."""

import bench
import pytest
from benchmarks import growth, overhead

from moetrain.config import SettingsError
from tests.tools.benchmark import run


@pytest.mark.slow  # trains five small runs in processes of their own
def test_whole_runs_with_and_without_the_monitor(config, tmp_path, capsys):
    result = run(tmp_path, "overhead", *config, "train.max_steps=4", "--turns", "1", "--starts", "1")
    on, off = (result["sides"][side] for side in ("on", "off"))
    assert on["turns"] == off["turns"] == 1
    assert result["overhead"]["share"] == pytest.approx(on["seconds"] / off["seconds"] - 1)
    assert on["runs"][0]["steps"] == off["runs"][0]["steps"] == 4
    assert result["by_the_clock"] == [on["runs"][0]["monitor_share"]]
    assert result["by_the_clock"][0] > 0 == off["runs"][0]["monitor_share"]
    assert off["runs"][0]["seconds"].get("panel", 0) == 0 < on["runs"][0]["seconds"]["panel"]
    assert {domain["phase"] for domain in off["runs"][0]["domains"].values()} == {None}
    assert all(domain["phase"] for domain in on["runs"][0]["domains"].values())
    assert "against_old" not in result
    assert 0 < result["seconds_to_first_step"]["on"][0] < on["seconds"] + 30
    assert "off" not in result["seconds_to_first_step"]
    assert "with over without" in capsys.readouterr().out


@pytest.mark.slow  # trains two small runs in processes of their own
def test_both_sides_at_the_same_time_are_compared_while_both_train(config, tmp_path, capsys):
    result = run(tmp_path, "overhead", *config, "train.max_steps=40", "--turns", "1", "--together")
    on, off = (result["sides"][side] for side in ("on", "off"))
    assert on["runs"][0]["steps"] == off["runs"][0]["steps"] == 40
    assert off["runs"][0]["monitor_share"] == 0 < on["runs"][0]["monitor_share"]
    assert result["overhead"]["share"] == pytest.approx(on["seconds_per_step"][0] / off["seconds_per_step"][0] - 1)
    assert "while both train" in " ".join(capsys.readouterr().out.split())


def test_steps_between_two_times_are_interpolated_between_lines():
    times = [(1, 10.0), (5, 14.0), (10, 24.0)]
    assert overhead._steps_between(times, 12.0, 19.0) == pytest.approx(7.5 - 3)


def test_a_run_that_fails_and_a_folder_that_is_no_checkout_are_named(config, tmp_path):
    for words, message in (
        (["--old", str(tmp_path)], "no checkout of moetrain: moetrain/train.py is missing"),
        (["data.seq_len=1"], "status 2: error: "),
        (["other.yaml"], "overhead takes one configuration"),
    ):
        with pytest.raises(SettingsError, match=message):
            overhead.run(bench.parse(["overhead", *config, *words]))


def test_a_verdict_in_the_table_has_its_share_and_interval():
    share = {"value": 0.12, "low": 0.05, "high": 0.2}
    assert overhead._verdict({"phase": "memorizing", "memorized/share": share}) == "memorizing, 0.120 (0.050 to 0.200)"
    assert overhead._verdict({"phase": "undecided"}) == "undecided"
    assert overhead._verdict({"phase": None}) == "-"


def test_growth_is_the_slope_between_the_two_largest_sizes():
    rows = [
        {"varied": "layers", "size": size, "step": 0.1 * size, "record": 0.01, "reading": 2e-3 * size**2}
        for size in (2, 4, 8)
    ]
    rows[0]["step"] = 99.0  # the smallest does not count
    assert growth.growth(rows)["layers"] == pytest.approx({"step": 1.0, "record": 0.0, "reading": 2.0})
    assert growth.growth(rows[:1]) == {}


def test_costs_are_measured_per_size_and_the_windows_hold_no_more_later(tmp_path, capsys):
    few = ("--only", "layers", "memory", "--most", "1", "--steps", "2", "--readings", "1", "--stream", "400")
    result = run(tmp_path, "growth", *few)
    (row,) = result["rows"]
    assert (row["varied"], row["size"]) == ("layers", 2)
    assert row["panel"] <= 2 * (2 * growth.BASE["panel samples"] + growth.BASE["panel samples"] // 4)
    assert min(row[cost] for cost in growth.COSTS) > 0
    assert row["tokens_per_second"] == pytest.approx(growth.STEP_TOKENS / row["step"], rel=0.1)
    points = [point["bytes"] for point in result["memory"]["points"]]
    assert len(points) == 10
    assert max(points[5:]) < 1.05 * min(points[5:])
    assert "kB held" in capsys.readouterr().out
