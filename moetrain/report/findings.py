"""Findings in words and tables: the verdict per domain, the controls, and warnings."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moetrain.grokking import Phase
from moetrain.grokking.memorization import LEAST_CELL
from moetrain.grokking.memorization import LEAST_READINGS as LEAST_PANEL_READINGS
from moetrain.metrics import table
from moetrain.metrics.cell import HELDOUT, SEEN
from moetrain.probes.tasks import ENOUGH
from moetrain.report.page import NOTHING, Number, plain, time_of
from moetrain.report.trend import LEAST_READINGS

if TYPE_CHECKING:
    import pandas as pd

    from moetrain.report.open_run import OpenedRun

_SHARED = 0.5  # held-out samples share a change if they change by at least this fraction of it
_STRONG = 0.7  # correlations from here on are reported if they come from a trend alone
_UNUSED = 0.1  # unused shares of a domain's text from here on are reported
_DEAD = 0.05  # dead experts from this share of a layer on are reported


def metric(run: OpenedRun, domain: str, name: str) -> Number:
    """The newest value of a domain's metric."""
    rows = run.summary
    found = rows[(rows["domain"] == domain) & (rows["task"] == "") & (rows["metric"] == name)]
    return Number(*found[["value", "low", "high", "n"]].iloc[0]) if len(found) else NOTHING


@dataclass(frozen=True)
class DomainVerdict:
    """The verdict on a domain, and its most important numbers."""

    domain: str
    phase: str  # empty where the run does not judge phases
    phase_number: int
    since: float  # tokens at which this phase began; steps where the run counts none
    why: str
    loss_seen: Number
    loss_heldout: Number
    share: Number  # memorized
    gap: Number
    gap_heldout: Number
    accuracy: Number
    chance: float
    trained_accuracy: Number


def verdicts(run: OpenedRun) -> list[DomainVerdict]:
    """The newest verdict of each domain."""
    found = []
    for domain in run.domains:
        phase = run.curve(f"phase/{domain}")
        number = int(phase["value"].iloc[-1]) if len(phase) else -1
        changes = [event for event in run.events_of("phase") if event["domain"] == domain]
        held, chance = newest_accuracy(run, domain, trained=False)
        trained, _ = newest_accuracy(run, domain, trained=True)
        found.append(
            DomainVerdict(
                domain=domain,
                phase=Phase(number).name.lower() if number >= 0 else "",
                phase_number=max(number, 0),
                since=float(time_of(run, [changes[-1]["step"]])[0]) if changes else 0.0,
                why=_reason(run, domain, changes) if number >= 0 else "",
                loss_seen=metric(run, domain, "loss/panel_seen"),
                loss_heldout=metric(run, domain, "loss/panel_heldout"),
                share=metric(run, domain, "memorized/share"),
                gap=metric(run, domain, "memorized/gap"),
                gap_heldout=metric(run, domain, "memorized/gap_heldout"),
                accuracy=held,
                chance=chance,
                trained_accuracy=trained,
            )
        )
    return found


def _reason(run: OpenedRun, domain: str, changes: Sequence[Mapping[str, Any]]) -> str:
    """Why the domain has its phase: by the newest reading, or, in an unfinished run, by the last change of phase."""
    now = run.outcome.get("domains", {}).get(domain, {}).get("why")
    return now or (changes[-1]["why"] if changes else "no change of phase so far")


def newest_accuracy(run: OpenedRun, domain: str, trained: bool) -> tuple[Number, float]:
    """Accuracy over a domain's items at the newest reading of the probes, and the accuracy of chance."""
    rows = run.accuracy
    own = rows[(rows["domain"] == domain) & (rows["trained"] == trained)]
    if not len(own):
        return NOTHING, math.nan
    newest = own.iloc[-1]
    return Number(newest["accuracy"], newest["low"], newest["high"], newest["items"]), float(newest["chance"])


@dataclass(frozen=True)
class Control:
    """The change of a metric on samples trained on and on held-out samples, from their first common reading on."""

    domain: str
    title: str
    seen: tuple[float, float]  # first and newest value
    heldout: tuple[float, float]
    verdict: str

    @property
    def shared(self) -> bool:
        """Whether held-out samples changed in the same way."""
        return self.verdict == "same change"


def controls(run: OpenedRun) -> list[Control]:
    """Every metric that is computed on samples trained on and on held-out samples of the same domain.

    A change that both have in common is not caused by training on these samples.
    """
    found = []
    for domain in run.domains:
        for row in table.METRICS:
            if not {SEEN, HELDOUT} <= set(row.cells):
                continue
            seen, heldout = (
                run.curve(f"{row.tag_on(cell)}/{domain}").set_index("step")["value"] for cell in (SEEN, HELDOUT)
            )
            both = seen.index.intersection(heldout.index)
            if len(both) < 2:
                continue
            own, other = ((float(s[both[0]]), float(s[both[-1]])) for s in (seen, heldout))
            change, heldout_change = own[1] - own[0], other[1] - other[0]
            if not abs(change) > metric(run, domain, row.tag).half:  # also without an interval
                verdict = "no clear change"
            elif change * heldout_change > 0 and abs(heldout_change) >= _SHARED * abs(change):
                verdict = "same change"
            else:
                verdict = "different change"
            found.append(Control(domain, row.title, own, other, verdict))
    return found


def warnings(run: OpenedRun) -> list[str]:
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


def _of_verdicts(run: OpenedRun) -> Iterator[str]:
    """Verdicts that the probes contradict."""
    for each in verdicts(run):
        if not each.accuracy:
            continue
        share = f"{plain(each.accuracy.value, 2)} of its probe items are correct, chance {plain(each.chance, 2)}"
        if each.phase == "memorizing" and each.accuracy.low > each.chance:
            yield f"Verdict and probes disagree on {each.domain}: memorizing by its losses, but {share}."
        if each.phase in ("generalizing", "settled") and not each.accuracy.low > each.chance:
            yield f"Verdict and probes disagree on {each.domain}: {each.phase} by its losses, but {share}."


def _of_sizes(run: OpenedRun) -> Iterator[str]:
    sizes = {domain: metric(run, domain, "loss/panel_seen").n for domain in run.domains}
    few = [f"{domain} ({size:.0f})" for domain, size in sizes.items() if size < LEAST_CELL]
    if few:
        yield f"Fewer than {LEAST_CELL} documents trained on in the panel: {', '.join(few)}. Intervals are wide."
    none = [domain for domain, size in sizes.items() if not size > 0]
    if none and run.reading_steps:
        yield f"No panel sample has been trained on yet: {', '.join(none)}."
    if 0 < len(run.reading_steps) < LEAST_PANEL_READINGS:
        yield (
            f"Only {len(run.reading_steps)} readings of the panel, fewer than {LEAST_PANEL_READINGS}: too few for "
            "onsets and trends."
        )
    items = run.probes.groupby("task", observed=True)["item"].nunique()
    small = [f"{task} ({count})" for task, count in items.items() if count < ENOUGH]
    if small:
        yield f"Probes of fewer than {ENOUGH} items are imprecise: {', '.join(small)}."
    readings = run.probes["step"].nunique()
    if 0 < readings < LEAST_READINGS:
        yield f"Only {readings} readings of the probes: with fewer than {LEAST_READINGS} nothing is correlated."


def _of_memorization(run: OpenedRun) -> Iterator[str]:
    without = [domain for domain, own in run.onsets.groupby("domain", sort=False) if not np.isfinite(own["eps"]).any()]
    if without:
        yield (
            "No loss threshold makes a fifth of the samples count as memorized by the paper's rule: "
            f"{', '.join(without)}. Use the loss gaps as measures of memorization there."
        )
    gapless = [
        domain
        for domain in run.domains
        if metric(run, domain, "memorized/gap_heldout") and not metric(run, domain, "memorized/gap")
    ]
    if gapless:
        yield (
            f"No gap to samples to come in {', '.join(gapless)}: no text there is first trained on in the last tenth "
            "of the run. The gap to held-out samples also includes how these texts differ in kind."
        )


def _of_controls(run: OpenedRun) -> Iterator[str]:
    titles: dict[str, list[str]] = {}
    for each in controls(run):
        if each.shared:
            titles.setdefault(each.domain, []).append(_within_a_sentence(each.title))
    for shared, domains in _grouped({domain: _listed(names) for domain, names in titles.items()}).items():
        yield (
            f"Controls show the same change in {_listed(domains)}: {shared} changed on held-out samples as on samples "
            "trained on, so the change is not caused by training on these samples."
        )
    noise = [domain for domain in run.domains if metric(run, domain, "pathway/individuality").low <= 0]
    if noise:
        yield (
            f"Individuality of {', '.join(noise)} is not distinguishable from 0: samples differ no more than the two "
            "halves of one sample, so distances between pathways measure sampling noise."
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
    rows = run.correlations
    for note, own in rows[(rows["predictor"] == "") & (rows["note"] != "")].groupby("note", sort=False):
        yield f"Not correlated in {', '.join(own['domain'])}: {note}."
    trending = {domain: _listed(_trending(rows[rows["domain"] == domain])) for domain in run.domains}
    for predictors, domains in _grouped({domain: names for domain, names in trending.items() if names}).items():
        yield (
            f"In {_listed(domains)} accuracy correlates strongly with {predictors} in the raw series only, not in the "
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
    title = re.split(r"[,:(]", title)[0].strip()
    return title[0].lower() + title[1:]


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


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
    for key, what in (
        ("skipped_updates", "updates were skipped"),
        ("samples_not_finite", "samples skipped because their routing was not finite"),
    ):
        if run.outcome.get(key):
            yield f"{run.outcome[key]:,} {what}."
