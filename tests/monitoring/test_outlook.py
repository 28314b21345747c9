"""What the start says is lacking; that it comes true in whole runs is tested in tests/report/test_sentences.py."""

import shlex

import pytest

from moetrain.config import load_settings
from moetrain.grokking import Phase
from moetrain.monitoring.outlook import DomainOutlook, lacks, no_panel, probe_lacks
from moetrain.probes.tasks import Task

SETTINGS = ("data.domains.papers.path=a.jsonl", "data.domains.code.path=b.jsonl")


def settings(*overrides):
    return load_settings(None, [*SETTINGS, *overrides])


def outlook(**changed):
    given = {"seen": 64, "unseen": 64, "unseen_before": 64, "readings": 10, "read": 10, "marked": 64, "tasks": 1}
    return DomainOutlook("papers", **{**given, "phases": tuple(Phase), **changed})


@pytest.mark.parametrize("name", ["arc_easy", "arc.easy"])
def test_the_line_that_maps_a_task_can_be_pasted_into_the_command(name):
    (line, *_) = probe_lacks([Task(name, "science", "choice", ())], ["papers", "code"], settings())
    command = line.partition("map it with ")[2].partition(" (or ")[0]
    (word,) = shlex.split(command)
    assert settings(word).probes.task_domains == {name: "papers"}
    assert line.endswith("(or code)")


def test_domains_without_a_probe_and_few_readings_are_named():
    task = Task("quiz", "papers", "choice", ())
    lines = probe_lacks([task], ["papers", "code"], settings("probes.readings=7"))
    assert lines[0].startswith("code: no probe")
    assert lines[1].startswith("probes.readings=7: with fewer than 8")
    assert probe_lacks([task], ["papers"], settings("probes.readings=8")) == []
    assert probe_lacks([task], ["papers"], settings("probes.readings=2", "monitor.budget=auto")) == []


def test_nothing_is_lacking_where_everything_is_there():
    assert lacks([outlook()], settings()) == []
    assert outlook().row()[-1] == "any phase"


def test_what_a_verdict_lacks_is_said_with_the_remedy():
    given = settings("data.heldout_share=0.01", "panel.readings=10")
    (line,) = lacks([outlook(unseen=2, readings=0, phases=(Phase.UNDECIDED,))], given)
    assert line.startswith(
        "papers: no verdict at the end: 2 of 8 documents of 40 tokens or more are held out, 64 before"
    )
    assert line.endswith("raise data.heldout_share, now 0.01, to about 0.048")
    (line,) = lacks([outlook(unseen=1, unseen_before=1, readings=0)], settings("data.heldout_share=0.2"))
    assert line.endswith("are held out: raise data.heldout_share, now 0.2, or give more documents")
    (line,) = lacks([outlook(seen=3, readings=0)], given)
    assert line.startswith("papers: no verdict: 3 of 8 documents")
    phases = (Phase.UNDECIDED, Phase.MEMORIZING, Phase.GENERALIZING)
    assert outlook(readings=2, read=2, phases=phases).row()[-1] == "memorizing or generalizing"
    (line,) = lacks([outlook(readings=2, read=2, phases=phases)], given)
    assert line == "papers: not settled: that takes 4 readings with documents enough: raise panel.readings, now 10"
    assert outlook(phases=(Phase.UNDECIDED,)).row()[-1] == "undecided only"


def test_why_there_is_no_panel():
    assert "monitor.enabled=false" in no_panel(settings("monitor.enabled=false"))
    assert "no router" in no_panel(settings("model.experts=dense"))
    assert "panel.tokens" in no_panel(settings())
