"""Which benchmark items look like training text: Min-K%++ scores of whole items by a model (the paper's filter)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from moetrain.data.items import Item
from moetrain.data.tokenizer import Tokenizer
from moetrain.distributed.mesh import ParallelLayout
from moetrain.grokking import likely_members, min_k_plus_plus
from moetrain.grokking.membership import SHARE_OF_TOKENS, SHARE_REMOVED
from moetrain.models.loss import log_probabilities, prediction_statistics
from moetrain.models.transformer import Transformer
from moetrain.probes.embeddings import item_text
from moetrain.probes.requests import BATCH_TOKENS, Request, equal_passes, pack_requests, scored_hidden_states
from moetrain.probes.tasks import Task


@torch.no_grad()
def membership_scores(
    model: Transformer,
    items: Sequence[Item],
    tokenizer: Tokenizer,
    context_tokens: int,
    share: float = SHARE_OF_TOKENS,
    batch_tokens: int = BATCH_TOKENS,
) -> np.ndarray:
    """Min-K%++ score of each item's text, its prompt with the right answer, by a model on one rank; float64 [I].

    Args:
        context_tokens: longest input of the model; a longer text is cut from the right.
        share: of the tokens of an item that its score is the mean over, those with the lowest.
        batch_tokens: approximate tokens of one forward pass.
    """
    layout = ParallelLayout(device=model.lm_head.weight.device)
    encoded = tokenizer.encode_all([item_text(item) for item in items])
    requests = [
        Request(np.array([tokenizer.begin_id, *text[: context_tokens - 1]], np.int32), first=1) for text in encoded
    ]
    scores_I = np.full(len(requests), np.nan)
    batches = pack_requests(requests, tokenizer.end_id, batch_tokens)
    for batch, _ in equal_passes(batches, layout, tokenizer.end_id):
        hidden_KD = scored_hidden_states(model, batch).to(model.dtype)
        head_VD = model.lm_head.weight.to(model.dtype)
        log_probs_K, _ = log_probabilities(hidden_KD, head_VD, batch.targets_K)
        means_K, deviations_K = prediction_statistics(hidden_KD, head_VD)
        ends = np.cumsum(batch.counts)
        for request, start, end in zip(batch.requests, ends - batch.counts, ends, strict=True):
            own = slice(start, end)
            scores_I[request] = min_k_plus_plus(log_probs_K[own], means_K[own], deviations_K[own], share)
    return scores_I


def without_members(
    model: Transformer,
    tasks: Sequence[Task],
    tokenizer: Tokenizer,
    context_tokens: int,
    removed: float = SHARE_REMOVED,
) -> tuple[list[Task], dict[str, list[str]]]:
    """The tasks without the share of each task's items that most look like training text, and the ids of those."""
    kept, dropped = [], {}
    for task in tasks:
        scores_I = membership_scores(model, task.items, tokenizer, context_tokens)
        member_I = likely_members(scores_I, removed)
        items = tuple(item for item, out in zip(task.items, member_I, strict=True) if not out)
        dropped[task.name] = [str(item["id"]) for item, out in zip(task.items, member_I, strict=True) if out]
        kept.append(Task(task.name, task.domain, task.kind, items, task.trained, task.available, task.contaminated))
    return kept, dropped
