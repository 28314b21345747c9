"""Changes of phase with their evidence, in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moetrain.grokking.phase import LEAST_READINGS
from moetrain.grokking.wording import decimals
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
    shares = [run.setting(f"phase.{name}") for name in ("memorized", "memorized_answers")]
    bounds = {"loss": [run.setting("phase.steep"), 0.0], "deciding": shares}
    for event in reversed(run.events_of("phase")):
        evidence = [
            {
                **item,
                "shown": evidence_in_words(item, bounds.get(item["role"], [])),
                "title": evidence_title(item),
                "says": evidence_says(item),
            }
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


def evidence_in_words(item: dict[str, Any], bounds: Sequence[float] = ()) -> str:
    """A number of the evidence with its interval and unit.

    Args:
        bounds: thresholds that the rule may compare it with.
    """
    if item["value"] is None:
        few = item["role"] == "loss" and item["readings"] < LEAST_READINGS
        return f"no value: {item['readings']} of {LEAST_READINGS} readings" if few else "no value"
    values = [item["value"], *([] if item["low"] is None else [item["low"], item["high"]])]
    places = [_places(value, bounds) for value in values]
    if item["unit"] == "share":
        # The line through a few readings can fall by more than the loss itself has; that is no more than all of it.
        places = [max(n, int(abs(value) < 0.0995)) for n, value in zip(places, values, strict=True)]
        shown = [
            f"{min(value, 1.0):.{n}%}" if value >= -1 else "less than -100%"
            for n, value in zip(places, values, strict=True)
        ]
        what = " of the fall so far"
    else:
        percent = item["name"] in _AS_PERCENT
        shown = [f"{value:.{places[0]}%}" if percent else f"{value:.3g}" for value in values]
        what = ""
    ends = f" [{shown[1]}, {shown[2]}]" if len(shown) > 1 else ""
    return (shown[0] + ends).replace("-", "−") + what


def _places(share: float, bounds: Sequence[float]) -> int:
    """Decimals with which a percentage is on the same side of each bound as the share is."""
    return max((decimals(100 * share, 100 * bound) for bound in bounds), default=0)


def evidence_says(item: dict[str, Any]) -> str:
    """What a number of the evidence says for the verdict; empty where nothing rests on it."""
    if item["role"] == "loss":
        return "" if item["value"] is None else "falls" if item["vote"] > 0 else "does not count as falling"
    if item["role"] != "deciding" or item["value"] is None:
        return ""
    return {1: "carries over", -1: "memorized"}.get(item["vote"], "too uncertain")
