import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml

from moetrain import grokking
from moetrain.config import load_settings
from moetrain.grokking.paper import CORRELATIONS
from moetrain.report import (
    charts,
    derived,
    evidence,
    findings,
    learning_figures,
    open_run,
    page,
    records,
    report,
    routing_figures,
)
from moetrain.report.charts import Grid, Line, Link, Points
from moetrain.report.limitations import limitations
from moetrain.report.page import Number
from moetrain.report.trend import trend
from moetrain.train import train
from tests.conftest import small_run
from tests.loggers.test_loggers import terminal
from tests.report.runs import left_unfinished
from tests.tools.test_prepare_data import load_tool

VOID = {"meta", "br", "link", "img", "input", "hr", "base"}
HARM = '<script>alert("1")</script><b>bold</b>'


class Page(HTMLParser):
    """Elements, texts and addresses of a page, which has to close what it opens."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.addresses, self.texts = [], [], [], [], []
        self.attributes = set()
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            self.attributes.add(name)
            if name == "id":
                self.ids.append(value)
            if name in ("href", "src", "xlink:href"):
                self.addresses.append(value)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open[-1:] != ["style"]:
            self.texts.append(text)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


@pytest.fixture(scope="module")
def written(finished_run):
    """The page that the run wrote at its end."""
    return (finished_run / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def run(finished_run):
    return open_run.open_run(finished_run)


def test_a_run_ends_with_its_report_and_the_tool_writes_the_same(finished_run, written, tmp_path, capsys):
    tool = load_tool("report")
    assert tool.main([str(finished_run), "--output", str(tmp_path / "again.html")]) == 0
    assert "again.html: 0." in capsys.readouterr().out
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == written


def test_the_page_is_self_contained_and_has_no_scripts(written):
    found = Page(written)
    assert not {"script", "link", "img", "iframe", "object", "image"} & set(found.tags)
    assert not any(name.startswith("on") for name in found.attributes)
    outside = [address for address in found.addresses if not address.startswith("#")]
    assert outside == ["https://arxiv.org/abs/2506.21551"]
    assert "default-src 'none'" in written
    assert "url(" not in re.sub(r"url\(#\w+\)", "", written)


def test_every_link_target_exists_once(written):
    found = Page(written)
    assert len(found.ids) == len(set(found.ids))
    pointed = {address[1:] for address in found.addresses if address.startswith("#")}
    pointed |= set(re.findall(r"url\(#(\w+)\)", written))
    assert pointed <= set(found.ids)


def test_the_verdicts_show_the_numbers_of_the_frames(run, written):
    text = Page(written).text
    head = text[text.index("Verdict per domain") : text.rindex("Before you quote this")]
    rows = run.summary.set_index(["domain", "task", "metric"])
    for domain in run.domains:
        for metric in ("loss/panel_seen", "loss/panel_heldout", "memorized/gap", "memorized/gap_heldout"):
            value, low, high, n = rows.loc[(domain, "", metric)]
            shown = " ".join(page.within(Number(value, low, high, n)))
            assert shown in head
            assert abs(float(shown.split()[0].replace("−", "-")) - value) < 0.006
    for domain, task in (("sums", "adding"), ("stories", "owners")):
        right = run.probes[(run.probes["step"] == 12) & (run.probes["task"] == task)]["correct"]
        assert page.within(Number(right.mean(), *run.accuracy.iloc[-1][["low", "high"]]))[0] in head
        assert f"n = {len(right)}" in head
        assert domain in head


def test_the_page_shows_the_data_and_the_cost(run, written):
    text = Page(written).text
    share = run.outcome["seconds"]["train"] / sum(run.outcome["seconds"].values())
    assert f"training {100 * share:.1f}%" in text
    assert f"{run.outcome['data']['sums']['met_tokens']:,}" in text
    assert "model.num_experts 8 16" in text
    assert "data.domains.sums.path sums.jsonl null" in text
    assert "run.output_dir" not in text


def test_warnings_report_small_numbers(run, written):
    text = Page(written).text
    met = run.panel.query("cell == 'seen' and step == 12 and 0 < first_step").groupby("domain", observed=True).size()
    for said in (
        f"Fewer than 64 documents trained on in the panel: stories ({met['stories']}), sums ({met['sums']}).",
        "Probes of fewer than 100 items are imprecise: adding (60), owners (15).",
        "Only 5 readings of the probes: with fewer than 8 nothing is correlated.",
    ):
        assert said in text
    assert "Finished." in text


def altered(run, copy, change):
    shutil.copytree(run, copy)
    change(copy)
    return open_run.open_run(copy)


def with_curves(run, **tags):
    """The run with its curves of some tags replaced."""
    kept = run.scalars[~run.scalars["tag"].isin(tags)]
    rows = [
        {"tag": tag, "step": step, "tokens": 100.0 * step, "value": value}
        for tag, values in tags.items()
        for step, value in enumerate(values, start=4)
    ]
    run.scalars = open_run.need("pandas", "a test").concat([kept, records.frame(rows)], ignore_index=True)
    return run


@pytest.mark.parametrize(
    ("seen", "heldout", "verdict"),
    [
        ((0.5, 0.45, 0.3), (0.6, 0.5, 0.45), "same change"),
        ((0.5, 0.45, 0.3), (0.6, 0.6, 0.55), "different change"),
        ((0.5, 0.45, 0.3), (0.6, 0.7, 0.8), "different change"),
        ((0.5, 0.5, 0.5), (0.6, 0.7, 0.8), "no clear change"),
    ],
)
def test_controls_detect_a_change_that_held_out_samples_share(finished_run, seen, heldout, verdict):
    run = open_run.open_run(finished_run)
    run.summary.loc[run.summary["metric"] == "pathway/d_path_norm", ["low", "high"]] = [0.29, 0.31]
    tags = {"pathway/d_path_norm/sums": seen, "pathway_heldout/d_path_norm/sums": heldout}
    found = [
        c for c in findings.controls(with_curves(run, **tags)) if (c.domain, "Pathway" in c.title) == ("sums", True)
    ]
    assert [(each.verdict, each.seen, each.heldout) for each in found] == [(verdict, seen[::2], heldout[::2])]
    shown = [text for text in limitations(run) if "pathway distance" in text and "sums" in text]
    assert bool(shown) == (verdict == "same change")


@pytest.mark.parametrize(
    ("phase", "accuracy", "said", "margin"),
    [
        (2, 0.9, "memorizing by its losses, but accuracy on its probes, 0.90, is above chance, 0.25", 0.1),
        (2, 0.254, "accuracy on its probes, 0.254, is above chance, 0.250, by its interval", 0.002),
        (3, 0.25, "generalizing by its losses, but accuracy on its probes, 0.25, is not above chance", 0.1),
        (3, 0.9, "", 0.1),
    ],
)
def test_a_verdict_that_the_probes_contradict_is_reported(finished_run, phase, accuracy, said, margin):
    run = with_curves(open_run.open_run(finished_run), **{"phase/sums": [phase]})
    row = run.accuracy["domain"] == "sums"
    run.accuracy.loc[row, ["accuracy", "low", "high"]] = [accuracy, accuracy - margin, accuracy + margin]
    shown = [
        text for text in limitations(run) if text.startswith("Verdict and probes point to different things in sums")
    ]
    assert len(shown) == bool(said)
    assert all(said in text for text in shown)


def test_a_correlation_from_a_trend_alone_is_reported(finished_run):
    run = open_run.open_run(finished_run)
    steps = np.arange(1, 13)
    columns = ["domain", "predictor", "series", "method", "value", "low", "high", "p", "n", "note"]
    rng = np.random.default_rng(1)
    noise, other = rng.normal(size=(2, 12)) * 0.02
    rising = np.linspace(0.3, 0.9, 12)
    tables = {
        "d_path": grokking.correlate(-rising + noise, rising + other, 1000 * steps),
        "cosine": grokking.correlate(rising + other, rising + other, 1000 * steps),
    }
    rows = [
        ("sums", predictor, *kind, each.value, each.low, each.high, each.p, each.n, each.note)
        for predictor, table in tables.items()
        for kind, each in table.items()
    ]
    run.correlations = records.frame(rows, columns)
    (shown,) = [text for text in limitations(run) if "in the raw series only" in text]
    assert shown.startswith("In sums accuracy correlates strongly with pathway distance in the raw series only")
    table = report.correlation_table(run)
    assert list(table) == ["d_path", "cosine"]
    assert table["cosine"]["sums"]["raw", "spearman"]["number"].value == pytest.approx(1)
    text = Page(report.report(run)).text
    raw = tables["d_path"]["raw", "spearman"]
    assert f"Pathway distance, edits {page.two(raw.value)} [{page.two(raw.low)}, {page.two(raw.high)}]" in text
    theirs = CORRELATIONS["d_path"]["code"]
    assert f"{page.two(theirs['raw spearman'])} r {page.two(theirs['raw pearson'])}" in text


def test_names_and_texts_from_the_run_are_escaped(finished_run, written, tmp_path):
    def harm(copy):
        tree = yaml.safe_load((copy / "config.yaml").read_text())
        tree["data"]["domains"][HARM] = {"path": HARM}
        (copy / "config.yaml").write_text(yaml.safe_dump(tree))
        summary = json.loads((copy / "summary.json").read_text())
        task = {**summary["probes"]["adding"], "domain": HARM}
        summary["probes"][HARM] = task
        summary["domains"][HARM] = {**summary["domains"]["sums"], "phase": HARM}
        summary["domains"][HARM]["correlations"] = {"note": HARM}
        summary["data"][HARM] = summary["data"]["sums"]
        (copy / "summary.json").write_text(json.dumps(summary))
        evidence = {"name": HARM, "role": HARM, "unit": "level", "value": 1.0, "low": None, "high": None, "vote": 0}
        change = {"type": "phase", "step": 4, "domain": HARM, "before": HARM, "after": HARM, "why": HARM}
        change |= {"sentence": HARM, "evidence": [evidence]}
        problem = {"type": "guard", "step": 3, "problem": HARM}
        with open(copy / "events.jsonl", "a") as file:
            file.write(json.dumps(change) + "\n" + json.dumps(problem) + "\n")

    run = altered(finished_run, tmp_path / HARM.replace("/", "_"), harm)
    text = report.report(run)
    assert HARM in run.domains
    assert "script" not in Page(text).tags
    assert Page(text).tags.count("b") == Page(written).tags.count("b") + 1
    assert "<script" not in text
    assert "<b>bold" not in text
    assert text.count("&lt;b&gt;bold") > 10


def test_an_unfinished_run_has_a_report(finished_run, tmp_path, capsys):
    copy = left_unfinished(finished_run, tmp_path / "growing")
    assert load_tool("report").main([str(copy)]) == 0
    text = Page((copy / "report.html").read_text(encoding="utf-8")).text
    assert "Not finished: as of step 12." in text
    assert "The run is not finished: these are its newest numbers." in text
    assert "Groups are paired at the end of a run." in text
    assert "recording and streaming metrics" in text


def test_the_times_of_a_resumed_run_are_since_it_was_resumed(finished_run, tmp_path):
    def resumed(copy):
        with open(copy / "events.jsonl", "a") as file:
            file.write(json.dumps({"type": "resume", "step": 5}) + "\n")

    run = altered(finished_run, tmp_path / "resumed", resumed)
    text = Page(report.report(run)).text
    assert f"{run.outcome['monitor_share']:.1%} of the time since step 5, where it was resumed, spent on" in text
    assert "Shares of the time since step 5, where it was resumed. Panel, probes," in text


def test_a_run_without_router_panel_and_probes_has_a_report(corpus_folder, tmp_path, tmp_path_factory):
    base = small_run(corpus_folder, tmp_path, tmp_path_factory.getbasetemp())
    few = ["model.experts=dense", "train.max_steps=4", "run.report=true", "probes.builtin=false"]
    assert train(load_settings(None, [*base, *few])) == 0
    text = Page((tmp_path / "runs" / "run" / "report.html").read_text(encoding="utf-8")).text
    for said in (
        "layers without experts",
        "No probes were read",
        "The panel has not been read",
        "Training loss, nats per token",
    ):
        assert said in text


def test_without_matplotlib_a_run_ends_well_and_says_so(finished_run, tmp_path, monkeypatch):
    copy = shutil.copytree(finished_run, tmp_path / "copy")
    (copy / "report.html").unlink()

    def missing(package, what):
        if package == "matplotlib":
            raise open_run.MissingPackageError("the report needs matplotlib: pip install 'moetrain[report]'")
        return open_run.need(package, what)

    monkeypatch.setattr(charts, "need", missing)
    shown = terminal()
    report.report_or_say_why(copy, shown)
    said = shown.console.export_text().strip().splitlines()[-1]
    assert said == "no report: the report needs matplotlib: pip install 'moetrain[report]'"
    assert not (copy / "report.html").exists()


def test_a_report_that_fails_does_not_fail_the_run(finished_run, tmp_path, monkeypatch):
    monkeypatch.setattr(report.limitations, "limitations", lambda run: [][0])
    shown = terminal()
    report.report_or_say_why(shutil.copytree(finished_run, tmp_path / "copy"), shown)
    assert "no report (IndexError: list index out of range): run tools/report.py" in shown.console.export_text()


def test_a_folder_without_a_readable_run_is_one_error_line(finished_run, tmp_path, capsys):
    tool = load_tool("report")
    assert tool.main([str(tmp_path)]) == 2
    assert "no config.yaml there" in " ".join(capsys.readouterr().err.split())
    copy = shutil.copytree(finished_run, tmp_path / "copy")
    (copy / "routing" / "panel_00000012.parquet").write_bytes(b"PAR1")
    assert tool.main([str(copy)]) == 2
    assert "panel_00000012.parquet: truncated or corrupt" in " ".join(capsys.readouterr().err.split())


def test_charts_use_css_variables_and_have_labels():
    x = np.array([0.0, 1e6, 2e6])
    whole = Line(x, x / 1e6, "d0", "dashed", x * 0, x, (1.9, 2.1))
    drawn = [
        charts.lines([whole, Line(x[:1], x[:1], "ink")], "<a> & b", "tokens", (0, 3), y_title="upwards"),
        charts.lines([Line(x + 1, x + 1, "d7")], "log", "steps", log=True, y_title="upwards"),
        charts.scatter([Points(x, x, "d1", (x, x, x, x))], "cloud", (0, 1), x_title="loss", y_title="upwards"),
        charts.links([Link(0.0, 1.0, 3, 4, 0.1, "d2")], "pairs", "tokens"),
        charts.heat(Grid(x, np.array([[0.1, np.nan, 0.3]]), 0.0, 1.0), "map", "tokens", y_title="upwards"),
    ]
    for svg in drawn:
        Page(svg)
        assert svg.startswith('<svg viewBox="0 0 ')
        assert "#0a" not in svg
        assert "font-family" not in svg
        assert "mathdefault" not in svg
    assert ["upwards" in svg for svg in drawn] == [True, True, True, False, True]
    assert 'aria-label="&lt;a&gt; &amp; b"' in drawn[0]
    assert "var(--d0)" in drawn[0]
    assert "2M" in drawn[0]
    assert "var(--d2)" in drawn[3]
    assert len(charts.map_colors(5)) == 5


def test_a_trend_far_wider_than_the_points_leaves_them_the_chart():
    x = np.linspace(0, 1, 10)
    wide = (x, x, x - 1000, x + 1000)
    titles = {"x_title": "x", "y_title": "y"}
    alone, with_trend = (charts.scatter([Points(x, x, "d1", each)], "cloud", **titles) for each in (None, wide))

    def heights(svg):  # of the points, in the picture
        return [float(y) for y in re.findall(r'<use xlink:href="#\w+" x="[\d.]+" y="([\d.]+)"', svg)]

    assert len(heights(alone)) >= 10
    assert heights(with_trend)[-10:] == heights(alone)[-10:]


def test_a_pooled_trend_that_no_domain_has_is_said(finished_run):
    """Within each domain the distance rises as the loss falls; the domain of higher loss has the larger distance."""
    loss = np.linspace(2.0, 1.0, 10)
    tags = {}
    for domain, far in (("sums", 0), ("stories", 5)):
        tags |= {f"loss/panel_seen/{domain}": loss + far, f"pathway/d_path/{domain}": 10 - loss + 4 * far}
    run = with_curves(open_run.open_run(finished_run), **tags)
    said = {figure.title: figure.caption for figure in routing_figures.distance_and_loss(run).figures}
    assert said["All domains"].startswith("Over all domains, a lower loss goes with a smaller distance. Within every")
    assert said["sums"] == said["stories"] == "As the loss falls, the distance rises, by the trend."
    tags = {tag: values if "sums" in tag or "loss" in tag else values[::-1] for tag, values in tags.items()}
    run = with_curves(open_run.open_run(finished_run), **tags)
    said = {figure.title: figure.caption for figure in routing_figures.distance_and_loss(run).figures}
    assert "Within sums it is the other way" in said["All domains"]


def test_the_reason_of_a_run_without_summary_is_that_of_its_newest_reading(run, finished_run, tmp_path):
    growing = open_run.open_run(left_unfinished(finished_run, tmp_path / "growing"))
    for domain in run.domains:
        why = run.outcome["domains"][domain]["why"]
        assert findings.verdict_now(growing, domain).why == findings.verdict_now(run, domain).why == why
    assert [each.why for each in findings.verdicts(growing)] == [each.why for each in findings.verdicts(run)]


def test_evidence_is_in_words_of_its_unit():
    item = {
        "name": "loss_unseen",
        "role": "loss",
        "unit": "share",
        "low": 0.015,
        "high": 0.058,
        "readings": 5,
        "vote": 0,
    }
    shown = evidence.evidence_in_words(item | {"value": 0.0371})
    assert shown == "3.7% [1.5%, 5.8%] of the fall so far"
    assert evidence.evidence_title(item) == "Fall of the loss of samples not trained on"
    assert evidence.evidence_says(item | {"value": 0.0371}) == "does not count as falling"
    whole = item | {"value": 1.56, "low": -2.0, "high": 1.9, "vote": 1}
    assert evidence.evidence_in_words(whole) == "100% [less than −100%, 100%] of the fall so far"
    assert evidence.evidence_says(whole) == "falls"
    unread = item | {"value": None, "low": None, "high": None, "readings": 1}
    assert evidence.evidence_in_words(unread) == "no value: 1 of 3 readings"
    assert evidence.evidence_says(unread) == ""
    share = {
        "name": "share",
        "role": "deciding",
        "unit": "level",
        "value": 0.0301,
        "low": -0.0125,
        "high": 0.0726,
        "vote": 1,
    }
    assert evidence.evidence_in_words(share) == "3% [−1%, 7%]"
    near = share | {"value": 0.0896}
    assert evidence.evidence_in_words(near, [0.09, 0.21]) == "8.96% [−1.25%, 7.26%]"
    slow = item | {"value": 0.0498}
    assert evidence.evidence_in_words(slow, [0.05, 0.0]) == "4.98% [1.5%, 5.8%] of the fall so far"
    assert evidence.evidence_says(share) == "carries over"


@pytest.mark.parametrize(
    ("delays", "said"),
    [
        ((40, 40), "generalization follows memorization by 40 steps"),
        ((-40, -40), "precedes memorization by 40"),
        ((4, 4), "4 steps apart, no more than the resolution of 10 steps"),
    ],
)
def test_a_delay_is_said_with_its_sign_and_resolution(finished_run, delays, said):
    run = open_run.open_run(finished_run)
    rows = [("sums", 4, 8, 0.5, 3, 4, delay, 100.0, 10, 100.0, "") for delay in delays]
    run.delays = records.frame(rows, derived.DELAY_COLUMNS)
    group = learning_figures.pairs(run)
    assert said in group.figures[0].caption
    assert [entry.dash for entry in group.drawn] == ["hollow", "filled", "band"]


def test_small_numbers_are_not_zero():
    assert page.within(Number(3.2e-5, 2.8e-5, 3.6e-5)) == ("3.20e−05", "[2.80e−05, 3.60e−05]")


def test_numbers_are_formatted():
    assert page.within(Number(0.15, 0.0446, 0.367)) == ("0.15", "[0.04, 0.37]")
    assert page.within(Number(1.5, 1.49, 1.51)) == ("1.50", "±0.01")
    assert page.within(Number(0.00391, 0.00361, 0.00421)) == ("0.0039", "±0.0003")
    assert page.within(Number(-0.001, -0.05, 0.048)) == ("0.00", "±0.05")
    assert page.within(Number(1.0, 1.0, 1.0)) == ("1.00", "±0.00")
    assert page.within(Number(128.4, 100.0, 156.8)) == ("128", "±28")
    assert page.within(page.NOTHING) == ("–", "")
    assert [page.plain(value) for value in (1234567.0, 0.12345, -12.345, 0.0, 3e-7, None)] == [
        "1,234,567",
        "0.123",
        "−12.3",
        "0",
        "3.00e−07",
        "–",
    ]
    assert [charts.short(value) for value in (0, 950, 1500, 2_127_512, 4.1e10, float("nan"))] == [
        "0",
        "950",
        "1.5k",
        "2.13M",
        "41B",
        "-",
    ]
    assert [page.in_yaml(value) for value in (1, True, None, 0.5, [1, "a"], {})] == [
        "1",
        "true",
        "null",
        "0.5",
        "[1, a]",
        "{}",
    ]


def test_consecutive_equal_phases_are_one_stretch(finished_run):
    run = with_curves(open_run.open_run(finished_run), **{"phase/sums": [0, 1, 1, 4]})
    found = routing_figures.phase_stretches(run, "steps")["sums"]
    assert [(each.phase.name, each.start, each.end) for each in found] == [("LEARNING", 4, 6), ("SETTLED", 6, 7)]


def test_a_trend_is_the_least_squares_line_within_its_interval():
    rng = np.random.default_rng(0)
    x = np.linspace(0, 1, 30)
    y = 2 * x + 1 + rng.normal(size=30) * 0.1
    y[3] = np.nan
    at, line, low, high = trend(x, y)
    slope, base = np.polyfit(x[np.isfinite(y)], y[np.isfinite(y)], 1)
    assert np.allclose(line, slope * at + base)
    assert (low <= line).all()
    assert (line <= high).all()
    assert (high - low).max() < 0.3
    assert trend(x[:7], y[:7]) is None
    assert trend(np.ones(10), np.arange(10.0)) is None


@pytest.mark.browser
def test_a_browser_shows_the_page_at_two_widths(written, tmp_path):
    import subprocess

    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs chromium")
    (tmp_path / "page.html").write_text(written, encoding="utf-8")
    for width in (390, 1200):
        picture = tmp_path / f"{width}.png"
        flags = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--enable-logging=stderr",
            f"--window-size={width},2000",
        ]
        command = [chromium, *flags, f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={picture}"]
        shown = subprocess.run(
            [*command, f"file://{tmp_path / 'page.html'}"], capture_output=True, text=True, timeout=100
        )
        assert "CONSOLE" not in shown.stderr
        assert picture.stat().st_size > 50_000
