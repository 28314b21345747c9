"""How long generalization follows memorization: groups of training samples paired with groups of probe items.

For a finished run and by domain: panel samples memorized at one reading (``Pretrain@t*``) and items of the domain's
tasks generalized at one reading (``Test@t#``) are matched one to one by how alike their texts are (METRICS, section 4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
from torch import nn

from moetrain import grokking
from moetrain.config import Settings
from moetrain.data.corpus import Corpus
from moetrain.data.items import Item
from moetrain.distributed.mesh import ParallelLayout
from moetrain.distributed.sharding import inner_model
from moetrain.grokking import Delay, GroupPair
from moetrain.grokking.memorization import MIN_TAIL_IN_RUNS
from moetrain.probes.embeddings import item_text, mean_hidden_states, sentence_encoder
from moetrain.probes.probe_monitor import BATCH_TOKENS, ProbeMonitor
from moetrain.routing.panel import SEEN
from moetrain.routing.panel_monitor import PanelMonitor


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


class Watched(Protocol):
    """A run that has ended, or a series of saved models that was read."""

    @property
    def settings(self) -> Settings: ...

    @property
    def corpus(self) -> Corpus: ...

    @property
    def panel(self) -> PanelMonitor | None: ...

    @property
    def probes(self) -> ProbeMonitor | None: ...

    @property
    def model(self) -> nn.Module | None: ...

    @property
    def layout(self) -> ParallelLayout: ...


def delays(run: Watched) -> dict[str, DomainDelay]:
    """By domain, how long generalization followed memorization in a run that has ended."""
    if run.panel is None or run.probes is None:
        return {}
    return {name: _domain_delay(run, number) for number, name in enumerate(run.settings.data.domains)}


def _domain_delay(run: Watched, number: int) -> DomainDelay:
    assert run.panel is not None
    assert run.probes is not None
    panel, history = run.panel, run.probes.history
    losses_ST = panel.losses(number)[1]
    tasks = run.probes.relations.tasks(panel.domains[number])
    if not losses_ST.size or not tasks:
        return DomainDelay([], None, "no seen panel samples, or no task that is answered right or wrong")
    accuracy_T, chance, items = run.probes.relations.accuracy(panel.domains[number])
    if grokking.first_above_chance(accuracy_T, chance, items) is None:
        return DomainDelay([], None, "accuracy did not exceed chance: which items are right is luck")
    eps = grokking.choose_eps(losses_ST, min_tail=MIN_TAIL_IN_RUNS)
    if eps is None:
        return DomainDelay([], None, "fewer than a fifth of the seen samples were memorized, whatever the threshold")
    memorized = grokking.memorized_groups(losses_ST, eps, min_tail=MIN_TAIL_IN_RUNS)
    correct_IT = np.concatenate([history.correct(task.name) for task in tasks])
    generalized = grokking.generalized_groups(correct_IT, min_tail=MIN_TAIL_IN_RUNS)
    if not generalized:
        return DomainDelay([], None, "no item was answered right from some reading on, with three to follow")
    vectors = _embeddings(run, panel.panel.members(number, SEEN), [item for task in tasks for item in task.items])
    samples = losses_ST.shape[0]
    pairs = grokking.pair_groups(memorized, generalized, vectors[:samples], vectors[samples:])
    times = panel.times, history.times
    found = [(pair, grokking.delay(pair, *times)) for pair in pairs]
    return DomainDelay(found, grokking.mean_delay(pairs, *times), "")


def _embeddings(run: Watched, members: np.ndarray, items: Sequence[Item]) -> np.ndarray:
    """Vectors of panel members and of probe items, the right answer with each, [members + items, width]."""
    assert run.panel is not None
    stream, tokenizer = run.panel.panel.stream, run.corpus.tokenizer
    tokens = [stream.sequence(member)[1:-1].tolist() for member in members]
    texts = [item_text(item) for item in items]
    if run.settings.probes.embeddings is not None:
        encode = sentence_encoder(run.settings.probes.embeddings)
        return encode([*map(tokenizer.decode, tokens), *texts])
    tokens += tokenizer.encode_all(texts)
    seq_len = run.settings.data.seq_len
    assert run.model is not None
    return mean_hidden_states(inner_model(run.model), tokens, tokenizer, run.layout.device, seq_len, BATCH_TOKENS)
