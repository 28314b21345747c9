"""How long generalization follows memorization: groups of training samples paired with groups of probe items.

For a finished run and per domain: panel samples memorized at one reading (``Pretrain@t*``) and items of the domain's
tasks generalized at one reading (``Test@t#``) are matched one to one by the similarity of their texts (METRICS,
section 4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from moetrain import grokking
from moetrain.config import Settings
from moetrain.data.corpus import Corpus
from moetrain.data.items import Item
from moetrain.distributed.mesh import ParallelLayout
from moetrain.grokking import Delay, GroupPair
from moetrain.grokking.memorization import MIN_TAIL_IN_RUNS
from moetrain.metrics.correlations import NO_TASKS
from moetrain.models.transformer import Transformer
from moetrain.monitoring.state import MonitorState
from moetrain.probes.embeddings import item_text, mean_hidden_states, sentence_encoder
from moetrain.routing.panel import SEEN, Panel


@dataclass(frozen=True)
class DomainDelay:
    """The pairs of a domain's groups, each with its delay, and their mean weighted by items.

    Without pairs, ``note`` says why.
    """

    pairs: list[tuple[GroupPair, Delay]]
    mean: Delay | None
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        """As ``summary.json`` holds it; the readings of the groups are numbers of readings."""
        pairs = [{**asdict(pair), "delay": asdict(delay)} for pair, delay in self.pairs]
        return {"pairs": pairs, "mean": asdict(self.mean) if self.mean else None, "note": self.note}


def delays(
    model: Transformer | None, state: MonitorState, settings: Settings, corpus: Corpus, layout: ParallelLayout
) -> dict[str, DomainDelay]:
    """Per domain, how long generalization followed memorization in a finished run; empty without panel or probes.

    Args:
        model: the newest; its mean hidden states embed the texts, unless ``probes.embeddings`` names an encoder. None
            where it could not be read: then no groups are paired.
    """
    if state.panel is None or state.probes is None or state.correlations is None:
        return {}

    def embed(panel: Panel, members: np.ndarray, items: Sequence[Item]) -> np.ndarray:
        """Vectors of panel members and of probe items with their right answer, [members + items, width]."""
        tokens = [panel.stream.sequence(member)[1:-1].tolist() for member in members]
        texts = [item_text(item) for item in items]
        if settings.probes.embeddings is not None:
            encode = sentence_encoder(settings.probes.embeddings)
            return encode([*map(corpus.tokenizer.decode, tokens), *texts])
        assert model is not None
        tokens += corpus.tokenizer.encode_all(texts)
        return mean_hidden_states(model, tokens, corpus.tokenizer, layout, settings.data.seq_len)

    found = {}
    for number, domain in enumerate(settings.data.domains):
        losses_ST = state.panel.losses(number)[1]
        tasks = state.correlations.tasks(domain)
        if not losses_ST.size or not tasks:
            note = NO_TASKS if losses_ST.size else "no panel sample is trained on early"
            found[domain] = DomainDelay([], None, note)
            continue
        accuracy_T, chance, count = state.correlations.accuracy(domain)
        correct_IT = np.concatenate([state.probes.history.correct(task.name) for task in tasks])
        groups = _groups(losses_ST, state.panel.delta, accuracy_T, chance, count, correct_IT)
        if model is None and settings.probes.embeddings is None:
            groups = "the newest model could not be read: no texts were embedded to pair groups by"
        if isinstance(groups, str):
            found[domain] = DomainDelay([], None, groups)
            continue
        memorized, generalized = groups
        items = [item for task in tasks for item in task.items]
        vectors = embed(state.panel.panel, state.panel.panel.members(number, SEEN), items)
        samples = losses_ST.shape[0]
        pairs = grokking.pair_groups(memorized, generalized, vectors[:samples], vectors[samples:])
        times = state.panel.times, state.probes.history.times
        each = [(pair, grokking.delay(pair, *times)) for pair in pairs]
        found[domain] = DomainDelay(each, grokking.mean_delay(pairs, *times))
    return found


Groups = dict[int, np.ndarray]
"""Members per reading."""


def _groups(
    losses_ST: np.ndarray, delta: float, accuracy_T: np.ndarray, chance: float, items: int, correct_IT: np.ndarray
) -> tuple[Groups, Groups] | str:
    """Samples memorized and items generalized, each per reading; a sentence where there are none."""
    if grokking.first_above_chance(accuracy_T, chance, items) is None:
        return "accuracy did not exceed chance: which items are right is luck"
    eps = grokking.choose_eps(losses_ST, delta=delta, min_tail=MIN_TAIL_IN_RUNS)
    if eps is None:
        return "fewer than a fifth of the seen samples were memorized, whatever the threshold"
    generalized = grokking.generalized_groups(correct_IT, min_tail=MIN_TAIL_IN_RUNS)
    if not generalized:
        return "no item was answered right from some reading on, with three to follow"
    return grokking.memorized_groups(losses_ST, eps, delta, MIN_TAIL_IN_RUNS), generalized
