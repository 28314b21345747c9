"""What a run will be able to say of each domain, known before step 1: from its panel, its readings and its probes.

The phase rule needs documents trained on and others at each reading, and several readings (`moetrain.grokking.phase`).
Which of them there will be follows from the data order, so a verdict that cannot be had is told before it costs time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moetrain.config import Settings
from moetrain.grokking import Phase
from moetrain.grokking.correlation import LEAST_READINGS as LEAST_CORRELATED
from moetrain.grokking.memorization import LEAST_CELL
from moetrain.grokking.memorization import LEAST_READINGS as LEAST_ONSETS
from moetrain.grokking.phase import LEAST_READINGS
from moetrain.loggers.terminal import Terminal
from moetrain.monitoring.state import MonitorState
from moetrain.probes.tasks import Task
from moetrain.routing.answers import short_answers
from moetrain.routing.panel import HELDOUT, SEEN, TO_COME, Panel, reading_steps

COLUMNS = ("domain", "trained on", "not trained on", "readings", "answers", "probes", "can end as")
LEGEND = (
    "documents of the panel at the last reading, on which the verdict rests; readings: with documents enough of both "
    f"kinds; intervals are wide below {LEAST_CELL} documents"
)

_MARGIN = 1.2  # of a share of held-out documents that is to give enough of them: it is drawn by chance
_MOST_HELD_OUT = 0.5


@dataclass(frozen=True)
class DomainOutlook:
    """What a domain's verdict can rest on.

    Attributes:
        seen: documents of the panel trained on at the last reading.
        unseen: documents of the panel not trained on at the last reading.
        unseen_before: the most of them at an earlier reading: samples to come are trained on in the last tenth.
        readings: with documents enough for a verdict, up to the last; 0 if the last has too few.
        read: readings with a sample trained on.
        marked: samples trained on whose document marks an answer that is read.
        tasks: probe tasks of the domain.
        phases: that the last reading can have; never empty, undecided among them.
    """

    domain: str
    seen: int
    unseen: int
    unseen_before: int
    readings: int
    read: int
    marked: int
    tasks: int
    phases: tuple[Phase, ...]

    def row(self) -> list[str]:
        """The columns `COLUMNS`."""
        decided = [phase.name.lower() for phase in self.phases if phase]
        verdict = "any phase" if len(decided) == len(Phase) - 1 else " or ".join(decided) or "undecided only"
        return [
            self.domain,
            f"{self.seen:,}",
            f"{self.unseen:,}",
            f"{self.readings}",
            f"{self.marked:,} marked" if self.marked else "-",
            f"{self.tasks}" if self.tasks else "-",
            verdict,
        ]


def print_outlook(terminal: Terminal, monitor: MonitorState, steps: int, settings: Settings) -> None:
    """Print which verdict each domain can get if the run takes ``steps`` steps, and what verdicts and probes lack."""
    domains = list(settings.data.domains)
    if monitor.panel is None:
        terminal.note(no_panel(settings))
    else:
        found = outlooks(monitor.panel.panel, domains, monitor.tasks, steps, settings)
        terminal.table("verdicts", COLUMNS, [each.row() for each in found])
        terminal.note(LEGEND)
        for line in lacks(found, settings):
            terminal.note(line)
    for line in probe_lacks(monitor.tasks, domains, settings):
        terminal.note(line)


def outlooks(
    panel: Panel, domains: Sequence[str], tasks: Sequence[Task], steps: int, settings: Settings
) -> list[DomainOutlook]:
    """The outlook of each domain, if the run takes ``steps`` steps with ``panel.readings`` readings."""
    rule, found = settings.phase, []
    times = sorted(reading_steps(steps, settings.panel.readings))
    marked = short_answers(panel.stream)
    for number, domain in enumerate(domains):
        members = panel.members(number, SEEN, seen_by=steps)
        counts = [_documents(panel, number, step) for step in times]
        readings = 0
        for seen, unseen in reversed(counts):
            if seen < rule.documents or unseen < rule.documents:
                break
            readings += 1
        read = sum(seen > 0 for seen, _ in counts)
        phases = [Phase.UNDECIDED]
        if readings:
            phases += [Phase.LEARNING] if read >= LEAST_READINGS else []
            phases += [Phase.MEMORIZING, Phase.GENERALIZING]
            phases += [Phase.SETTLED] if readings > rule.window else []
        found.append(
            DomainOutlook(
                domain=domain,
                seen=counts[-1][0],
                unseen=counts[-1][1],
                unseen_before=max(unseen for _, unseen in counts),
                readings=readings,
                read=read,
                marked=int(marked[members].sum()),
                tasks=sum(task.domain == domain for task in tasks),
                phases=tuple(phases),
            )
        )
    return found


def _documents(panel: Panel, domain: int, step: int) -> tuple[int, int]:
    """Documents trained on by a step, and not trained on by it."""
    seen = panel.members(domain, SEEN, seen_by=step)
    to_come = panel.members(domain, TO_COME)
    unseen = np.concatenate([panel.members(domain, HELDOUT), to_come[panel.first_step[to_come] > step]])
    return len(np.unique(panel.samples.document[seen])), len(np.unique(panel.samples.document[unseen]))


def lacks(found: Sequence[DomainOutlook], settings: Settings) -> list[str]:
    """What the verdicts lack, a sentence for each kind of lack, with the remedy."""
    needed, lines = settings.phase.documents, []
    for each in found:
        tokens = settings.panel_tokens(each.domain)
        if each.seen < needed:
            lines.append(
                f"{each.domain}: no verdict: {each.seen} of {needed} documents of {tokens} tokens or more are first "
                "trained on in the run's first tenth: give more documents, or lower panel.tokens"
            )
        elif each.unseen < needed:
            before = f", {each.unseen_before} before the last tenth" if each.unseen_before >= needed else ""
            share = settings.data.heldout_share
            enough = share * needed / max(each.unseen, 1) * _MARGIN  # as many more as are missing, by the same drawing
            remedy = f"to about {enough:.2g}" if each.unseen and enough <= _MOST_HELD_OUT else "or give more documents"
            lines.append(
                f"{each.domain}: no verdict at the end: {each.unseen} of {needed} documents of {tokens} tokens or more "
                f"are held out{before}: raise data.heldout_share, now {share:g}, {remedy}"
            )
    short = [each for each in found if each.readings and Phase.SETTLED not in each.phases]
    if short:
        lines.append(
            f"{_names(short)}: not settled: that takes {settings.phase.window + 1} readings with documents enough: "
            f"raise panel.readings, now {settings.panel.readings}"
        )
    if settings.monitor.budget == "fixed" and settings.panel.readings < LEAST_ONSETS:
        lines.append(
            f"panel.readings={settings.panel.readings}: with fewer than {LEAST_ONSETS}, onsets of memorization are "
            "known only roughly"
        )
    without = [each for each in found if not each.marked]
    if without and len(without) < len(found):
        lines.append(f"{_names(without)}: no document marks an answer: no kernel/left_out")
    return lines


def probe_lacks(tasks: Sequence[Task], domains: Sequence[str], settings: Settings) -> list[str]:
    """What the probes lack: tasks of no domain with the setting that maps them, domains without one, readings."""
    lines = []
    for task in tasks:
        if task.domain not in domains:
            lines.append(
                f"{task.name} is of {task.domain}, which is no domain of this run, and stands alone: map it with "
                f"{_mapping(task.name, domains[0])}" + (f" (or {', '.join(domains[1:])})" if domains[1:] else "")
            )
    if without := [domain for domain in domains if all(task.domain != domain for task in tasks)]:
        lines.append(f"{', '.join(without)}: no probe: no accuracy, no correlations, no delay")
    if tasks and settings.monitor.budget == "fixed" and settings.probes.readings < LEAST_CORRELATED:
        lines.append(
            f"probes.readings={settings.probes.readings}: with fewer than {LEAST_CORRELATED} nothing is correlated"
        )
    return lines


def _mapping(task: str, domain: str) -> str:
    """The override that counts a task to a domain; a name with a dot would be a key inside another."""
    return f"probes.task_domains.{task}={domain}" if "." not in task else f"'probes.task_domains={{{task}: {domain}}}'"


def no_panel(settings: Settings) -> str:
    """Why a run without a panel gives no verdict, and what helps."""
    if not settings.monitor.enabled:
        return "no verdicts: monitor.enabled=false"
    if not settings.model.recorded_experts:
        return "no verdicts: model.experts=dense has no router, so there is no panel: set model.dense_experts"
    return "no verdicts: no text is long enough for the panel: lower panel.tokens"


def _names(found: Sequence[DomainOutlook]) -> str:
    return ", ".join(each.domain for each in found)
