"""Limitations of a run to know before quoting its numbers, one sentence each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from moetrain.grokking.memorization import LEAST_CELL
from moetrain.grokking.memorization import LEAST_READINGS as LEAST_PANEL_READINGS
from moetrain.grokking.wording import decimals
from moetrain.metrics import table
from moetrain.probes.tasks import ENOUGH
from moetrain.report.findings import controls, metric, newest_panel, verdicts
from moetrain.report.page import listed, short_title
from moetrain.report.trend import LEAST_READINGS

if TYPE_CHECKING:
    import pandas as pd

    from moetrain.report.open_run import OpenedRun

_STRONG = 0.7  # correlations from here on are reported if they come from a trend alone
_UNUSED = 0.1  # unused shares of a domain's text from here on are reported
_DEAD = 0.05  # dead experts from this share of a layer on are reported


def limitations(run: OpenedRun) -> list[str]:
    """Limitations to know before quoting a number, one sentence each, the most general first."""
    return [
        *_of_the_run(run),
        *_of_verdicts(run),
        *_of_sizes(run),
        *_of_memorization(run),
        *_of_controls(run),
        *_of_probes(run),
        *_of_training(run),
    ]


def _of_the_run(run: OpenedRun) -> Iterator[str]:
    if not run.finished:
        yield (
            "The run is not finished: these are its newest numbers. Samples count as memorized as if it had ended at "
            "its newest reading, and groups are paired only at the end."
        )
    if not run.reading_steps:
        yield "The panel has not been read: there is no verdict, and nothing is measured on fixed samples."


def _of_verdicts(run: OpenedRun) -> Iterator[str]:
    """Verdicts beside which the probes point elsewhere."""
    for each in verdicts(run):
        if not each.accuracy:
            continue
        places = decimals(each.accuracy.value, each.chance, least=3 if 0 < each.chance < 0.1 else 2)
        accuracy = f"accuracy on its probes, {each.accuracy.value:.{places}f}"
        chance = f"above chance, {each.chance:.{places}f}, by its interval"
        above = each.accuracy.low > each.chance
        verdict = f"{each.phase} by its losses, but {accuracy},"
        both = f"Verdict and probes point to different things in {each.domain}: {verdict}"
        if each.phase == "memorizing" and above:
            yield f"{both} is {chance}. What is learned of its texts may carry over in part."
        if each.phase in ("generalizing", "settled") and not above:
            yield f"{both} is not {chance}. The verdict is about other texts of the domain, not about benchmarks."


def _of_sizes(run: OpenedRun) -> Iterator[str]:
    if run.reading_steps:
        yield from _of_panel_sizes(run)
    items = run.probes.groupby("task", observed=True)["item"].nunique()
    small = [f"{task} ({count})" for task, count in items.items() if count < ENOUGH]
    if small:
        yield f"Probes of fewer than {ENOUGH} items are imprecise: {', '.join(small)}."
    readings = run.probes["step"].nunique()
    if 0 < readings < LEAST_READINGS:
        yield f"Only {_readings(readings)} of the probes: with fewer than {LEAST_READINGS} nothing is correlated."


def _of_panel_sizes(run: OpenedRun) -> Iterator[str]:
    cells = {domain: newest_panel(run, domain) for domain in run.domains}
    seen = {domain: found["trained on"] for domain, found in cells.items()}
    few = [f"{domain} ({documents})" for domain, (_, documents) in seen.items() if 0 < documents < LEAST_CELL]
    if few:
        yield f"Fewer than {LEAST_CELL} documents trained on in the panel: {', '.join(few)}. Intervals are wide."
    if none := [domain for domain, (samples, _) in seen.items() if not samples]:
        yield f"No panel sample has been trained on: {', '.join(none)}."
    if none := [domain for domain, found in cells.items() if not found["held out"][0]]:
        yield f"No panel sample is held out: {', '.join(none)}."
    shared = [
        f"{domain} ({samples} {cell} of {documents} {'document' if documents == 1 else 'documents'})"
        for domain, found in cells.items()
        for cell, (samples, documents) in found.items()
        if samples > documents
    ]
    if shared:
        yield (
            f"Several panel samples are of one document: {', '.join(shared)}. Intervals are over "
            "documents, which are fewer."
        )
    readings = len(run.reading_steps)
    if readings < LEAST_PANEL_READINGS:
        yield (
            f"Only {_readings(readings)} of the panel: with fewer than {LEAST_PANEL_READINGS}, onsets are known only "
            f"roughly; with fewer than {LEAST_READINGS}, no trend is drawn."
        )


def _readings(count: int) -> str:
    return f"{count} {'reading' if count == 1 else 'readings'}"


def _of_memorization(run: OpenedRun) -> Iterator[str]:
    without = [domain for domain, own in run.onsets.groupby("domain", sort=False) if not np.isfinite(own["eps"]).any()]
    if without:
        yield (
            "No loss threshold makes a fifth of the samples count as memorized by the paper's rule: "
            f"{', '.join(without)}. Use the memorized share and the gaps there."
        )
    to_come = {domain: newest_panel(run, domain).get("to come", (0, 0))[0] for domain in run.domains}
    gapless = [
        domain
        for domain in run.domains
        if metric(run, domain, "memorized/gap_heldout") and not metric(run, domain, "memorized/gap")
    ]
    if never := [domain for domain in gapless if not to_come[domain]]:
        yield (
            f"No gap to samples to come in {', '.join(never)}: no text long enough for the panel is first trained on "
            "in the last tenth of the run there. The gap to held-out samples also includes how these texts differ in "
            "kind."
        )
    if unread := [domain for domain in gapless if to_come[domain]]:
        yield (
            f"No gap to samples to come in {', '.join(unread)}: it is measured between the first and the last tenth of "
            "the run, and no reading there has samples trained on."
        )


def _of_controls(run: OpenedRun) -> Iterator[str]:
    titles: dict[str, list[str]] = {}
    for each in controls(run):
        if each.shared:
            titles.setdefault(each.domain, []).append(_within_a_sentence(each.title))
    for shared, domains in _grouped({domain: listed(names) for domain, names in titles.items()}).items():
        yield (
            f"Controls show the same change in {listed(domains)}: {shared} changed on held-out samples in the "
            "direction of samples trained on, and by at least half as much. That part is not caused by training on "
            "these samples."
        )
    noise = [domain for domain in run.domains if metric(run, domain, "pathway/individuality").low <= 0]
    if noise:
        yield (
            f"Individuality of {', '.join(noise)} is not above 0 by its interval: as far as can be told, samples "
            "differ no more than the two halves of one sample, and distances between pathways measure sampling noise."
        )
    dead, experts = run.curve("experts/dead/worst")["value"], run.setting("model.num_experts")
    if len(dead) and dead.iloc[-1] >= _DEAD * experts:
        yield (
            f"{dead.iloc[-1]:.0f} of {experts} experts of a layer received no token since the previous point: pathways "
            "are shorter, and distances are less comparable with earlier ones."
        )


def _of_probes(run: OpenedRun) -> Iterator[str]:
    if not len(run.probes):
        yield "No probes were read: nothing here shows whether benchmarks improve."
        return
    foreign = {task: domain for task, domain in zip(run.tasks["task"], run.tasks["domain"], strict=True)}
    foreign = {task: domain for task, domain in foreign.items() if domain not in run.domains}
    if foreign:
        asked = ", ".join(f"{task} (of {domain})" for task, domain in foreign.items())
        example = f"{next(iter(foreign))}: {run.domains[0]}"
        yield (
            f"Probes of no domain of this run: {asked}. They are in no figure and no correlation of a domain; "
            f"probes.task_domains maps them, such as {{{example}}}."
        )
    rows = run.correlations
    for note, own in rows[(rows["predictor"] == "") & (rows["note"] != "")].groupby("note", sort=False):
        yield f"Not correlated in {', '.join(own['domain'])}: {note}."
    trending = {domain: listed(_trending(rows[rows["domain"] == domain])) for domain in run.domains}
    for predictors, domains in _grouped({domain: names for domain, names in trending.items() if names}).items():
        yield (
            f"In {listed(domains)} accuracy correlates strongly with {predictors} in the raw series only, not in the "
            "changes from reading to reading. Any two series with a trend correlate in this way."
        )


def _trending(rows: pd.DataFrame) -> list[str]:
    """Predictors of a domain that correlate strongly with accuracy, while their changes may not correlate at all."""
    found = []
    for predictor, own in rows[rows["method"] == "spearman"].groupby("predictor", sort=False):
        by_series = own.set_index("series")
        changes = by_series.loc["differences"]
        if abs(by_series["value"]["raw"]) >= _STRONG and not (changes["low"] > 0 or changes["high"] < 0):
            found.append(_within_a_sentence(table.find(predictor).title))
    return found


def _grouped(by_domain: dict[str, str]) -> dict[str, list[str]]:
    """The domains of each value."""
    found: dict[str, list[str]] = {}
    for domain, value in by_domain.items():
        found.setdefault(value, []).append(domain)
    return found


def _within_a_sentence(title: str) -> str:
    """A title without its remarks, beginning in lower case."""
    title = short_title(title)
    return title[0].lower() + title[1:]


def _of_training(run: OpenedRun) -> Iterator[str]:
    unused = [
        f"{domain} {found['unused_share']:.0%}"
        for domain, found in run.outcome.get("data", {}).items()
        if found["unused_share"] >= _UNUSED
    ]
    if unused:
        yield f"Unused text: {', '.join(unused)}."
    problems = run.events_of("guard")
    if problems:
        last = problems[-1]
        many = f"{len(problems)} incidents, the last" if len(problems) > 1 else "One incident,"
        yield f"{many} at step {last['step']:,}: {last['problem']}."
    for key, one, several in (
        ("skipped_updates", "update was skipped", "updates were skipped"),
        (
            "samples_not_finite",
            "sample was left out because its routing was not finite",
            "samples were left out because their routing was not finite",
        ),
    ):
        if count := run.outcome.get(key):
            yield f"{count:,} {one if count == 1 else several}."
