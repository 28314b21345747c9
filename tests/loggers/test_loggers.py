import io
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from moetrain.checkpoint.manager import save_checkpoint
from moetrain.grokking import Estimate, Phase
from moetrain.loggers.events import Events
from moetrain.loggers.heat_map import heat_map
from moetrain.loggers.phase_image import phase_image
from moetrain.loggers.run_logger import RunLogger
from moetrain.loggers.summary import closing_lines, summary_rows, write_summary
from moetrain.loggers.tensorboard import TensorBoard, cut_run_files, event_file_sizes
from moetrain.loggers.terminal import Terminal
from moetrain.metrics import table
from moetrain.metrics.cell import PROBE
from moetrain.metrics.latest import as_metric
from tests.trainer.reading import events, scalars


def test_points_and_descriptions_are_written(tmp_path):
    board = TensorBoard(tmp_path)
    board.scalar("loss/train", 2.5, 1)
    board.scalar("stream/d_path/math", 30.0, 1)
    board.scalar("loss/train", 1.5, 2)
    board.flush()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert scalars(tmp_path) == {"loss/train": [(1, 2.5), (2, 1.5)], "stream/d_path/math": [(1, 30.0)]}
    for tag in ("loss/train", "stream/d_path/math"):
        assert events.SummaryMetadata(tag).summary_description == table.describe(tag)


def laid_out(run):
    """The newest layout of custom scalars of a run, as TensorBoard's plugin reads it: charts by page and title."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.custom_scalar import layout_pb2

    events = EventAccumulator(str(run))
    events.Reload()
    if "custom_scalars__config__" not in events.Tags()["tensors"]:
        return {}
    newest = events.Tensors("custom_scalars__config__")[-1]
    pages = layout_pb2.Layout.FromString(newest.tensor_proto.string_val[0]).category
    return {page.title: {chart.title: chart for chart in page.chart} for page in pages}


def test_every_chart_of_the_monitor_page_shows_known_tags(tmp_path):
    board = TensorBoard(tmp_path)
    board.lay_out(["math", "code"])
    for metric in table.METRICS:
        for tag in {metric.tag_on(cell) for cell in metric.cells if metric.tag and cell != PROBE}:
            board.scalar(f"{tag}/math" if metric.per_domain else tag, 1.0, 1)
    board.flush()
    verdict, charts = laid_out(tmp_path).values()
    assert len(verdict) == 2  # math has points
    assert len(charts) == 21
    patterns = [pattern for chart in (verdict | charts).values() for pattern in chart.multiline.tag]
    assert {"^pathway/consistency/math$", "^memorized/fraction/code$"} <= set(patterns)
    for pattern in patterns:
        tag = pattern.removeprefix("^").removesuffix("$").replace("\\", "")
        assert re.search(pattern, tag)
        assert not re.search(pattern, tag + "/worst")
        assert table.describe(tag)


def test_the_verdict_comes_first_a_chart_per_domain_and_phases_are_not_smoothed(tmp_path):
    board = TensorBoard(tmp_path)
    board.lay_out(["math", "code"])
    board.scalar("loss/train/math", 1.0, 1)
    board.flush()
    assert {page: list(charts) for page, charts in laid_out(tmp_path).items()} == {
        "Grokking monitor": ["training loss"]
    }
    for tag in ("memorized/share/math", "phase/math", "phase/code"):
        board.scalar(tag, 1.0, 2)
    board.flush()
    pages = laid_out(tmp_path)
    assert list(pages) == ["Verdict", "Grokking monitor"]
    phases = {
        title[:5].rstrip(":"): chart for title, chart in pages["Verdict"].items() if ": phase: 0 undecided" in title
    }
    assert list(phases) == ["math", "code"]
    for domain, chart in phases.items():  # TensorBoard smooths no chart with a margin
        assert [(each.value, each.lower, each.upper) for each in chart.margin.series] == [(f"phase/{domain}",) * 3]
    (share,) = (chart for title, chart in pages["Verdict"].items() if title.startswith("math: memorized share"))
    assert list(share.multiline.tag) == ["^memorized/share/math$"]


def test_a_chart_is_on_the_monitor_page_from_its_first_point_on_and_after_a_resume(tmp_path):
    board = TensorBoard(tmp_path)
    board.lay_out(["math"])
    board.flush()
    assert laid_out(tmp_path) == {}  # a page without charts
    board.scalar("memorized/claim_ratio/math", 1.0, 1)
    board.flush()
    assert list(laid_out(tmp_path)) == ["Grokking monitor"]
    resumed = TensorBoard(tmp_path, purge_step=2)
    resumed.lay_out(["math"])
    resumed.flush()
    resumed.scalar("pathway/spread/math", 0.5, 2)
    resumed.flush()
    (charts,) = laid_out(tmp_path).values()
    assert [title.partition(" (")[0] for title in charts] == ["claim ratio", "spread of routing"]


def test_the_phases_are_drawn_as_stretches_over_the_whole_run():
    phases = {"math": [Phase.UNDECIDED, Phase.LEARNING, Phase.MEMORIZING], "code_" * 9: [Phase.SETTLED] * 3}
    picture = phase_image([0, 50, 100], phases, last_step=200)
    height, width, _ = picture.shape
    assert picture.dtype == np.uint8
    colors = [tuple(bytes.fromhex(code)) for code in ("5b9bd5", "e0913a", "14745a")]
    found = [np.argwhere((picture[: height // 2] == color).all(-1)) for color in colors]
    learning, memorizing, settled = (each[:, 1] for each in found)
    assert learning.min() < learning.max() <= memorizing.min() < memorizing.max() < 0.75 * width
    assert settled.min() == pytest.approx(learning.min(), abs=1)
    assert settled.max() == pytest.approx(memorizing.max(), abs=1)
    assert found[2][:, 0].min() > found[0][:, 0].max()  # a row a domain


def test_an_unknown_tag_has_no_description():
    with pytest.raises(ValueError, match="no description of 'nothing/known'"):
        table.describe("nothing/known")


def test_files_are_cut_to_their_sizes_at_a_checkpoint(tmp_path):
    events = Events(tmp_path)
    events.write("checkpoint", 1)
    events.flush()
    board = TensorBoard(tmp_path)
    board.scalar("loss/train", 1.0, 1)
    board.flush()
    sizes = event_file_sizes(tmp_path) | {"events.jsonl": events.size}
    board.scalar("loss/train", 1.0, 2)
    board.flush()
    events.write("checkpoint", 2)
    events.flush()
    later = TensorBoard(tmp_path)
    later.scalar("loss/train", 9.0, 3)
    later.flush()
    cut_run_files(tmp_path, sizes)
    assert scalars(tmp_path) == {"loss/train": [(1, 1.0)]}
    assert [json.loads(line)["step"] for line in events.path.read_text().splitlines()] == [1]
    with pytest.raises(OSError, match=r"events\.jsonl: shorter than at the checkpoint"):
        cut_run_files(tmp_path, sizes | {"events.jsonl": 10**6})


def test_an_event_with_nan_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        Events(tmp_path).write("guard", 1, value=math.nan)
    assert Events(tmp_path).size == 0


def test_metrics_in_the_summary_are_null_where_unknown(tmp_path):
    known = as_metric(Estimate(1.0, 0.5, 1.5, 64, 2016))
    assert known == {"value": 1.0, "low": 0.5, "high": 1.5, "n": 64}
    assert as_metric(Estimate(math.nan, math.nan, math.nan, 1, 0))["value"] is None
    domains = {"math": {"metrics": {"d_path": known, "loss": as_metric(2.0, 10)}}}
    write_summary(tmp_path, {"domains": domains})
    assert json.loads((tmp_path / "summary.json").read_text())["domains"] == domains
    columns = {"loss": "loss", "d_path": "D_path", "cosine": "cosine"}
    assert summary_rows(domains, columns) == [["math", "2.000", "1.000 ±0.500", "-"]]
    small = as_metric(Estimate(4.12e-4, 4.0e-4, 4.24e-4, 64, 0))  # a spread
    assert summary_rows({"math": {"metrics": {"loss": small}}}, {"loss": "loss"}) == [["math", "0.000412 ±0.000012"]]
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_summary(tmp_path / "other", {"x": math.inf})
    assert not (tmp_path / "other" / "summary.json").exists()


def test_the_last_lines_are_the_summary_in_words():
    found = {"phase": "settled", "why": "of what was learned, 3% is memory"}
    summary = {"domains": {"math": found, "code": {"metrics": {}}}, "tokens": 1200, "text_tokens": 1000}
    summary |= {"measured_tokens": 1200, "tokens_per_second": 31.4, "monitor_share": 0.1234, "peak_memory_bytes": 2**29}
    first, last = closing_lines(summary, Path("runs/x"))
    assert first == "math is settled: of what was learned, 3% is memory"
    assert last == (
        "1,000 tokens of text and 200 begin and end tokens; 31 of both per second of training, 12.3% of the time spent "
        "on monitoring; peak memory 0.50 GiB; run folder: runs/x"
    )
    resumed = closing_lines(summary | {"measured_tokens": 300}, Path("runs/x"))[-1]
    assert "12.3% of the time spent on monitoring since it was resumed, 300 tokens ago; peak" in resumed
    watched = closing_lines(summary | {"text_tokens": 1200}, Path("runs/x"))[-1]
    assert watched.startswith("1,200 tokens; 31 per second of training, 12.3% of the time spent on monitoring; peak")


@pytest.mark.parametrize("failing", ["begin", "write"])
def test_a_failed_checkpoint_names_the_one_that_is_left(tmp_path, monkeypatch, failing):
    shown = terminal()
    logger = RunLogger(tmp_path, ["math"], None, shown)

    def full(*_):
        raise OSError("disk full")

    def fail(step):
        with monkeypatch.context() as patched:
            if failing == "begin":
                patched.setattr("moetrain.loggers.run_logger.event_file_sizes", full)
            return logger.checkpoint(step, full)

    def save(sizes):
        save_checkpoint(tmp_path, 10, {"model": {"w": torch.ones(1)}}, {}, sizes)

    assert not fail(5)
    assert logger.checkpoint(10, save)
    assert not fail(15)
    logger.close()
    said = shown.console.export_text().splitlines()
    assert said == [
        "step 5: no checkpoint was written (disk full); there is none to resume from yet",
        "step 15: no checkpoint was written (disk full); step_00000010 remains",
    ]
    assert [event["step"] for event in events(tmp_path) if event["type"] == "checkpoint"] == [10]


def terminal(width=120, is_terminal=False):
    shown = Terminal()
    shown.console = Console(record=True, width=width, force_terminal=is_terminal, highlight=False, file=io.StringIO())
    shown.live = is_terminal
    return shown


def test_plain_lines_without_an_interactive_terminal():
    shown = terminal()
    shown.preparing("tokenizing math", 10, None)
    shown.preparing("tokenizing math", 20, None)
    shown.start_training(0, 10)
    shown.training(10, 2.5, 1234.0, {"math": {"loss": 2.25}})
    shown.end_training()
    text = shown.console.export_text()
    assert text.count("tokenizing math") == 1
    assert "step 10/10  loss 2.500  1,234 tokens/s  (math 2.250)" in text
    shown.preparing("tokenizing math", 10, None)
    assert shown.console.export_text().count("tokenizing math") == 1  # a preparation of its own


def test_a_preparation_is_one_line_though_others_begin_inside_of_it(monkeypatch):
    shown, now = terminal(), iter([0.0, 5.0, 40.0, 40.0, 41.0])
    monkeypatch.setattr("moetrain.loggers.terminal.time.monotonic", lambda: next(now))
    shown.preparing("drawing figures", 0, 4)
    shown.preparing("reading routing", 0, 2)
    shown.preparing("drawing figures", 2, 4)
    assert shown.console.export_text().splitlines() == [
        "drawing figures",
        "reading routing",
        "drawing figures: 50%, about 40 s left",
    ]


def test_a_live_display_with_a_table_by_domain():
    shown = terminal(is_terminal=True)
    shown.preparing("tokenizing [math]", 10, None)
    shown.preparing("tokenizing code", 5, 10)
    shown.note("a [note] in brackets")
    shown.start_training(2, 10)
    shown.values("math", {"bits/byte": 1.5, "spread, panel": 0.000412})
    shown.training(10, 2.5, 1234.0, {"math": {"loss": 2.25}, "code": {"loss": 3.0}})
    shown.end_training()
    text = shown.console.export_text()
    for part in ("a [note] in brackets", "10/10", "loss 2.500", "bits/byte", "1.500", "0.000412", "2.250", "-"):
        assert part in text


def test_a_table_in_a_log_is_not_cut_off():
    shown = terminal(width=40)
    names = [f"builtin_random_answers_trained_{number}" for number in range(2)]
    shown.table("probes", ["probe", "items that were asked"], [[name, "1,000"] for name in names])
    lines = shown.console.export_text().splitlines()
    assert len(lines) == 4
    assert all(name in line for name, line in zip(names, lines[2:], strict=True))
    assert "items that were asked" in lines[1]


def test_other_ranks_print_nothing(capsys):
    quiet = Terminal(speaks=False)
    quiet.note("hello")
    quiet.preparing("x", 1, None)
    quiet.start_training(0, 1)
    quiet.training(1, 1.0, 1.0, {})
    quiet.end_training()
    assert capsys.readouterr().out == ""


def test_a_heat_map_goes_from_dark_to_bright_with_nan_in_grey():
    pixels = heat_map(np.array([[0.0, 0.5], [1.0, np.nan]]), cell=2)
    assert pixels.shape == (4, 4, 3)
    assert pixels.dtype == np.uint8
    light = pixels.astype(int) @ [299, 587, 114]
    assert light[0, 0] < light[0, 3] < light[3, 0]
    assert pixels[3, 3].tolist() == [230, 230, 230]
    assert (heat_map(np.full((1, 3), np.nan)) == 230).all()
    assert (heat_map(np.ones((1, 2))) == heat_map(np.ones((1, 2)))[0, 0]).all()
    assert np.array_equal(heat_map(np.array([[5.0]]), 0, 2), heat_map(np.array([[2.0]]), 0, 2))
    with pytest.raises(ValueError, match="shows a matrix, got shape"):
        heat_map(np.zeros(3))


def test_images_are_written(tmp_path):
    board = TensorBoard(tmp_path)
    board.image("experts/load", np.zeros((4, 5, 3), np.uint8), 1)
    board.flush()
    assert sum(event_file_sizes(tmp_path).values()) > 100
