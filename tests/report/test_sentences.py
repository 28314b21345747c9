"""Every sentence that a run says of itself is true: page, terminal, events and summary, compared with its files.

A sentence has to match one pattern below, whose check compares each of its claims with `Recorded`; one that matches
none fails, so a new sentence needs a check of its own.
"""

import contextlib
import io
import json
import math
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml
from scipy.stats import binomtest

from moetrain import grokking
from moetrain.config import load_settings
from moetrain.distributed.signals import STOPPED_BY_SIGNAL
from moetrain.report.open_run import open_run
from moetrain.report.report import report
from moetrain.train import train
from moetrain.training.step import update
from tests.conftest import MARKED_ANSWERS, small_run
from tests.report.recorded import Recorded
from tests.report.runs import left_unfinished
from tests.trainer.test_resume import stop_after

PIECES = "data.domains.stories.path=long.jsonl"  # documents of many samples
ONE_DOMAIN = ("data.domains.sums=null", "probes.builtin=false")
KINDS = {
    "few samples, no probes": ("panel.samples=6", "probes.builtin=false"),
    "plain text, one domain": (
        *ONE_DOMAIN,
        PIECES,
        "train.max_steps=40",
        "panel.readings=21",
        "optim.min_learning_rate_ratio=0.001",  # losses come to rest: an eps exists
        "panel.samples=24",
    ),
    "one reading, probes of no domain": (
        "probes.tasks=[other.jsonl]",
        "probes.readings=2",
        "panel.readings=2",
        "train.max_steps=1",
        "train.batch_rows=40",
    ),
    "no panel": ("model.experts=dense", "train.max_steps=4", "probes.builtin=false"),
    "marked answers": ("data.domains.sums=null", *MARKED_ANSWERS, "probes.readings=4", "panel.readings=6"),
    "a repeated domain": (
        *ONE_DOMAIN,
        "data.domains.stories.repeats=6",
        "panel.repeat_every=1",
        "data.heldout_share=0.3",
    ),
    "repeats that stop": (
        "probes.builtin=false",
        "data.domains.sums.repeats=auto",
        "data.domains.sums.limit=40",
        "data.least_worth=0.9",
        "panel.repeat_every=1",
        "data.heldout_share=0.3",
        "train.max_steps=40",
    ),
    "many domains, most of the text unused": (
        *(
            f"data.domains.d{number}.{key}"
            for number in range(6)
            for key in (
                "path=stories.jsonl",
                f"filter=len(text) > {200 * number} and len(text) <= {200 * number + 200}",
            )
        ),
        *ONE_DOMAIN,
        "data.domains.stories=null",
    ),
    "skipped updates": ("guard.skipped=100", *ONE_DOMAIN, "train.log_every=1"),
    "resumed": ("probes.tasks=[quiz.jsonl]", "probes.readings=3"),
    "stopped by a signal": (*ONE_DOMAIN, PIECES),
    "dense, in blocks": ("model.experts=dense", "model.dense_experts=8", "probes.builtin=false"),
}
STOPPED_AFTER = {"resumed": 7, "stopped by a signal": 6}  # calls of the loop that asks for signals, one a step


@pytest.fixture(scope="module")
def data(corpus_folder, tmp_path_factory):
    """The documents and probes of the kinds."""
    data = tmp_path_factory.mktemp("data")
    for name in ("stories", "sums"):
        shutil.copy(corpus_folder / f"{name}.jsonl", data)
    texts = [json.loads(line)["text"] for line in (data / "stories.jsonl").read_text().splitlines()]
    long = [{"text": " ".join(texts[start : start + 20])} for start in range(0, len(texts), 20)]
    items = [json.loads(line) for line in (corpus_folder / "quiz.jsonl").read_text().splitlines()]
    other = [{**item, "domain": "elsewhere"} for item in items if item["task"] == "adding"]
    for name, rows in (("long", long), ("quiz", items), ("other", other)):
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return data


@pytest.fixture(scope="module")
def trained(data, kind, request, tmp_path_factory):
    """A kind's run: its folder and what it printed; the last kinds were not watched while they printed."""
    if kind == "probed":
        return request.getfixturevalue("finished_run"), None
    out = tmp_path_factory.mktemp("said")
    if kind == "unfinished":
        return left_unfinished(request.getfixturevalue("finished_run"), out / "unfinished"), None
    gone = [f".{each.split('.')[2].partition('=')[0]}." for each in KINDS[kind] if each.endswith("=null")]
    base = [each for each in small_run(data, out, tmp_path_factory.getbasetemp()) if not any(g in each for g in gone)]
    words = [each for each in KINDS[kind] if not each.endswith("=null")]
    return out / "runs" / "run", train_and_listen(load_settings(None, [*base, *words]), kind)


def train_and_listen(settings, kind):
    """Train a run of a kind; returns what it printed."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patched, contextlib.redirect_stdout(printed):
        if kind == "skipped updates":
            patched.setattr("moetrain.trainer.update", _skipping_twice)
        if kind in STOPPED_AFTER:
            stop_after(patched, STOPPED_AFTER[kind])
            assert train(settings) == STOPPED_BY_SIGNAL
        if kind == "resumed":
            stop_after(patched, 10**9)
        if kind != "stopped by a signal":
            assert train(settings) == 0
    return printed.getvalue()


def _skipping_twice(layout, model, optimizer, *others):
    """`update`, with a gradient that is not finite at two of its calls."""
    _skipping_twice.calls += 1
    if _skipping_twice.calls in (4, 5):
        next(model.parameters()).grad[0, 0] = math.nan
    return update(layout, model, optimizer, *others)


_skipping_twice.calls = 0
ALL = [*KINDS, "probed", "unfinished"]


class Said(HTMLParser):
    """The parts of a page that are about this run: (section, figure, text) of each."""

    def __init__(self, page):
        super().__init__()
        self.parts, self.path, self.section, self.figure, self.text = [], [], "", "", ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        about = dict(attributes)
        if tag not in ("meta", "br"):
            self.path.append((tag, about.get("class") or ""))
        if tag in ("h2", "h3"):
            self.section = about.get("id") or ""
        if (tag, self.path[-1][1]) in (("tr", "why"), ("li", ""), ("p", "soft")) or tag in (
            "figcaption",
            "summary",
            "h4",
        ):
            self.text = ""

    def handle_endtag(self, tag):
        _, kind = self.path.pop()
        text = " ".join(self.text.split())
        if tag == "h4":
            self.figure = text
        if tag == "figcaption" or (tag, kind) in (("tr", "why"), ("p", "soft")) or tag in ("summary", "li"):
            self.parts.append((self.section, self.figure if tag == "figcaption" else "", tag, text))

    def handle_data(self, text):
        self.text += text


def sentences(text):
    """The sentences of a text: they end at a dot before a capital letter or a number; "eps" begins one too."""
    return [each for each in re.split(r"(?<=[.!]) (?=[A-Z]|eps = )", text.strip()) if each]


@pytest.fixture(scope="module", params=ALL)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def run(trained):
    return Recorded(trained[0])


@pytest.fixture(scope="module")
def said(trained):
    with pytest.MonkeyPatch.context() as patched:  # drawing takes most of the time, and says nothing in words
        patched.setattr("moetrain.report.charts._svg", lambda draw, label, *size, **more: "<svg></svg>")
        return Said(report(open_run(trained[0])))


def percent(number):
    return int(number.replace("−", "-"))


def rounded(value, shown):
    """Whether a number is shown rounded, with half a unit of the last place to spare."""
    return value == pytest.approx(shown, abs=0.51)


def check_reason(run, domain, step, phase, why):
    """A reason of a phase, against the losses of the panel at a step."""
    rule = run.config["phase"]
    seen, unseen = (run.documents(domain, step, cell) for cell in ("seen", "unseen"))
    if found := re.fullmatch(
        r"too few documents in the panel that were (not )?trained on: (\d+) of (\d+)(; raise .*)?", why
    ):
        count, needed = int(found[2]), int(found[3])
        return phase == "undecided" and count == (unseen if found[1] else seen) < needed == rule["documents"]
    marked = run.marked(domain, step)
    start, of = run.start(domain, step)
    fallen = 1 - np.median([run.mean_loss(domain, each, "seen") for each in _known(run, domain, step)[-3:]]) / start
    if found := re.fullmatch(r"too few readings of the loss: (\d) of 3", why):
        return phase == "undecided" and int(found[1]) == len(_known(run, domain, step)) < 3
    fallen_by = rf"the loss has fallen by ([\d.]+)% of {of}, less than ([\d.]+)%, "
    if found := re.fullmatch(fallen_by + "and (.*)", why):
        return (
            rounded(100 * max(fallen, 0), float(found[1]))
            and float(found[2]) == pytest.approx(100 * rule["learned_answers" if marked else "learned"])
            and 100 * fallen < float(found[2])
            and float(found[1]) < float(found[2])
            and found[3] == course(run, *run.fall(domain, step, "seen"))
            and run.falls(domain, step, "seen") == (phase == "learning")
        )
    share_of = r"([\d.]+)% \(([\d.]+)% to ([\d.]+)%, n=(\d+) documents\)"
    if found := re.fullmatch(rf"the memorized share, {share_of}, is too uncertain to compare with ([\d.]+)%: .*", why):
        return phase == "undecided" and rounded(100 * run.share(domain, step), float(found[1]))
    verdict = r"is memory, (above|below) the threshold of ([\d.]+)%; (the loss of unseen texts .*)"
    found = re.fullmatch(f"of what was learned, {share_of} {verdict}", why)
    assert found, f"a reason without a check: {why}"
    share, low, high, bound = (float(found[n]) for n in (1, 2, 3, 6))
    threshold = rule["memorized_answers" if marked else "memorized"]
    true_share = run.share(domain, step)
    return (
        rounded(100 * np.clip(true_share, 0, 1), share)
        and low <= share <= high
        and int(found[4]) == seen + unseen
        and bound == pytest.approx(100 * threshold)
        and (found[5] == "above") == (share > bound) == (true_share >= threshold) == (phase == "memorizing")
        and check_fall(run, domain, step, phase, found[7])
    )


def check_fall(run, domain, step, phase, words):
    """What a reason says of the loss of unseen texts."""
    if phase == "settled" and run.falls(domain, step, "unseen"):
        return False
    return words == f"the loss of unseen texts {course(run, *run.fall(domain, step, 'unseen'))}"


def course(run, fall, surely, readings):
    """Whether a loss falls, in words, from the fall of a line through some readings, and if its interval is above 0."""
    if readings < 3:
        return f"has too few readings to say whether it falls, {readings} of 3"
    steep = run.config["phase"]["steep"]
    if surely:
        slow = f"falls by less than {steep:.0%} of its fall so far in the last {readings} readings"
        return "still falls" if fall >= steep else slow
    return "no longer falls" if fall <= 0 else "does not measurably fall"


def _known(run, domain, step):
    """Readings by a step that have samples trained on."""
    return [each for each in sorted(run.panel) if each <= step and run.documents(domain, each, "seen")]


OUTLOOK = re.compile(r"(\w+) +(\d+) +(\d+) +(\d+) +(-|\d+ marked) +(-|\d+) +(\w.*?) *")


def _no_verdict(run, last, domain, count, needed, tokens):
    seen = run.documents(domain, last, "seen")
    right = int(count) == seen < int(needed) and int(tokens) == run.config["panel"]["tokens"]
    return right and run.phase(domain, last) == "undecided"


def _no_verdict_at_the_end(run, last, domain, count, needed, tokens, before, share, enough):
    most = max(run.documents(domain, step, "unseen") for step in run.panel)
    return (
        int(count) == run.documents(domain, last, "unseen") < int(needed)
        and (int(before) == most if before else most < int(needed))
        and int(tokens) == run.config["panel"]["tokens"]
        and float(share) == run.config["data"]["heldout_share"]
        and (not enough or 0.5 >= float(enough) > float(share) * int(needed) / int(count))
        and run.phase(domain, last) == "undecided"
    )


def _not_settled(run, last, domains, needed, readings):
    right = int(readings) == len(run.panel) and int(needed) == run.config["phase"]["window"] + 1
    return right and all(run.phase(domain, last) != "settled" for domain in domains.split(", "))


def _onsets(run, last, readings):
    return int(readings) == len(run.panel) < 10


def _no_answers(run, last, domains):
    return domains.split(", ") == [each for each in run.domains if f"kernel/left_out/{each}" not in run.curves]


def _no_probe(run, last, domains):
    names = domains.split(", ")
    tags = [tag for tag in run.curves if tag.startswith(("correlation/", "delay/"))]
    without = [each for each in run.domains if not run.tasks(each)]
    return names == without and not [tag for tag in tags if tag.rpartition("/")[2] in names]


def _few_readings(run, last, readings):
    return int(readings) == len(run.probes) < 8 and not [tag for tag in run.curves if tag.startswith("correlation/")]


def _of_no_domain(run, last, task, domain, words, others):
    mapped = load_settings(run.folder / "config.yaml", [words]).probes.task_domains
    right = mapped == {task: run.domains[0]} and (others or "").split(", ") == (run.domains[1:] or [""])
    return right and domain not in run.domains and task in run.tasks(domain)


def _dense(run, last):
    return not run.panel and run.config["model"]["experts"] == "dense"


def _all_warmup(run, last, warmup, steps):
    return int(warmup) == run.config["optim"]["warmup_steps"] >= int(steps) == last


LACKS = {
    r"(\w+): no verdict: (\d+) of (\d+) documents of (\d+) tokens or more are first trained on in the run's first "
    r"tenth: give more documents, or lower panel.tokens": _no_verdict,
    r"(\w+): no verdict at the end: (\d+) of (\d+) documents of (\d+) tokens or more are held out"
    r"(?:, (\d+) before the last tenth)?: raise data.heldout_share, now ([\d.]+), "
    r"(?:to about ([\d.]+)|or give more documents)": _no_verdict_at_the_end,
    r"([\w, ]+): not settled: that takes (\d+) readings with documents enough: raise panel.readings, now (\d+)": (
        _not_settled
    ),
    r"panel.readings=(\d+): with fewer than 10, onsets of memorization are known only roughly": _onsets,
    r"([\w, ]+): no document marks an answer: no kernel/left_out": _no_answers,
    r"([\w, ]+): no probe: no accuracy, no correlations, no delay": _no_probe,
    r"probes.readings=(\d+): with fewer than 8 nothing is correlated": _few_readings,
    r"(\w+) is of (\w+), which is no domain of this run, and stands alone: map it with (\S+)(?: \(or (.*)\))?": (
        _of_no_domain
    ),
    r"no verdicts: model.experts=dense has no router, so there is no panel: set model.dense_experts": _dense,
    r"optim.warmup_steps=(\d+), but the run has (\d+) steps?: .*": _all_warmup,
}


def test_what_is_said_before_step_1_comes_true(run, trained, kind):
    """Each row of the table of verdicts, and each thing that is said to be lacking, against what the run then did."""
    printed = trained[1]
    if printed is None or not run.summary or kind == "repeats that stop":  # which end earlier than was planned
        pytest.skip("there is nothing to compare: not watched while it printed, or not as long as planned")
    before = printed.partition("\nverdicts")[2] or printed[printed.index("no verdicts") :]
    lines = [line.strip() for line in before.partition("step ")[0].splitlines()]
    last = run.last_step
    rows = {found[1]: found.groups()[1:] for line in lines if (found := OUTLOOK.fullmatch(line))}
    assert list(rows) == (run.domains if run.panel else [])
    for domain, (seen, unseen, readings, marked, tasks, verdict) in rows.items():
        counts = [[run.documents(domain, step, cell) for cell in ("seen", "unseen")] for step in sorted(run.panel)]
        assert [int(seen), int(unseen)] == counts[-1]
        enough = [min(each) >= run.config["phase"]["documents"] for each in counts]
        assert int(readings) == [*enough[::-1], False].index(False)
        answers = run.metric(domain, "kernel/left_out").get("n", 0)
        assert marked == (f"{answers} marked" if answers else "-")
        assert tasks == (str(len(run.tasks(domain))) if run.tasks(domain) else "-")
        phase = run.phase(domain, last)
        assert verdict == "any phase" or phase in ("undecided", *verdict.split(" or "))
        assert (verdict == "undecided only") == (int(readings) == 0)
    known = 0
    for pattern, check in LACKS.items():
        for line in lines:
            if found := re.fullmatch(pattern, line):
                known += 1
                assert check(run, last, *found.groups()), line
    others = [line for line in lines if line and line not in ("verdicts",) and not OUTLOOK.fullmatch(line)]
    legends = [line for line in others if line.startswith(("domain ", "documents of the panel at the last reading"))]
    assert len(others) - len(legends) == known, others
    for domain in rows:  # a domain without a verdict is named, with the remedy
        named = [line for line in lines if line.startswith(f"{domain}: no verdict")]
        assert len(named) == (rows[domain][-1] == "undecided only")


def test_the_verdict_is_that_of_the_newest_reading(run, said):
    rows = [sentences(text) for _, _, tag, text in said.parts if tag == "tr"]
    assert len(rows) == len(run.domains)
    if not run.panel:
        assert rows == [[]] * len(run.domains)
        return
    step = max(run.panel)
    for domain, (begun, reason, counts) in zip(run.domains, rows, strict=True):
        curve = run.curves[f"phase/{domain}"]
        phase = ["undecided", "learning", "memorizing", "generalizing", "settled"][int(curve[-1][1])]
        others = [at for at, value in curve if value != curve[-1][1]]
        if phase == "undecided" and not others:
            assert begun == "Undecided from the start."
        else:
            first = next(at for at, _ in curve if at > max(others, default=-1))
            found = re.fullmatch(r"(\w+) since ([\d.]+)(k?) tokens\.", begun)
            shown = float(found[2]) * (1000 if found[3] else 1)
            assert found[1].lower() == phase
            assert shown == pytest.approx(run.tokens(first), rel=0.01)
        found = re.fullmatch(r"At step (\d+): (.*)\.", reason)
        assert int(found[1]) == step
        assert check_reason(run, domain, step, phase, found[2]), reason
        if run.summary:
            assert run.summary["domains"][domain]["phase"] == phase
            assert run.summary["domains"][domain]["why"] == found[2]
        assert counts == f"Panel: {panel_counts(run, domain, step)}."


def panel_counts(run, domain, step):
    parts = []
    for cell, name in (("seen", "trained on"), ("to_come", "to come"), ("heldout", "held out")):
        rows = run.cell(domain, step, cell)
        documents = len(set(rows["document"]))
        of = "" if documents == len(rows) else f" of {documents} document{'s' * (documents > 1)}"
        parts.append(f"{len(rows)} sample{'s' * (len(rows) > 1)}{of} {name}" if len(rows) else f"no sample {name}")
    return ", ".join(parts)


def test_the_reasons_in_events_hold_at_their_readings(run):
    for event in run.events:
        if event["type"] == "phase":
            assert check_reason(run, event["domain"], event["step"], event["after"], event["why"]), event
            unseen = [item for item in event["evidence"] if item["name"] == "loss_unseen"]
            improving = unseen and run.falls(event["domain"], event["step"], "unseen")
            assert ("they still improve:" in event["sentence"]) == bool(improving and event["after"] == "generalizing")
            assert "may be worth more" not in event["sentence"]
            if unseen and unseen[0]["value"] is not None:
                assert (unseen[0]["vote"] > 0) == run.falls(event["domain"], event["step"], "unseen")


def listing(found, form="{} ({})"):
    return ", ".join(form.format(*each) for each in found)


def expected_notes(run):
    """The notes that have to be there, as patterns, from the run's files alone."""
    steps, notes = sorted(run.panel), []
    cells = (
        {d: {c: run.cell(d, steps[-1], c) for c in ("seen", "to_come", "heldout")} for d in run.domains}
        if steps
        else {}
    )
    documents = {domain: len(set(found["seen"]["document"])) for domain, found in cells.items()}
    if not run.summary:
        notes.append("The run is not finished: these are its newest numbers. .*")
    if not steps:
        notes.append("The panel has not been read: .*")
    if few := [(d, n) for d, n in documents.items() if 0 < n < 64]:
        notes.append(re.escape(f"Fewer than 64 documents trained on in the panel: {listing(few)}. Intervals are wide."))
    if none := [d for d, n in documents.items() if not n]:
        notes.append(f"No panel sample has been trained on: {', '.join(none)}.")
    if none := [d for d, found in cells.items() if not len(found["heldout"])]:
        notes.append(f"No panel sample is held out: {', '.join(none)}.")
    names = {"seen": "trained on", "to_come": "to come", "heldout": "held out"}
    shared = [
        f"{domain} ({len(rows)} {names[cell]} of {count} document{'s' * (count > 1)})"
        for domain, found in cells.items()
        for cell, rows in found.items()
        if len(rows) > (count := rows["document"].nunique())
    ]
    if shared:
        notes.append(re.escape(f"Several panel samples are of one document: {', '.join(shared)}.") + ".*")
    if 0 < len(steps) < 10:
        notes.append(f"Only {len(steps)} readings of the panel: .*")
    notes += _memorization_notes(run, steps, cells)
    notes += _routing_notes(run)
    notes += _probe_notes(run)
    unused = [
        (d, found["unused_share"]) for d, found in run.summary.get("data", {}).items() if found["unused_share"] >= 0.1
    ]
    if unused:
        notes.append(re.escape(f"Unused text: {listing(unused, '{} {:.0%}')}."))
    if problems := [event for event in run.events if event["type"] == "guard"]:
        many = f"{len(problems)} incidents, the last" if len(problems) > 1 else "One incident,"
        notes.append(re.escape(f"{many} at step {problems[-1]['step']}: {problems[-1]['problem']}."))
    skipped = {event["step"] for event in run.events if event["type"] == "guard" and "was skipped" in event["problem"]}
    assert run.summary.get("skipped_updates", 0) == len(skipped)
    if skipped:
        notes.append(f"{len(skipped)} updates? (were|was) skipped.")
    return notes


def _memorization_notes(run, steps, cells):
    notes = []
    if without := [d for d in cells if run.seen_losses(d).size and run.eps(d) is None]:
        notes.append(f"No loss threshold makes a fifth of the samples count .*: {', '.join(without)}. .*")
    tenth = max(1, run.config["train"]["max_steps"] // 10)
    between = [step for step in steps if tenth <= step <= run.config["train"]["max_steps"] - tenth]
    never, unread = [], []
    for domain, found in cells.items():
        read = [step for step in between if len(run.cell(domain, step, "seen")) > 1]
        if len(found["seen"]) > 1 and len(found["heldout"]):  # a gap needs two samples
            if not len(found["to_come"]):
                never.append(domain)
            elif not read:
                unread.append(domain)
    if never:
        notes.append(f"No gap to samples to come in {', '.join(never)}: no text long enough .*")
    if unread:
        notes.append(f"No gap to samples to come in {', '.join(unread)}: it is measured between .*")
    return notes


def in_words(names):
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


TITLES = {"d_path_norm": "pathway distance", "spread": "spread of routing", "cosine": "cosine of consecutive layers"}


def _routing_notes(run):
    notes, shared, noise = [], {}, []
    for domain in run.domains:
        names = []
        for name, title in TITLES.items():
            seen, heldout = (dict(run.curves.get(f"{g}/{name}/{domain}", [])) for g in ("pathway", "pathway_heldout"))
            both = sorted(seen.keys() & heldout.keys())
            number = open_run(run.folder).summary.query(
                "domain == @domain and metric == @tag", local_dict={"domain": domain, "tag": f"pathway/{name}"}
            )
            if len(both) < 2 or not np.isfinite(number["low"].iloc[0]):
                continue
            change, other = (each[both[-1]] - each[both[0]] for each in (seen, heldout))
            if abs(change) > (number["high"].iloc[0] - number["low"].iloc[0]) / 2 and other / change >= 0.5:
                names.append(title)
        if names:
            shared.setdefault(in_words(names), []).append(domain)
        low = run.metric(domain, "pathway/individuality").get("low") if run.summary else None
        if low is not None and low <= 0:
            noise.append(domain)
    notes += [f"Controls show the same change in {in_words(d)}: {text} changed .*" for text, d in shared.items()]
    if noise:
        notes.append(f"Individuality of {', '.join(noise)} is not above 0 by its interval: .*")
    dead = run.curves.get("experts/dead/worst")
    if dead and dead[-1][1] >= 0.05 * run.config["model"]["num_experts"]:
        notes.append(
            f"{dead[-1][1]:.0f} of {run.config['model']['num_experts']} experts of a layer received no token .*"
        )
    return notes


def _probe_notes(run):
    if not run.probes:
        return ["No probes were read: nothing here shows whether benchmarks improve."]
    newest = run.probes[max(run.probes)]
    tasks = {str(task): rows for task, rows in newest.groupby("task", observed=True)}
    notes = []
    if small := [(task, len(rows)) for task, rows in tasks.items() if len(rows) < 100]:
        notes.append(re.escape(f"Probes of fewer than 100 items are imprecise: {listing(small)}."))
    if len(run.probes) < 8:
        notes.append(f"Only {len(run.probes)} readings of the probes: with fewer than 8 nothing is correlated.")
    foreign = [
        (t, str(rows["domain"].iloc[0])) for t, rows in tasks.items() if rows["domain"].iloc[0] not in run.domains
    ]
    if foreign:
        notes.append(f"Probes of no domain of this run: {re.escape(listing(foreign, '{} (of {})'))}. .*")
    answered = {d: newest[(newest["domain"] == d) & newest["correct"].notna()] for d in run.domains}
    if none := [d for d, rows in answered.items() if not len(rows)]:
        notes.append(f"Not correlated in {', '.join(none)}: no task of this domain that is answered right or wrong.")
    if asked := [d for d, rows in answered.items() if len(rows)]:
        assert not any(above_chance(run, domain) for domain in asked), "give this test a check of correlations"
        notes.append(f"Not correlated in {', '.join(asked)}: accuracy did not exceed chance .*")
    return notes


def above_chance(run, domain):
    """Whether accuracy exceeds chance by two standard errors at three readings in a row."""
    above = []
    for rows in run.probes.values():
        own = rows[(rows["domain"] == domain) & rows["correct"].notna()]
        share = own["correct"].mean()
        choices = np.where(own["log_probs"].map(len) > 1, 1 / own["log_probs"].map(len), 1 / 5)  # five names are told
        above.append(share - 2 * np.sqrt(share * (1 - share) / len(own)) > choices.mean())
    return any(all(above[t : t + 3]) for t in range(len(above) - 2))


def test_the_notes_are_those_that_apply(run, said):
    notes = [text for section, _, tag, text in said.parts if (section, tag) == ("notes", "li")]
    verdict = [text for text in notes if text.startswith("Verdict and probes point to different things")]
    for text in verdict:
        claim = (
            r"in (\w+): (\w+) by its losses, but accuracy on its probes, ([\d.]+), is (not )?above chance, ([\d.]+), by"
        )
        found = re.search(claim, text)
        rows = run.probes[max(run.probes)]
        own = rows[(rows["domain"] == found[1]) & rows["correct"].notna()]
        assert float(found[3]) == pytest.approx(own["correct"].mean(), abs=0.006)
        wilson = binomtest(int(own["correct"].sum()), len(own)).proportion_ci(method="wilson")
        assert bool(found[4]) == (wilson.low <= float(found[5]))
        assert bool(found[4]) == (found[2] in ("generalizing", "settled"))
        assert run.summary.get("domains", {}).get(found[1], {"phase": found[2]})["phase"] == found[2]
    others = [text for text in notes if text not in verdict]
    expected = expected_notes(run)
    if not run.summary:  # intervals of an unfinished run are not in its files
        others = [text for text in others if not text.startswith("Individuality")]
    unmatched = [text for text in others if not any(re.fullmatch(each, text) for each in expected)]
    unsaid = [each for each in expected if not any(re.fullmatch(each, text) for text in others)]
    assert (unmatched, unsaid) == ([], [])


WITHOUT_INTERVAL = {
    "Pathway distance, normalised": "pathway/d_path_norm",
    "Spread of routing": "pathway/spread",
    "Effective rank of routing": "kernel/effective_rank",
    "Agreement of consecutive layers (CKA)": "pathway/layer_cka",
    "Pathway consistency": "pathway/consistency",
    "Cosine of consecutive layers": "pathway/cosine",
    "Individuality: beyond a sample's own halves": "pathway/individuality",
    "Sharing: closer than to other domains": "pathway/sharing",
}


def check_caption(run, section, figure, sentence):
    """A sentence below a figure; the figure is a domain, or a metric."""
    steps = sorted(run.panel)
    if section == "memorization":
        if found := re.fullmatch(r"eps = ([\d.]+) nats per token, a perplexity of ([\d.,]+)(:.*)?\.", sentence):
            eps = run.eps(figure)
            perplexity = float(found[2].replace(",", ""))
            far = bool(found[3]) == (perplexity > 2)
            return eps == pytest.approx(float(found[1])) and perplexity == pytest.approx(np.exp(eps), rel=0.01) and far
        if found := re.fullmatch(r"Of (\d+) samples (\d+) count\.", sentence):
            memorized = run.memorized(figure, run.eps(figure))
            return (int(found[1]), int(found[2])) == (len(memorized), memorized.sum())
        if found := re.fullmatch(r"Nothing counts .*: it takes 4 readings, here are (\d+)\.", sentence):
            return int(found[1]) == len(steps) < 4
        if re.fullmatch(r"Nothing counts .*: no eps counts a fifth of the samples\.", sentence):
            return len(steps) >= 4 and run.eps(figure) is None
        if found := re.fullmatch(
            r"Online rule: ([\d.]+)( [\[±][^\]]*\]?)? at step (\d+)(, with the eps of ([\d.]+) that is set)?\.",
            sentence,
        ):
            given = run.config["data"]["domains"][figure].get("eps")
            typed, step = (float(found[5]) if found[5] else None) == given, int(found[3])
            newest = run.curves[f"memorized/fraction/{figure}"][-1][0] == step
            return typed and newest and float(found[1]) == pytest.approx(run.online(figure, step), abs=0.006)
    if section == "repeats":
        return check_repeats(run, figure, sentence)
    if section == "distance":
        if sentence == "Too few readings for a trend.":
            return np.isnan(run.slope([figure] if figure in run.domains else run.domains))
        if found := re.fullmatch(r"As the loss falls, the distance (falls|rises), by the trend\.", sentence):
            return (found[1] == "falls") == (run.slope([figure]) > 0)
        if found := re.fullmatch(r"Over all domains, a lower loss goes with a (smaller|larger) distance\.", sentence):
            return (found[1] == "smaller") == (run.slope(run.domains) > 0)
        slopes = {d: run.slope([d]) for d in run.domains}
        against = [d for d, each in slopes.items() if each * run.slope(run.domains) < 0]
        known = [d for d, each in slopes.items() if np.isfinite(each)]
        if sentence.startswith("Within every domain it is the other way"):
            return against == known != []
        if found := re.fullmatch(r"Within (.*) it is the other way: .*", sentence):
            return against and found[1] == " and ".join(against)
        if sentence == "So it is within every domain with a trend of its own.":
            return known and not against
        if sentence.startswith("No domain has readings enough"):
            return not known
    if found := re.fullmatch(r"No value for (.*)\.", sentence):
        tag = WITHOUT_INTERVAL.get(figure, "kernel/d_eff")
        return found[1] == in_words([domain for domain in run.domains if f"{tag}/{domain}" not in run.curves])
    if sentence == "There are too few samples for an interval.":
        tag = WITHOUT_INTERVAL[figure]
        numbers = open_run(run.folder).summary.query("metric == @tag", local_dict={"tag": tag})
        return numbers["low"].isna().all()
    return None


def check_repeats(run, domain, sentence):
    """What the next pass over a domain is worth, by the newest reading that measured it."""
    interval = r"(?: \(([−\d.]+) to ([\d.]+|more than can be told)\))?"
    points = run.curves[f"repeat/passes/{domain}"]
    data, logged = run.summary["data"][domain], np.array([(0, 0), *run.curves[f"data/tokens/{domain}"]])
    for step, passes in points:
        trained_on = np.interp(step, *logged.T)
        assert passes == pytest.approx(trained_on / (data["train_tokens"] / data["copies"]), rel=0.02)
    (step, newest), (at, worth) = points[-1], run.curves[f"repeat/worth/{domain}"][-1]
    if found := re.fullmatch(r"At ([\d.]+) it could not be told\.", sentence):
        return step > at and float(found[1]) == pytest.approx(newest, abs=0.051)
    said = r"([\d.]+) passes; the next is worth|At ([\d.]+) passes the next was worth"
    if found := re.fullmatch(rf"(?:{said}) ([−\d.]+) of fresh text{interval}\.", sentence):
        number = run.metric(domain, "repeat/worth")
        shown = [float(each.replace("−", "-")) for each in found.groups() if each]
        right = [dict(points)[at], worth, number["low"], number["high"]]
        return bool(found[1]) == (step == at) and shown == pytest.approx(right, abs=0.051)
    half = r"(Forecast: worth half of it|By all readings it was worth half of that) after ([\d.]+) passes"
    found = re.fullmatch(half + interval + r"\.", sentence)
    number = run.metric(domain, "repeat/budget")
    high = "more than can be told" if number["high"] is None else f"{number['high']:.1f}"
    ahead = found[1].startswith("Forecast") == (number["value"] >= newest)
    return ahead and float(found[2]) == pytest.approx(number["value"], abs=0.051) and (found[4] or high) == high


def test_captions_say_what_the_figures_show(run, said):
    names = ("d_path_norm", "spread", "effective_rank", "layer_cka", "d_eff", "consistency", "cosine")
    definitions = [grokking.describe(name) for name in (*names, "individuality", "sharing")]
    described = " ".join(" ".join(each.replace("`", "").split()) for each in definitions).lower()
    captions = [(section, figure, text) for section, figure, tag, text in said.parts if tag == "figcaption"]
    for section, figure, text in captions:
        for sentence in sentences(text):
            result = check_caption(run, section, figure, sentence)
            if result is None:
                assert sentence.rstrip(".").lower() in described or sentence == "Pathway distance, normalised.", (
                    figure,
                    sentence,
                )
            else:
                assert result, (section, figure, sentence)
    if run.panel:
        drawn = {section for section, *_ in captions}
        assert "routing" in drawn
        assert ("memorization" in drawn) != any("There is no curve" in text for _, _, _, text in said.parts)


def test_texts_claim_only_what_is_drawn_or_why_it_is_not(run, said):
    texts = {}
    for section, _, tag, text in said.parts:
        if tag == "p":
            texts[section] = texts.get(section, "") + " " + text
    answered = any(
        rows["domain"].isin(run.domains).any() and rows["correct"].notna().any() for rows in run.probes.values()
    )
    assert ("Accuracy is over the domain's probe items" in texts["memorization"]) == answered
    assert ("By the paper's rule" in texts["memorization"]) == any(
        run.panel and run.seen_losses(d).size and run.eps(d) is not None for d in run.domains
    )
    online = any(f"memorized/fraction/{domain}" in run.curves for domain in run.domains)
    assert ("The online rule uses" in texts["memorization"]) == online
    trends = any(np.isfinite(run.slope([domain])) for domain in run.domains)
    assert ("Lines are least-squares trends" in texts["distance"]) == trends
    assert "no probe was read" not in " ".join(texts.values()).lower() or not run.probes
    assert ("The panel has not been read." in texts["losses"]) == (not run.panel)
    if not run.panel and not run.probes:
        assert "the panel has not been read, and no probe was read" in texts["memorization"]
    if run.probes and not answered:
        tasks = sorted({str(task) for rows in run.probes.values() for task in rows["task"]})
        assert f"{len(run.probes)} readings of {', '.join(tasks)} gave no accuracy for a domain" in texts["accuracy"]


def test_costs_and_counts_are_one_number_each(run, said, trained):
    facts = [text for section, _, tag, text in said.parts if tag == "li" and section == ""]
    text_tokens = run.tokens(max(step for tag in run.curves for step, _ in run.curves[tag]))
    (shown,) = (each for each in facts if "text tokens in" in each)
    number = re.match(
        r"([\d.]+)(k?)text tokens in ([\d,]+) steps", shown.replace(" ", "", 0).replace("k text", "ktext")
    )
    assert float(number[1]) * (1000 if number[2] else 1) == pytest.approx(text_tokens, rel=0.005)
    if not run.summary:
        return
    seconds = run.summary["seconds"]
    monitored = sum(seconds.get(name, 0) for name in ("record", "stream", "panel", "probes")) / sum(seconds.values())
    resumed = [event["step"] for event in run.events if event["type"] == "resume"]
    of = f"of the time since step {resumed[-1]}, where it was resumed, spent" if resumed else "of the run's time spent"
    assert any(each.startswith(f"{monitored:.1%}") and f"{of} on monitoring" in each for each in facts)
    parts = " ".join(text for _, _, tag, text in said.parts if tag == "p")
    assert f"Panel, probes, and recording and streaming metrics are monitoring: {monitored:.1%} in all." in parts
    met = sum(found["met_tokens"] for found in run.summary["data"].values())
    assert met == run.summary["text_tokens"] == round(text_tokens)
    assert f"together {met:,}." in parts
    printed = trained[1]
    if printed is None:
        return
    lines = " ".join(printed.split())
    assert f"{met:,} text tokens; rows are" in lines  # before the first step
    assert f"{met:,} tokens of text and {run.summary['tokens'] - met:,} begin and end tokens;" in lines
    since = f" since it was resumed, {run.summary['measured_tokens']:,} tokens ago" if resumed else ""
    assert f"{monitored:.1%} of the time spent on monitoring{since}; peak memory" in lines
    rest = 1 - (resumed[-1] if resumed else 0) / run.last_step
    assert run.summary["measured_tokens"] == pytest.approx(rest * run.summary["tokens"], rel=0.1)
    for domain, found in run.summary["domains"].items():
        assert ("phase" in found) == (f"{domain} is {found.get('phase')}: {found.get('why')}" in lines)
    changes = [event for event in run.events if event["type"] == "phase"]
    for event in changes:
        assert f"step {event['step']}: {event['domain']} is {event['after']}: {event['why']}" in lines
    assert "train tokens" not in lines
    assert lines.count("D_path") == lines.count("D_path, stream")


def test_the_rules_numbers_are_those_of_the_run(run, said):
    text = " ".join(text for section, _, tag, text in said.parts if (section, tag) == ("judged", "p"))
    rule = yaml.safe_load((run.folder / "config.yaml").read_text())["phase"]
    if any(event["type"] == "phase" for event in run.events):
        assert f"through the last {rule['trend']} readings falls by {rule['steep']:.0%} or more" in text
        assert f"memorized from {rule['memorized']:.0%} on ({rule['memorized_answers']:.0%} where" in text
    else:
        assert text.startswith("No domain has changed its phase")
