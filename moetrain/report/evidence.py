"""Changes of phase with their evidence, in words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moetrain.grokking.phase import LEAST_READINGS
from moetrain.metrics import table
from moetrain.report.page import time_of

if TYPE_CHECKING:
    from moetrain.report.open_run import OpenedRun

_FALLS = {
    "loss_seen": "Fall of the loss of samples trained on",
    "loss_unseen": "Fall of the loss of samples not trained on",
}
_AS_PERCENT = ("share",)  # evidence that the reasons of verdicts state in percent


def phase_changes(run: OpenedRun) -> dict[str, list[dict[str, Any]]]:
    """Changes of phase per domain, the newest first, each with its time and its evidence."""
    found: dict[str, list[dict[str, Any]]] = {domain: [] for domain in run.domains}
    for event in reversed(run.events_of("phase")):
        evidence = [
            {**item, "shown": evidence_in_words(item), "title": evidence_title(item), "says": evidence_says(item)}
            for item in event["evidence"]
        ]
        at = float(time_of(run, [event["step"]])[0])
        found.setdefault(event["domain"], []).append({**event, "evidence": evidence, "at": at})
    return {domain: changes for domain, changes in found.items() if changes}


def evidence_title(item: dict[str, Any]) -> str:
    """What the report calls a number of a verdict's evidence."""
    name = item["name"]
    if item["unit"] == "share":
        return _FALLS.get(name, name)
    return next((metric.title for metric in table.METRICS if metric.name == name), name)


def evidence_in_words(item: dict[str, Any]) -> str:
    """A number of the evidence with its interval and unit."""
    if item["value"] is None:
        few = item["role"] == "loss" and item["readings"] < LEAST_READINGS
        return f"no value: {item['readings']} of {LEAST_READINGS} readings" if few else "no value"
    values = [item["value"], *([] if item["low"] is None else [item["low"], item["high"]])]
    if item["unit"] == "share":
        # The line through a few readings can fall by more than the loss itself has; that is no more than all of it.
        shown = [_as_share(min(value, 1.0)) if value >= -1 else "less than -100%" for value in values]
        what = " of the fall so far"
    else:
        form = "{:.0%}" if item["name"] in _AS_PERCENT else "{:.3g}"
        shown, what = [form.format(value) for value in values], ""
    ends = f" [{shown[1]}, {shown[2]}]" if len(shown) > 1 else ""
    return (shown[0] + ends).replace("-", "−") + what


def _as_share(value: float) -> str:
    """In percent, with a decimal where a share of a few percent decides."""
    return f"{value:.0%}" if abs(value) >= 0.0995 else f"{value:.1%}"


def evidence_says(item: dict[str, Any]) -> str:
    """What a number of the evidence says for the verdict; empty where nothing rests on it."""
    if item["role"] == "loss":
        return "" if item["value"] is None else "falls" if item["vote"] > 0 else "does not count as falling"
    if item["role"] != "deciding" or item["value"] is None:
        return ""
    return {1: "carries over", -1: "memorized"}.get(item["vote"], "too uncertain")
