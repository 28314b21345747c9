"""What a run's records say, in words and tables: the verdict by domain, the controls, and what to be careful about."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

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

_ALIKE = 0.5  # of the change in samples trained on, what those never met must have moved to have moved alike
_STRONG = 0.7  # a correlation worth a warning when it is only the trend's
_UNUSED = 0.1  # share of a domain that is worth mentioning where it stays unused
_DEAD = 0.05  # share of a layer's experts


def metric(run: OpenedRun, domain: str, name: str) -> Number:
    """The newest value of a domain's metric."""
    rows = run.summary
    found = rows[(rows["domain"] == domain) & (rows["task"] == "") & (rows["metric"] == name)]
    return Number(*found[["value", "low", "high", "n"]].iloc[0]) if len(found) else NOTHING


@dataclass(frozen=True)
class DomainVerdict:
    """A row of the headline."""

    domain: str
    phase: str  # empty where the run does not judge phases
    phase_number: int
    since: float  # tokens (steps, where the run counts none) at which this phase began
    why: str
    loss_seen: Number
    loss_heldout: Number
    gap: Number
    gap_heldout: Number
    accuracy: Number
    chance: float
    trained_accuracy: Number


def verdicts(run: OpenedRun) -> list[DomainVerdict]:
    """The newest verdict of each domain with the numbers beside it."""
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
                why=changes[-1]["why"] if changes else "no change of phase so far" if number >= 0 else "",
                loss_seen=metric(run, domain, "loss/panel_seen"),
                loss_heldout=metric(run, domain, "loss/panel_heldout"),
                gap=metric(run, domain, "memorized/gap"),
                gap_heldout=metric(run, domain, "memorized/gap_heldout"),
                accuracy=held,
                chance=chance,
                trained_accuracy=trained,
            )
        )
    return found


def newest_accuracy(run: OpenedRun, domain: str, trained: bool) -> tuple[Number, float]:
    """Accuracy over a domain's items at the newest reading of the probes, and what chance gives."""
    rows = run.accuracy
    own = rows[(rows["domain"] == domain) & (rows["trained"] == trained)]
    if not len(own):
        return NOTHING, math.nan
    newest = own.iloc[-1]
    return Number(newest["accuracy"], newest["low"], newest["high"], newest["items"]), float(newest["chance"])


@dataclass(frozen=True)
class Control:
    """How a quantity moved in samples trained on and in samples never met, from the first reading of both on."""

    domain: str
    quantity: str
    seen: tuple[float, float]
    unmet: tuple[float, float]
    verdict: str

    @property
    def alike(self) -> bool:
        return self.verdict == "moved alike"


def controls(run: OpenedRun) -> list[Control]:
    """Beside each quantity of samples trained on, that of held-out samples of the same domain.

    Where both move alike, the change is not one of having been trained on these samples.
    """
    found = []
    for domain in run.domains:
        for row in table.METRICS:
            if not {SEEN, HELDOUT} <= set(row.cells):
                continue
            seen, unmet = (
                run.curve(f"{row.tag_on(cell)}/{domain}").set_index("step")["value"] for cell in (SEEN, HELDOUT)
            )
            both = seen.index.intersection(unmet.index)
            if len(both) < 2:
                continue
            own, other = ((float(s[both[0]]), float(s[both[-1]])) for s in (seen, unmet))
            moved, beside = own[1] - own[0], other[1] - other[0]
            sure = metric(run, domain, row.tag).half
            if not abs(moved) > sure:  # also where there is no interval
                verdict = "hardly moved"
            elif moved * beside > 0 and abs(beside) >= _ALIKE * abs(moved):
                verdict = "moved alike"
            else:
                verdict = "moved apart"
            found.append(Control(domain, row.title, own, other, verdict))
    return found


def warnings(run: OpenedRun) -> list[str]:
    """What has to be known before a number is quoted, each in a sentence; the most general first."""
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
            "its newest reading, and groups are paired only at its end."
        )


def _of_verdicts(run: OpenedRun) -> Iterator[str]:
    """Where what the router says and what the probes say do not go together."""
    for each in verdicts(run):
        if not each.accuracy:
            continue
        share = f"{plain(each.accuracy.value, 2)} of its probe items are right, chance {plain(each.chance, 2)}"
        if each.phase == "memorizing" and each.accuracy.low > each.chance:
            yield f"Verdict and probes disagree in {each.domain}: memorizing by its routing, but {share}."
        if each.phase in ("generalizing", "settled") and not each.accuracy.low > each.chance:
            yield f"Verdict and probes disagree in {each.domain}: {each.phase} by its routing, but {share}."


def _of_sizes(run: OpenedRun) -> Iterator[str]:
    sizes = {domain: metric(run, domain, "loss/panel_seen").n for domain in run.domains}
    few = [f"{domain} ({size:.0f})" for domain, size in sizes.items() if size < LEAST_CELL]
    if few:
        yield f"Fewer than {LEAST_CELL} samples trained on in the panel: {', '.join(few)}. Intervals are wide."
    none = [domain for domain, size in sizes.items() if not size > 0]
    if none and run.reading_steps:
        yield f"No panel sample trained on by now: {', '.join(none)}."
    if 0 < len(run.reading_steps) < LEAST_PANEL_READINGS:
        yield (
            f"Only {len(run.reading_steps)} readings of the panel, fewer than {LEAST_PANEL_READINGS}: too few for "
            "onsets and trends."
        )
    items = run.probes.groupby("task", observed=True)["item"].nunique()
    small = [f"{task} ({count})" for task, count in items.items() if count < ENOUGH]
    if small:
        yield f"Probes of fewer than {ENOUGH} items say little: {', '.join(small)}."
    readings = run.probes["step"].nunique()
    if 0 < readings < LEAST_READINGS:
        yield f"Only {readings} readings of the probes: below {LEAST_READINGS} nothing is correlated."


def _of_memorization(run: OpenedRun) -> Iterator[str]:
    without = [domain for domain, own in run.onsets.groupby("domain", sort=False) if not np.isfinite(own["eps"]).any()]
    if without:
        yield (
            "No threshold of the loss lets a fifth of the samples count as memorized by the paper's rule: "
            f"{', '.join(without)}. The gaps of loss say what there is of memorization."
        )
    gapless = [
        domain
        for domain in run.domains
        if metric(run, domain, "memorized/gap_heldout") and not metric(run, domain, "memorized/gap")
    ]
    if gapless:
        yield (
            f"No gap to samples still to come in {', '.join(gapless)}: no text there is first met in the last tenth of "
            "the run. The gap to held-out samples stands alone, which also holds how these differ in kind."
        )


def _of_controls(run: OpenedRun) -> Iterator[str]:
    quantities: dict[str, list[str]] = {}
    for each in controls(run):
        if each.alike:
            quantities.setdefault(each.domain, []).append(_within_a_sentence(each.quantity))
    for alike, domains in _grouped({domain: _listed(names) for domain, names in quantities.items()}).items():
        yield (
            f"Controls move alike in {_listed(domains)}: {alike} changed in held-out samples as in samples trained on, "
            "so the change does not come from having been trained on these."
        )
    noise = [domain for domain in run.domains if metric(run, domain, "pathway/individuality").low <= 0]
    if noise:
        yield (
            f"Individuality of {', '.join(noise)} is not told from 0: samples differ no more than halves of one "
            "sample, so distances of pathways measure sampling noise."
        )
    dead, experts = run.curve("experts/dead/worst")["value"], run.setting("model.num_experts")
    if len(dead) and dead.iloc[-1] >= _DEAD * experts:
        yield (
            f"{dead.iloc[-1]:.0f} of {experts} experts of a layer got no token since the point before: pathways "
            "shorten, and distances compare less with earlier ones."
        )


def _of_probes(run: OpenedRun) -> Iterator[str]:
    if not len(run.probes):
        yield "No probes were read: nothing here says whether benchmarks improve."
        return
    rows = run.correlations
    for note, own in rows[(rows["predictor"] == "") & (rows["note"] != "")].groupby("note", sort=False):
        yield f"Not correlated in {', '.join(own['domain'])}: {note}."
    trending = {domain: _listed(_trending(rows[rows["domain"] == domain])) for domain in run.domains}
    for predictors, domains in _grouped({domain: names for domain, names in trending.items() if names}).items():
        yield (
            f"In {_listed(domains)} accuracy correlates strongly with {predictors} in the raw series alone, not from "
            "reading to reading. Any two series that trend do as much."
        )


def _trending(rows: pd.DataFrame) -> list[str]:
    """Predictors of a domain whose rank correlation with accuracy is strong, while that of the changes may be none."""
    found = []
    for predictor, own in rows[rows["method"] == "spearman"].groupby("predictor", sort=False):
        by_series = own.set_index("series")
        changes = by_series.loc["differences"]
        if abs(by_series["value"]["raw"]) >= _STRONG and not (changes["low"] > 0 or changes["high"] < 0):
            found.append(_within_a_sentence(table.find(predictor).title))
    return found


def _grouped(said: dict[str, str]) -> dict[str, list[str]]:
    """What is said of domains, with those it is said of."""
    found: dict[str, list[str]] = {}
    for domain, what in said.items():
        found.setdefault(what, []).append(domain)
    return found


def _within_a_sentence(title: str) -> str:
    """A title without its remarks, beginning small."""
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
        yield f"Text that stays unused: {', '.join(unused)}."
    problems = run.events_of("guard")
    if problems:
        last = problems[-1]
        many = f"{len(problems)} problems were survived, the last" if len(problems) > 1 else "One problem was survived,"
        yield f"{many} at step {last['step']:,}: {last['problem']}."
    for key, what in (
        ("skipped_updates", "updates were skipped"),
        ("samples_not_finite", "samples left out as not finite"),
    ):
        if run.outcome.get(key):
            yield f"{run.outcome[key]:,} {what}."
