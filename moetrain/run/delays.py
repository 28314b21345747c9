"""How long generalization follows memorization: groups of training samples paired with groups of probe items.

For a finished run and by domain: panel samples memorized at one reading (``Pretrain@t*``) and items of the domain's
tasks generalized at one reading (``Test@t#``) are matched one to one by how alike their texts are (METRICS, section 4).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from moetrain import grokking
from moetrain.grokking import Delay, GroupPair
from moetrain.grokking.memorization import MIN_TAIL_IN_RUNS
from moetrain.probes.history import ProbeHistory
from moetrain.routing.panel_monitor import PanelMonitor

Embed = Callable[[Sequence[str]], np.ndarray]
"""Texts as vectors, [texts, width]."""


@dataclass(frozen=True)
class DomainDelay:
    """The pairs of a domain's groups, each with its delay, and the mean of these by items."""

    pairs: list[tuple[GroupPair, Delay]]
    mean: Delay | None
    note: str  # why there is no delay, or nothing

    def as_dict(self) -> dict[str, Any]:
        """As ``summary.json`` holds it; readings of the groups stand as the pair has them."""
        pairs = [{**asdict(pair), "delay": asdict(delay)} for pair, delay in self.pairs]
        return {"pairs": pairs, "mean": asdict(self.mean) if self.mean else None, "note": self.note}


def domain_delay(
    panel: PanelMonitor,
    history: ProbeHistory,
    number: int,
    sample_texts: Sequence[str],
    item_texts: dict[str, list[str]],
    embed: Embed,
) -> DomainDelay:
    """The delays of the domain of this number.

    Args:
        sample_texts: the texts of its seen panel samples, in the panel's order.
        item_texts: the texts of the items of its tasks, by task: those that are answered right or wrong.
        embed: called once, with all of these.
    """
    losses_ST = panel.losses(number)[1]
    if not losses_ST.size or not item_texts:
        return DomainDelay([], None, "no seen panel samples, or no task that is answered right or wrong")
    eps = grokking.choose_eps(losses_ST, min_tail=MIN_TAIL_IN_RUNS)
    if eps is None:
        return DomainDelay([], None, "fewer than a fifth of the seen samples were memorized, whatever the threshold")
    memorized = grokking.memorized_groups(losses_ST, eps, min_tail=MIN_TAIL_IN_RUNS)
    correct_IT = np.concatenate([history.correct(task) for task in item_texts])
    generalized = grokking.generalized_groups(correct_IT, min_tail=MIN_TAIL_IN_RUNS)
    if not generalized:
        return DomainDelay([], None, "no item was answered right from some reading on, with three to follow")
    texts = [*sample_texts, *(text for task in item_texts.values() for text in task)]
    vectors = embed(texts)
    pairs = grokking.pair_groups(memorized, generalized, vectors[: len(sample_texts)], vectors[len(sample_texts) :])
    times = panel.times, history.times
    return DomainDelay([(pair, grokking.delay(pair, *times)) for pair in pairs], grokking.mean_delay(pairs, *times), "")
