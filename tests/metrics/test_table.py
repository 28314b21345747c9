"""The table of metrics: its rows agree with each other, and a row from outside reaches everything that reads it."""

import ast
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

import moetrain
from moetrain.config import load_settings
from moetrain.grokking import mean_of_samples
from moetrain.metrics import table
from moetrain.metrics.cell import HELDOUT, SEEN, STREAM
from moetrain.metrics.metric import Metric
from moetrain.monitoring.probe_correlations import ProbeCorrelations
from moetrain.report.compare import compare
from moetrain.routing.panel_monitor import PanelMonitor
from moetrain.routing.store import TrainingContext
from moetrain.train import train
from tests.conftest import small_run
from tests.monitoring.test_probe_correlations import FALLING, RISING, filled
from tests.report.runs import PROBES
from tests.routing.test_bad_input import FixedPanel, a_reading
from tests.trainer.reading import scalars
from tools.plot_run import panel_series


def test_names_tags_and_places_are_unique():
    names = [metric.name for metric in table.METRICS]
    tags = [metric.tag_on(cell) for metric in table.METRICS for cell in metric.cells if metric.tag]
    assert len(set(names)) == len(names)
    assert len(set(tags) - {"loss/train"}) == len(tags) - 2  # both of a domain and of the model
    for attribute in ("predictor", "evidence"):
        places = sorted(filter(None, (getattr(metric, attribute) for metric in table.METRICS)))
        assert places == list(range(1, len(places) + 1))


def test_the_predictors_are_the_columns_of_older_checkpoints():
    assert table.predictors() == {
        "d_path": "pathway/d_path",
        "consistency": "pathway/consistency",
        "cosine": "pathway/cosine",
        "sharing": "pathway/sharing",
        "spread": "pathway/spread",
        "layer_cka": "pathway/layer_cka",
        "d_eff": "kernel/d_eff",
        "left_out": "kernel/left_out",
        "effective_rank": "kernel/effective_rank",
        "train_loss": "train_loss",
        "train_loss_average": "train_loss_average",
        "validation_loss": "validation_loss",
    }


@pytest.mark.parametrize("metric", table.METRICS, ids=lambda metric: metric.name)
def test_every_row_is_described_and_titled(metric):
    assert len(metric.description) > 20
    assert metric.title
    assert metric.summary_key or metric.evidence


def test_the_room_imports_only_the_science():
    for path in Path(table.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("moetrain"):
                assert node.module.startswith(("moetrain.metrics", "moetrain.grokking")) or (
                    node.module == "moetrain" and [alias.name for alias in node.names] == ["grokking"]
                ), ast.unparse(node)
            if isinstance(node, ast.Import):
                assert all(alias.name in {*sys.stdlib_module_names, "numpy"} for alias in node.names)


LARGEST = Metric(
    "largest_share",
    "pathway/largest_share",
    "Largest share of an expert",
    (SEEN, HELDOUT, STREAM),
    lambda cell: mean_of_samples(cell.weights.max(-1).mean(-1)),
    text="Largest routing weight in a layer.\n\n- **Sign:** higher is sharper.\n- **Reading it:** beside spread.",
    by_layer=lambda cell: cell.weights.max(-1).mean(0),
    by_sample=lambda cell: cell.weights.max(-1).mean(-1),
    predictor=13,
    evidence=17,
    chart="largest share of an expert",
    compared=True,
    figure="routing",
)
TAGS = ("pathway/largest_share", "pathway_heldout/largest_share", "stream/largest_share")


@pytest.fixture(scope="module")
def extended():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table, "METRICS", (*table.METRICS, LARGEST))
        yield


@pytest.fixture(scope="module")
def folder(extended, corpus_folder, tmp_path_factory):
    """A run whose table has one row more."""
    out = tmp_path_factory.mktemp("extended")
    base = small_run(corpus_folder, out, tmp_path_factory.getbasetemp())
    more = ["panel.readings=10", "phase.documents=8", "run.report=true", *PROBES]
    assert train(load_settings(None, [*base, *more])) == 0
    return out / "runs" / "run"


def board(folder):
    events = EventAccumulator(str(folder), size_guidance={"images": 0, "histograms": 0})
    events.Reload()
    return events


def test_a_row_from_outside_is_logged_with_its_description(folder):
    points, events = scalars(folder), board(folder)
    for tag in TAGS:
        for domain in ("stories", "sums"):
            assert all(0 < value < 1 for _, value in points[f"{tag}/{domain}"])
            assert events.SummaryMetadata(f"{tag}/{domain}").summary_description == LARGEST.text
    assert "pathway/largest_share_by_layer/sums" in events.Tags()["images"]
    assert "pathway/largest_share_by_sample/sums" in events.Tags()["histograms"]
    layout = layout_pb2.Layout.FromString(events.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0])
    charts = {chart.title: list(chart.multiline.tag) for page in layout.category for chart in page.chart}
    assert charts["largest share of an expert"] == [f"^pathway/largest_share/{d}$" for d in ("stories", "sums")]


def test_a_row_from_outside_is_in_the_summary_and_in_the_frames(folder):
    summary = json.loads((folder / "summary.json").read_text())
    run = moetrain.open_run(folder)
    for domain in run.domains:
        for tag in TAGS:
            kept = summary["domains"][domain]["metrics"][tag]
            assert kept["low"] < kept["value"] < kept["high"]
        row = run.summary.query(f"domain == '{domain}' and metric == 'pathway/largest_share'").iloc[0]
        assert row["value"] == summary["domains"][domain]["metrics"]["pathway/largest_share"]["value"]
        last = run.metrics_at(run.reading_steps[-1])[f"pathway/largest_share/{domain}"]
        assert (row["low"], row["high"], row["n"]) == (last.low, last.high, last.samples)
    assert np.isfinite(run.by_layer.query("step == 12")["largest_share"].astype(float)).all()


def test_a_row_from_outside_is_a_predictor(folder, extended):
    run = moetrain.open_run(folder)
    for domain in run.domains:
        own = run.predictors[run.predictors["domain"] == domain]["largest_share"].astype(float)
        logged = run.curve(f"pathway/largest_share/{domain}")["value"]
        assert own.iloc[-1] == logged.iloc[-1]
    found = filled(RISING, FALLING).correlations("math")
    assert list(found)[-1] == "largest_share"
    assert found["largest_share"]["raw", "spearman"].note == "too few"
    assert table.describe("correlation/largest_share/math") == table.find("correlation").description


def panel_reading(step):
    reading = a_reading(
        np.random.default_rng(step), 3, 8, [(0, 0, 5), (1, 0, 5), (0, 2, 21), (1, 2, 21)], [], step=step
    )
    return replace(reading, training_context=TrainingContext(100 * step))


def test_a_checkpoint_from_before_a_row_was_added_can_be_loaded(monkeypatch):
    before = tuple(metric for metric in table.METRICS if metric is not LARGEST)
    monkeypatch.setattr(table, "METRICS", before)
    relations = filled(RISING, FALLING)
    monitor = PanelMonitor(FixedPanel(), ["a", "b"], 0.7, 40, dict.fromkeys("ab"))
    for step in (1, 2):
        monitor.take(panel_reading(step))
    monkeypatch.setattr(table, "METRICS", (*before, LARGEST))
    correlations = ProbeCorrelations(["math", "code"], relations._history)
    correlations.load_state(relations.state())
    assert correlations.correlations("math")["largest_share"]["raw", "spearman"].note == "too few"
    later = PanelMonitor(FixedPanel(), ["a", "b"], 0.7, 40, dict.fromkeys("ab"))
    later.load_state(monitor.state())
    assert later.take(panel_reading(3)).metrics["pathway/largest_share/a"].samples == 5
    assert later.state()["largest_share.a"][:, 0].isnan().tolist() == [True, True, False]


def test_a_row_from_outside_is_evidence_of_a_verdict(folder):
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    evidence = [event["evidence"] for event in events if event["type"] == "phase"]
    assert evidence
    for listed in evidence:
        assert listed[-1]["name"] == "largest_share"
        assert listed[-1]["value"] > 0


def test_a_row_from_outside_is_in_the_report_the_comparison_and_the_plots(folder):
    text = (folder / "report.html").read_text()
    assert text.count("Largest share of an expert") >= 3  # figure, control, evidence
    assert "Higher is sharper." in text
    run = moetrain.open_run(folder)
    rows = {(row.domain, row.title): row for row in compare([run, moetrain.open_run(folder)]).rows}
    assert all(rows[domain, LARGEST.title].cells[0].number for domain in run.domains)
    assert "pathway/largest_share" in panel_series(folder, load_settings(folder / "config.yaml"), 12)
