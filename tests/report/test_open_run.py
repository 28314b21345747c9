import json
import math
import shutil

import numpy as np
import pandas as pd
import pytest
import yaml

import moetrain
from moetrain.metrics import table
from moetrain.metrics.latest import LatestMetrics, as_metric
from moetrain.monitoring.probe_correlations import ProbeCorrelations
from moetrain.probes.history import ProbeHistory
from moetrain.report import records as module
from moetrain.report.open_run import MissingPackageError, RunError, open_run
from moetrain.routing.store import StoreError, read_readings
from tests.report.runs import left_unfinished
from tests.trainer.reading import events, scalars, states


@pytest.fixture(scope="module")
def run(finished_run):
    return moetrain.open_run(finished_run)


@pytest.fixture
def unfinished(finished_run, tmp_path):
    return open_run(left_unfinished(finished_run, tmp_path / "growing"))


def last_state(folder):
    return states(max((folder / "checkpoints").iterdir()))


def test_settings_are_those_of_the_file_with_defaults(run, finished_run):
    settings = run.settings.set_index("setting")
    tree = yaml.safe_load((finished_run / "config.yaml").read_text())
    assert settings.loc["model.num_experts"].tolist() == [tree["model"]["num_experts"], 16]
    assert settings.loc["data.domains.sums.repeats"].tolist() == [1, 1]
    assert settings.loc["data.domains.sums.path", "value"] == "sums.jsonl"
    assert run.setting("panel.tokens") == 16
    assert run.domains == ["stories", "sums"]
    assert (run.name, run.finished) == ("run", True)


def test_a_setting_missing_in_an_older_run_is_its_default(finished_run, tmp_path):
    older = tmp_path / "older"
    shutil.copytree(finished_run, older)
    tree = yaml.safe_load((older / "config.yaml").read_text())
    del tree["monitor"]["tau"]
    (older / "config.yaml").write_text(yaml.safe_dump(tree))
    assert open_run(older).setting("monitor.tau") == 0.7


def test_scalars_are_tensorboards_points_with_the_tokens_of_their_steps(run, finished_run):
    found = {
        tag: list(zip(own["step"], own["value"], strict=True)) for tag, own in run.scalars.groupby("tag", sort=False)
    }
    copies = "Verdict/"  # of curves that stand under their own tags
    expected = {tag: points for tag, points in scalars(finished_run).items() if not tag.startswith(copies)}
    assert {tag: points for tag, points in found.items() if not tag.startswith("system/")} == expected
    counted = {step: sum(dict(expected[f"data/tokens/{d}"])[step] for d in run.domains) for step in (3, 12)}
    by_step = run.curve("loss/train").set_index("step")["tokens"]
    assert by_step[3] == counted[3]
    assert by_step[12] == counted[12] == sum(d["met_tokens"] for d in run.outcome["data"].values())
    between = run.tokens([0, 2, 3])
    assert between.tolist() == [0, pytest.approx(counted[3] * 2 / 3), counted[3]]
    assert run.curve("loss/nothing").empty
    assert run.scalars["time"].is_monotonic_increasing or run.scalars["time"].notna().all()


def test_events_and_the_summary_are_the_files(run, finished_run):
    written = events(finished_run)
    assert run.events["type"].tolist() == [event["type"] for event in written]
    assert run.events_of("probe") == [event for event in written if event["type"] == "probe"]
    summary = json.loads((finished_run / "summary.json").read_text())
    rows = run.summary.set_index(["domain", "task", "metric"])
    for domain, found in summary["domains"].items():
        for metric, each in found["metrics"].items():
            numbers = [math.nan if each[key] is None else each[key] for key in ("value", "low", "high", "n")]
            assert np.array_equal(rows.loc[(domain, "", metric)].to_numpy(float), numbers, equal_nan=True)
    assert rows.loc[("sums", "adding", "accuracy"), "n"] == 60
    chances = run.tasks.set_index("task")["chance"]
    assert chances["adding"] == 0.25
    assert chances["owners"] == pytest.approx(3 / 15)


def test_the_panel_and_its_metrics_are_those_of_the_stored_readings(run, finished_run):
    readings = list(read_readings(finished_run))
    assert run.reading_steps == [reading.step for reading in readings]
    assert len(run.panel) == sum(len(reading.loss) for reading in readings)
    last = run.panel[run.panel["step"] == 12]
    assert last["loss"].tolist() == readings[-1].loss.tolist()
    assert last["document"].tolist() == readings[-1].document.tolist()
    assert set(last["cell"]) == {"seen", "to_come", "heldout"}
    again = run.metrics_at(12)
    for domain, found in run.outcome["domains"].items():
        for metric in ("pathway/d_path", "pathway_heldout/cosine", "loss/panel_seen", "kernel/effective_rank"):
            assert as_metric(again[f"{metric}/{domain}"]) == found["metrics"][metric]
    assert not any(tag.startswith("memorized/gap/") for tag in again)  # not taken at the end
    assert np.array_equal(run.reading(12).even, readings[-1].even)
    with pytest.raises(StoreError, match=r"panel_00000006\.parquet: missing"):
        run.reading(6)


def test_probe_answers_and_training_samples_are_complete(run):
    answers = run.probes
    assert answers.groupby("task", observed=True)["item"].nunique().to_dict() == {"adding": 60, "owners": 15}
    newest = answers[(answers["step"] == 12) & (answers["task"] == "adding")]
    logged = run.curve("probe/adding/accuracy")["value"].iloc[-1]
    assert newest["correct"].mean() == pytest.approx(logged, abs=1e-6)
    assert {len(choices) for choices in newest["log_probs"]} == {4}
    assert run.samples.attrs == {"layers": 3, "top": 2}
    assert sorted(run.samples["order"]) == run.samples["order"].tolist()
    assert {len(experts) for experts in run.samples["experts"]} == {6}
    assert run.samples["step"].max() == 12


def test_metrics_by_layer_equal_those_computed_during_training(run, finished_run):
    state = last_state(finished_run)
    for domain in run.domains:
        own = run.by_layer[run.by_layer["domain"] == domain]
        for column, name in (("d_path", "by_layer"), ("d_eff", "dimension_by_layer")):
            table = own.pivot_table(index="step", columns="layer", values=column, dropna=False).to_numpy(float)
            assert np.array_equal(table, state[f"panel/{name}.{domain}"].numpy(), equal_nan=True)


def test_memorized_samples_are_those_of_the_summary(run):
    for domain in run.domains:
        found = run.outcome["domains"][domain]["memorized"]
        own = run.onsets[run.onsets["domain"] == domain]
        assert len(own) == found["samples"]
        assert own["eps"].iloc[0] == found["eps"] or (found["eps"] is None and own["eps"].isna().all())
        sizes = {str(step): int(n) for step, n in own.loc[own["step"] >= 0, "step"].value_counts().sort_index().items()}
        assert sizes == found.get("groups", {})
    assert (run.onsets.loc[run.onsets["step"] < 0, "tokens"].isna()).all()


def test_losses_and_gaps_have_the_logged_intervals(run):
    rows = run.loss_curves.set_index(["domain", "metric", "step"]).sort_index()
    for domain, found in run.outcome["domains"].items():
        for metric in ("loss/panel_seen", "loss/panel_heldout", "memorized/gap_heldout", "memorized/gap"):
            logged = found["metrics"][metric]
            step = run.curve(f"{metric}/{domain}")["step"].iloc[-1]
            numbers = rows.loc[(domain, metric, step), ["value", "low", "high", "n"]].tolist()
            assert numbers == [logged["value"], logged["low"], logged["high"], logged["n"]]
            assert len(rows.loc[(domain, metric)]) == len(run.curve(f"{metric}/{domain}"))


def test_predictors_are_those_that_the_run_correlated(run, finished_run):
    state = last_state(finished_run)
    for domain in run.domains:
        own = run.predictors[run.predictors["domain"] == domain]
        kept = state[f"relations/{domain}"].numpy()
        assert np.allclose(own[list(table.predictors())].to_numpy(float), kept, rtol=1e-5, equal_nan=True)
        accuracy = run.outcome["domains"][domain]["correlations"]["accuracy"]
        assert own["accuracy"].tolist() == accuracy
        assert (own["low"] <= own["accuracy"]).all()
        assert (own["accuracy"] <= own["high"]).all()


def test_correlations_of_an_unfinished_run_equal_those_of_training(unfinished):
    rng = np.random.default_rng(0)
    rising = np.linspace(0.3, 0.9, 12)
    frame = {"domain": "sums", "step": range(10, 130, 10), "items": 400, "chance": 0.25, "accuracy": rising}
    frame |= {name: rng.normal(size=12) for name in table.predictors()} | {"tokens": np.arange(1, 13) * 1000.0}
    unfinished.predictors = pd.DataFrame(frame)
    correlations = ProbeCorrelations(["sums"], ProbeHistory([]))
    correlations.accuracy = lambda domain: (rising, 0.25, 400)
    correlations._history._tokens = [1000 * n for n in range(1, 13)]
    for place in range(12):
        metrics = {metric: {"value": frame[name][place]} for name, metric in table.predictors().items()}
        latest = LatestMetrics(["sums"])
        latest.domains["sums"]["metrics"] = metrics
        correlations.add(latest)
    expected_table = correlations.as_dict("sums")["predictors"]
    found = unfinished.correlations
    own = found[found["domain"] == "sums"].set_index(["predictor", "series", "method"])
    assert len(own) == 6 * len(table.predictors())
    for predictor, by_kind in expected_table.items():
        for kind, each in by_kind.items():
            row = own.loc[(predictor, *kind.split(" "))]
            expected = [math.nan if each[key] is None else each[key] for key in ("value", "low", "high", "p", "n")]
            assert np.array_equal(row[["value", "low", "high", "p", "n"]].to_numpy(float), expected, equal_nan=True)
            assert row["note"] == each["note"]
    (other,) = found[found["domain"] == "stories"].to_dict("records")
    assert other["note"] == "no task of this domain that is answered right or wrong"


def test_the_summary_of_an_unfinished_run_equals_that_of_the_finished_one(run, unfinished):
    assert not unfinished.finished
    assert len(unfinished.events) == len(run.events)  # the torn one is left out
    whole, growing = (each.summary.set_index(["domain", "task", "metric"]).sort_index() for each in (run, unfinished))
    assert set(growing.index) == set(whole.index)
    both = whole.loc[growing.index]
    assert np.allclose(growing["value"], both["value"], rtol=1e-5, equal_nan=True)
    of_the_panel = ("pathway", "kernel", "memorized/gap", "memorized/fraction", "loss/panel")
    panel = growing.index.get_level_values("metric").str.startswith(of_the_panel)
    assert panel.sum() > 30
    assert np.array_equal(growing[panel].to_numpy(float), both[panel].to_numpy(float), equal_nan=True)
    probed = growing.index.get_level_values("task") != ""
    assert np.array_equal(growing[probed].to_numpy(float), both[probed].to_numpy(float), equal_nan=True)
    assert unfinished.delays.empty
    assert unfinished.onsets.equals(run.onsets)
    assert unfinished.tasks.equals(run.tasks)


def test_pairs_of_groups_have_the_steps_of_their_readings(unfinished, run):
    pair = {"memorized_at": 1, "generalized_at": 2, "similarity": 0.5, "samples": 3, "items": 4}
    pair["delay"] = {"steps": 5.0, "tokens": 600.0, "steps_resolution": 3.0, "tokens_resolution": 300.0}
    unfinished.outcome = {
        "domains": {"sums": {"delay": {"pairs": [pair], "note": ""}}, "stories": {"delay": {"pairs": [], "note": "no"}}}
    }
    first, second = unfinished.delays.to_dict("records")
    probed = sorted(run.probes["step"].unique())
    assert (first["memorized_step"], first["generalized_step"]) == (run.reading_steps[1], probed[2])
    assert (first["delay_steps"], first["resolution_tokens"], first["note"]) == (5.0, 300.0, "")
    assert (second["domain"], second["samples"], second["note"]) == ("stories", 0, "no")


def test_a_folder_without_records_gives_empty_frames(finished_run, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(finished_run / "config.yaml", bare)
    run = open_run(bare)
    for name in ("scalars", "events", "summary", "panel", "probes", "samples", "tasks", "by_layer", "onsets"):
        assert getattr(run, name).empty, name
    for name in ("accuracy", "predictors", "loss_curves", "delays"):
        assert getattr(run, name).empty, name
    assert np.isnan(run.tokens([1, 2])).all()
    assert run.correlations["note"].nunique() == 1


def test_a_folder_without_a_run_or_with_corrupt_files_is_one_error(finished_run, tmp_path):
    with pytest.raises(RunError, match=r"none: no config\.yaml there: give the folder of a run, such as"):
        open_run(tmp_path / "none")
    for name, content, said in (
        ("summary.json", "{", r"summary\.json: cannot be read"),
        ("events.jsonl", "{]\n", r"events\.jsonl: cannot be read"),
        ("config.yaml", "a: [", r"config\.yaml: cannot be read"),
        ("config.yaml", "just text", r"config\.yaml: holds no settings"),
    ):
        copy = tmp_path / f"damaged-{len(list(tmp_path.iterdir()))}"
        copy.mkdir()
        shutil.copy(finished_run / "config.yaml", copy)
        (copy / name).write_text(content)
        with pytest.raises(RunError, match=said):
            (lambda run: (run.outcome, run.events, run.settings))(open_run(copy))


def test_without_pandas_the_error_names_the_package(finished_run, monkeypatch):
    opened = moetrain.open_run
    monkeypatch.setattr(module.importlib, "import_module", _missing("pandas"))
    with pytest.raises(MissingPackageError, match=r"open_run needs pandas: pip install 'moetrain\[report\]'"):
        opened(finished_run)


def test_a_broken_package_raises_its_own_error(monkeypatch):
    monkeypatch.setattr(module.importlib, "import_module", _missing("something_of_its_own"))
    with pytest.raises(ModuleNotFoundError, match="something_of_its_own") as found:
        module.need("pandas", "open_run")
    assert not isinstance(found.value, MissingPackageError)


def _missing(name):
    def load(package):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    return load


def test_importing_moetrain_imports_nothing_large(monkeypatch):
    import subprocess
    import sys

    code = "import moetrain, sys; print([m for m in ('torch', 'pandas', 'matplotlib') if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
