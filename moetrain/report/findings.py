"""Findings in words and tables: the verdict per domain, and the controls."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from moetrain import grokking
from moetrain.grokking import Phase, PhaseThresholds, Verdict
from moetrain.metrics import table
from moetrain.metrics.cell import HELDOUT, SEEN, TO_COME
from moetrain.report.history import history_of
from moetrain.report.page import NOTHING, Number, time_of

if TYPE_CHECKING:
    from moetrain.report.open_run import OpenedRun

_SHARED = 0.5  # held-out samples share a change if they change by at least this fraction of it


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
    step: int  # of the newest reading
    why: str  # by the newest reading
    panel: str  # how many samples of how many documents the numbers are over
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
                step=int(phase["step"].iloc[-1]) if len(phase) else 0,
                why=_reason(run, domain) if number >= 0 else "",
                panel=panel_in_words(run, domain),
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


def _reason(run: OpenedRun, domain: str) -> str:
    """Why the domain has its phase, by the newest reading: as the run says at its end, or from its readings so far."""
    said = run.outcome.get("domains", {}).get(domain, {}).get("why")
    if said:
        return str(said)
    verdict = verdict_now(run, domain)
    return "the panel's readings are not stored, so the reason is not known" if verdict is None else verdict.why


def verdict_now(run: OpenedRun, domain: str) -> Verdict | None:
    """The verdict at the newest reading, from the stored readings; None without any."""
    steps = run.reading_steps
    if not len(steps):
        return None
    import pandas as pd

    curves = (run.loss_curves, run.left_out.assign(metric="kernel/left_out"))
    own = pd.concat([each[each["domain"] == domain] for each in curves], ignore_index=True)
    thresholds = PhaseThresholds(**{each.name: run.setting(f"phase.{each.name}") for each in fields(PhaseThresholds)})
    return grokking.phases(history_of(own, steps), thresholds)[-1]


def newest_panel(run: OpenedRun, domain: str) -> dict[str, tuple[int, int]]:
    """Samples and documents of each cell of a domain's panel at the newest reading; those trained on by then."""
    if not run.reading_steps:
        return {}
    step = run.reading_steps[-1]
    own = run.panel[(run.panel["step"] == step) & (run.panel["domain"] == domain)]
    trained = own["first_step"].between(1, step)
    cells = {
        "trained on": own[trained & (own["cell"] == SEEN)],
        "to come": own[own["cell"] == TO_COME],
        "held out": own[own["cell"] == HELDOUT],
    }
    return {name: (len(rows), rows["document"].nunique()) for name, rows in cells.items()}


def panel_in_words(run: OpenedRun, domain: str) -> str:
    """How many samples of how many documents a domain's numbers are over; empty without a panel."""
    parts = []
    for cell, (samples, documents) in newest_panel(run, domain).items():
        each = "sample" if samples == 1 else "samples"
        if not samples:
            parts.append(f"no sample {cell}")
        elif samples == documents:
            parts.append(f"{samples} {each} {cell}")
        else:
            parts.append(f"{samples} {each} of {documents} {'document' if documents == 1 else 'documents'} {cell}")
    return ", ".join(parts)


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
            half = metric(run, domain, row.tag).half
            if not math.isfinite(half):
                verdict = "no interval"
            elif abs(change) <= half:
                verdict = "no clear change"
            elif change * heldout_change > 0 and abs(heldout_change) >= _SHARED * abs(change):
                verdict = "same change"
            else:
                verdict = "different change"
            found.append(Control(domain, row.title, own, other, verdict))
    return found
