"""Every number of the monitor comes out of the run's Parquet files again.

Of a run that takes seconds; or of any run: ``MOETRAIN_RUN=runs/NAME pytest tests/monitoring/test_recompute.py``.
"""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest

from moetrain.config import load_settings
from moetrain.grokking import PhaseThresholds, left_out
from moetrain.report.learning_figures import memorization
from moetrain.report.open_run import open_run
from moetrain.routing.panel import SEEN
from moetrain.routing.panel_monitor import PanelMonitor
from moetrain.routing.store import read_readings
from moetrain.train import train
from tests.conftest import MARKED_ANSWERS, small_run
from tests.trainer.reading import scalars


@pytest.fixture(scope="module")
def run(corpus_folder, tmp_path_factory):
    if given := os.environ.get("MOETRAIN_RUN"):
        return Path(given)
    out = tmp_path_factory.mktemp("recomputed")
    base = small_run(corpus_folder, out, tmp_path_factory.getbasetemp())
    extra = [
        "probes.tasks=[quiz.jsonl]",
        "data.domains.stories.eps=5.0",
        "panel.readings=6",
        "panel.linear_kernel=true",
        *MARKED_ANSWERS,
    ]
    assert train(load_settings(None, [*base, *extra])) == 0
    return out / "runs" / "run"


def stored_panel(reading, domains):
    """The panel as far as a monitor asks, from a reading on disk."""
    number = {name: n for n, name in enumerate(domains)}
    own = np.array([number[name] for name in reading.domain])
    return SimpleNamespace(
        members=lambda domain, cell: np.flatnonzero((own == domain) & (reading.cell == cell)),
        names=lambda members: [f"{reading.document[m]:016x}/{reading.piece[m]}" for m in members],
        first_step=reading.first_step,
        samples=SimpleNamespace(document=reading.document),
    )


def test_the_panels_numbers_phases_and_memorized_shares(run):
    settings = load_settings(run / "config.yaml")
    steps = json.loads((run / "summary.json").read_text())["steps"]
    domains = list(settings.data.domains)
    readings = list(read_readings(run))
    assert len(readings) == len({*np.round(np.linspace(0, steps, settings.panel.readings)).astype(int).tolist()})
    monitor = PanelMonitor(
        stored_panel(readings[0], domains),
        domains,
        settings.monitor.tau,
        steps,
        {name: domain.eps for name, domain in settings.data.domains.items()},
        PhaseThresholds(**settings.phase.model_dump()),
    )
    again, events = {}, []
    for reading in readings:
        points = monitor.take(reading)
        found = {tag: estimate.mean for tag, estimate in points.metrics.items()}
        found |= {f"phase/{domain}": float(verdict.phase) for domain, verdict in points.phases.items()}
        for tag, value in found.items():
            again.setdefault(tag, []).append((reading.step, float(np.float32(value))))
        events += [(reading.step, domain, change.after.name.lower()) for domain, change in points.changes.items()]
    logged = {tag: series for tag, series in scalars(run).items() if tag.startswith(PANEL_TAGS)}
    assert len(logged) >= 40
    assert logged.keys() == again.keys()
    different = [tag for tag in logged if logged[tag] != again[tag]]
    assert different == []
    told = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [(e["step"], e["domain"], e["after"]) for e in told if e["type"] == "phase"] == events
    assert monitor.panel.members(0, SEEN).size


def test_left_out_accuracy_from_the_pieces_of_answers(run):
    again = {}
    for path in sorted((run / "routing").glob("answers_*.parquet")):
        step = int(path.stem.removeprefix("answers_"))
        answers = pq.read_table(path).to_pandas()
        panel = pq.read_table(path.with_name(path.name.replace("answers", "panel"))).to_pandas()
        met = (panel["cell"] == "seen") & (panel["first_step"] > 0) & (panel["first_step"] <= step)
        layers = int(pq.read_schema(path).metadata[b"layers"])
        for domain, own in panel[met].groupby("domain", observed=True):
            rows = answers[answers["member"].isin(own.index)]
            if len(rows):
                weights = np.stack(rows["weights"]).astype(float).reshape(len(rows), layers, -1)
                weights /= weights.sum(-1, keepdims=True)
                found = left_out(weights, rows["member"], rows["place"], rows["token"])
                again.setdefault(f"kernel/left_out/{domain}", []).append((step, found))
    logged = {tag: series for tag, series in scalars(run).items() if tag.startswith("kernel/left_out")}
    if "MOETRAIN_RUN" not in os.environ:
        assert [*logged] == ["kernel/left_out/rule"]
    assert logged == {tag: [(step, float(np.float32(e.mean))) for step, e in series] for tag, series in again.items()}
    shown = open_run(run).left_out
    for tag, series in again.items():
        rows = shown[shown["domain"] == tag.rpartition("/")[2]]
        expected = [[step, e.mean, e.low, e.high, e.samples] for step, e in series]
        assert rows[["step", "value", "low", "high", "n"]].to_numpy(float).tolist() == expected
        figure = next(f for f in memorization(open_run(run)).figures if f.title == tag.rpartition("/")[2])
        assert "leave-one-out accuracy" in str(figure.svg)


PANEL_TAGS = ("pathway/", "pathway_", "kernel/", "phase/", "loss/panel")
PANEL_TAGS += tuple(f"memorized/{name}" for name in ("gap", "fraction", "share", "claim_ratio"))


def test_the_probes_accuracies_and_probabilities(run):
    curves, again = scalars(run), {}
    for path in sorted((run / "routing").glob("probe_*.parquet")):
        frame = pq.read_table(path).to_pandas()
        for task, rows in frame.groupby("task", observed=True):
            if rows.correct.notna().all():
                value = (int(rows.step.iloc[0]), float(np.float32(rows.correct.astype(float).mean())))
                again.setdefault(f"probe/{task}/accuracy", []).append(value)
    logged = {tag: series for tag, series in curves.items() if tag.startswith("probe/") and tag.endswith("/accuracy")}
    assert logged == again
