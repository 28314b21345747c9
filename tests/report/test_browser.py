"""What a run shows, opened as a reader opens it: TensorBoard and the two pages in a headless Chromium."""

import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager

import pytest

from moetrain.report.compare import compare, comparison_page
from moetrain.report.open_run import open_run
from tests.report.runs import left_unfinished

pytestmark = pytest.mark.browser

DESKTOP, PHONE = (1300, 900), (390, 844)
PATIENCE = 60_000  # milliseconds: TensorBoard loads a run's curves one after another


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs pip install 'moetrain[browser]'")
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip(f"none of {', '.join(names)} is installed")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


@contextmanager
def reading(browser, address, size, **more):
    """The page at an address; fails if it logs an error, throws, or asks another machine for something."""
    width, height = size
    page = browser.new_page(viewport={"width": width, "height": height}, **more)
    wrong, asked = [], []
    page.on("console", lambda said: wrong.append(f"{said.text} ({said.location})") if said.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    yield page
    assert wrong == []
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:", "http://127.0.0.1:"))] == []
    page.close()


@pytest.fixture(scope="module")
def tensorboard(finished_run):
    """The address of a TensorBoard that shows the run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "tensorboard.main", "--host=127.0.0.1", "--load_fast=false"]
    server = subprocess.Popen([*command, f"--port={port}", f"--logdir={finished_run}"], stderr=subprocess.DEVNULL)
    for _ in range(120):
        try:
            urllib.request.urlopen(place, timeout=5).close()
            break
        except OSError:
            assert server.poll() is None, "TensorBoard ended at its start"
            time.sleep(0.5)
    yield place
    server.terminate()
    server.wait(timeout=30)


def test_the_monitor_page_has_its_charts(browser, tensorboard):
    with reading(browser, f"{tensorboard}/#custom_scalars", (1500, 2600)) as page:
        page.get_by_text("Grokking monitor").first.wait_for(timeout=PATIENCE)
        for title in ("training loss", "pathway distance, normalised", "control: load of the experts"):
            page.get_by_text(title, exact=True).first.wait_for(timeout=PATIENCE)
        charts = page.locator("tf-custom-scalar-multi-line-chart-card")
        assert charts.count() >= 16
        page.wait_for_function(_DRAWN, arg=16, timeout=PATIENCE)


def test_it_opens_on_the_verdicts(browser, tensorboard):
    with reading(browser, tensorboard, (1500, 1400)) as page:
        page.get_by_text("Verdict/domains").wait_for(timeout=PATIENCE)
        groups = page.locator("metrics-card-groups .group-title, metrics-card-group-toolbar .group-title-wrapper")
        assert groups.first.inner_text().startswith("Verdict")
        picture = page.locator("image-card img").first
        picture.wait_for(timeout=PATIENCE)
        assert picture.evaluate("each => each.naturalWidth") == 300
        assert picture.bounding_box()["width"] >= 300  # scaled down, letters would lose their strokes


def test_phases_have_a_chart_per_domain_that_nothing_smooths(browser, tensorboard):
    with reading(browser, f"{tensorboard}/#custom_scalars", (1500, 2600)) as page:
        page.get_by_text("Verdict").first.wait_for(timeout=PATIENCE)
        charts = page.locator("tf-custom-scalar-margin-chart-card")
        charts.nth(1).wait_for(timeout=PATIENCE)
        titles = [each.evaluate("card => card.title") for each in charts.all()]
        assert sorted(title.partition(": phase: 0 undecided")[0] for title in titles) == ["stories", "sums"]


# Charts lie in shadow roots, which locators reach and a page's own queries do not.
_DRAWN = """wanted => {
    const below = root => [...root.querySelectorAll("*")].flatMap(each =>
        [each, ...(each.shadowRoot ? below(each.shadowRoot) : [])]);
    const cards = below(document).filter(each => each.localName === "tf-custom-scalar-multi-line-chart-card");
    const curves = card => below(card.shadowRoot ?? card).filter(each => each.localName === "path" &&
        (each.getAttribute("d") || "").length > 20);
    return cards.filter(card => curves(card).length).length >= wanted;
}"""


def sideways(page):
    """By how many pixels the page is wider than the screen: what a reader has to scroll sideways."""
    return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_report_shows_every_figure(browser, finished_run, size, scheme):
    with reading(browser, (finished_run / "report.html").as_uri(), size, color_scheme=scheme) as page:
        for number in (1, 2, 4, 5, 6, 7):
            heading = page.get_by_role("heading", name=f"as Figure {number} of the paper")
            assert heading.is_visible()
        drawn = page.locator("figure svg")
        assert drawn.count() > 20
        assert all(box["width"] > 200 and box["height"] > 100 for box in map(_box, drawn.all()))
        assert page.get_by_role("heading", name=re.compile("Controls")).is_visible()
        assert sideways(page) <= 0


def _box(element):
    return element.bounding_box()


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_the_comparison_overlays_curves(browser, finished_run, tmp_path, size):
    other = open_run(left_unfinished(finished_run, tmp_path / "other"))
    place = tmp_path / "compared.html"
    place.write_text(comparison_page(compare([open_run(finished_run), other])), encoding="utf-8")
    with reading(browser, place.as_uri(), size) as page:
        assert page.get_by_role("heading", name="What differs in their settings").is_visible()
        assert page.locator("figure svg").count() > 20
        assert page.locator("table td").count() > 50
        assert sideways(page) <= 0


def test_the_report_prints_on_white_paper(browser, finished_run):
    with reading(browser, (finished_run / "report.html").as_uri(), DESKTOP, color_scheme="dark") as page:
        page.emulate_media(media="print")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        pages = len(re.findall(rb"/Type\s*/Page\b", page.pdf(format="A4")))
        assert 5 <= pages <= 20
