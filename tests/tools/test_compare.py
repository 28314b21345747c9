import shutil

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from moetrain.config import load_settings
from moetrain.grokking import Phase
from moetrain.report.compare import Cell, Row, compare, comparison_page, differing_settings, labels
from moetrain.report.open_run import RunError, open_run
from moetrain.report.page import Number
from moetrain.train import train
from tests.conftest import small_run
from tests.report.runs import PROBES, left_unfinished
from tests.report.test_report import HARM, Page
from tests.tools.test_prepare_data import load_tool
from tests.trainer.reading import scalars

tool = load_tool("compare")


@pytest.fixture(scope="module")
def other(corpus_folder, tmp_path_factory):
    """A shorter run of the same data with another learning rate."""
    out = tmp_path_factory.mktemp("compared")
    base = small_run(corpus_folder, out, tmp_path_factory.getbasetemp())
    more = ["train.max_steps=8", "optim.learning_rate=0.002", "panel.readings=5", "run.name=slow", *PROBES]
    assert train(load_settings(None, [*base, *more])) == 0
    return out / "runs" / "slow"


@pytest.fixture
def runs(finished_run, other):
    return [open_run(finished_run), open_run(other)]


def test_differing_settings_have_the_value_of_each_run(runs):
    found = {each.name: each.values for each in differing_settings(runs)}
    assert found == {
        "optim.learning_rate": [0.01, 0.002],
        "train.max_steps": [12, 8],
        "panel.readings": [10, 5],
        "monitor.store_top": [2, 0],
        "data.domains.sums.eps": [9.0, None],
    }
    assert differing_settings([runs[0], runs[0]]) == []


def test_values_are_the_newest_at_the_tokens_that_all_runs_have_reached(runs):
    found = compare(runs)
    assert (found.unit, found.labels) == ("tokens", ["run", "slow"])
    assert found.at == runs[1].tokens([8])[0] < runs[0].tokens([12])[0]
    rows = {(row.domain, row.title): row for row in found.rows}
    seen = rows["sums", "Loss of samples trained on"]
    for run, cell in zip(runs, seen.cells, strict=True):
        own = run.loss_curves.query("domain == 'sums' and metric == 'loss/panel_seen'")
        last = own[own["tokens"] <= found.at].iloc[-1]
        assert (cell.number.value, cell.number.low, cell.number.high) == (last["value"], last["low"], last["high"])
        assert cell.at == last["tokens"]
    accuracy = rows["sums", "adding: accuracy"].cells
    for run, cell in zip(runs, accuracy, strict=True):
        curve = run.curve("probe/adding/accuracy")
        assert cell.number.value == pytest.approx(curve[curve["tokens"] <= found.at]["value"].iloc[-1], abs=1e-6)
        assert cell.number.n == 60
    load = rows["", "Load of the experts, variation"].cells
    assert all(np.isfinite(cell.number.value) for cell in load)
    for run, cell in zip(runs, rows["stories", "Phase"].cells, strict=True):
        curve = run.curve("phase/stories")
        newest = curve[run.tokens(curve["step"]) <= found.at].iloc[-1]
        assert cell.text == Phase(int(newest["value"])).name.lower()


def test_runs_can_be_compared_at_an_earlier_moment_but_not_a_later_one(runs):
    early = compare(runs, at=float(runs[0].tokens([5])[0]))
    assert max(cell.at for row in early.rows for cell in row.cells if np.isfinite(cell.at)) <= early.at
    with pytest.raises(RunError, match=r"it has reached only .* tokens: compare there"):
        compare(runs, at=1e9)


def test_intervals_that_do_not_overlap_are_marked():
    def row(*ends):
        return Row("", "", [Cell(Number((low + high) / 2, low, high), 0.0) for low, high in ends])

    assert row((0, 1), (2, 3)).different
    assert row((0, 1), (0.5, 3), (1.5, 4)).different
    assert not row((0, 1), (0.5, 3)).different
    assert not row((0, 1), (np.nan, np.nan)).different


def test_runs_of_one_name_are_labelled_with_their_parent_folders(finished_run, tmp_path):
    copy = shutil.copytree(finished_run, tmp_path / "there" / finished_run.name)
    parent = finished_run.resolve().parent.name
    assert labels([open_run(finished_run), open_run(copy)]) == [f"{parent}/run", "there/run"]
    assert labels([open_run(copy), open_run(copy)]) == ["run", "run"]


def test_terminal_tables_begin_with_the_settings(finished_run, other, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    assert tool.main([str(finished_run), str(other)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "optim.learning_rate 0.01 0.002" in shown
    assert shown.index("settings that differ") < shown.index("stories, at") < shown.index("the whole model, at")
    assert "adding: accuracy" in shown


def test_the_page_overlays_the_curves_and_escapes_names(finished_run, other, tmp_path):
    copy = shutil.copytree(left_unfinished(finished_run, tmp_path / "growing"), tmp_path / HARM.replace("/", "_"))
    text = comparison_page(compare([open_run(copy), open_run(other)]))
    found = Page(text)
    assert "script" not in found.tags
    assert "<b>bold" not in text
    assert found.text.index("What differs in their settings") < found.text.index("Values at")
    assert "optim.learning_rate 0.01 0.002" in found.text
    curves = text[text.index('id="curves"') :]
    svg = curves[curves.index("Loss of samples trained on") :]
    svg = svg[svg.index("<svg") : svg.index("</svg>")]
    assert "var(--d0)" in svg
    assert "var(--d1)" in svg


def test_tensorboard_overlays_the_runs_by_tokens(runs, tmp_path, capsys):
    paths = [str(run.path) for run in runs]
    assert tool.main([*paths, "--tensorboard", str(tmp_path / "both")]) == 0
    assert sorted(path.name for path in (tmp_path / "both").iterdir()) == ["run", "slow"]
    for run in runs:
        copied, own = scalars(tmp_path / "both" / run.name), scalars(run.path)
        own = {tag: points for tag, points in own.items() if not tag.startswith("Verdict/")}  # copies of other curves
        assert copied.keys() == own.keys()
        for tag, points in own.items():
            at = np.rint(run.tokens([step for step, _ in points])).astype(int).tolist()
            assert copied[tag] == list(zip(at, [value for _, value in points], strict=True)), tag
    events = EventAccumulator(str(tmp_path / "both" / "run"))
    events.Reload()
    layout = layout_pb2.Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    pages = {page.title: {chart.title: list(chart.multiline.tag) for chart in page.chart} for page in layout.category}
    assert pages["sums"]["Loss of samples trained on"] == ["^loss/panel_seen/sums$"]
    assert pages["probes"]["adding"] == ["^probe/adding/accuracy$"]
    assert tool.main([*paths, "--tensorboard", str(tmp_path / "both")]) == 2
    assert "exists, and nothing is overwritten" in " ".join(capsys.readouterr().err.split())


def test_runs_that_cannot_be_compared_are_one_error_line(finished_run, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    shutil.copy(finished_run / "config.yaml", empty)
    cases = {
        "a comparison needs two runs or more": [str(finished_run)],
        "no config.yaml there": [str(finished_run), str(tmp_path)],
        "it has not logged anything yet": [str(finished_run), str(empty)],
    }
    for said, given in cases.items():
        assert tool.main(given) == 2
        assert said in " ".join(capsys.readouterr().err.split())
