"""Greedy answers to open questions, and whether they match the target exactly.

There is no cache of keys and values: each new token costs a forward pass over the whole sequence. For short answers.

Shapes: K sequences of a batch, R sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from moetrain.data.items import Item
from moetrain.data.tokenizer import Tokenizer
from moetrain.distributed.mesh import ParallelLayout
from moetrain.models.transformer import Transformer
from moetrain.probes.requests import Request, equal_passes, pack_requests, scored_hidden_states
from moetrain.probes.tasks import Task


def is_generated(task: Task) -> bool:
    """Whether a task's answers are generated: open questions with short answers and without worked solutions."""
    return task.kind == "open" and not any("solution" in item for item in task.items)


def is_exact(text: str, item: Item) -> bool:
    """Whether the first line of a generated text is the target, up to surrounding white space and a final full stop."""
    lines = text.strip().splitlines()
    return bool(lines) and _normalized(lines[0]) == _normalized(item["target"])


def _normalized(text: str) -> str:
    return text.strip().removesuffix(".").rstrip()


@torch.no_grad()
def generate(
    model: Transformer,
    prompts: Sequence[np.ndarray],
    tokenizer: Tokenizer,
    layout: ParallelLayout,
    context_tokens: int,
    batch_tokens: int,
    max_new_tokens: int,
) -> list[str]:
    """The greedy continuation of each prompt as text, up to the end mark, a full line, or ``max_new_tokens``.

    Args:
        prompts: token ids with the beginning mark.
        context_tokens: longest input of the model; longer ones are cut from the left, after the beginning mark.
        batch_tokens: approximate tokens of one forward pass.
    """
    sequences = [prompt.astype(np.int32) for prompt in prompts]
    answers = [""] * len(sequences)
    unfinished = list(range(len(sequences)))
    for _ in range(max_new_tokens):
        if not layout.passes(len(unfinished)):
            break
        inputs = [_cut(sequences[r], context_tokens) for r in unfinished]
        new_tokens = _next_tokens(model, inputs, tokenizer.end_id, layout, batch_tokens).tolist()
        still_unfinished = []
        for r, token in zip(unfinished, new_tokens, strict=True):
            if token != tokenizer.end_id:
                sequences[r] = np.append(sequences[r], np.int32(token))
                answers[r] = tokenizer.decode(sequences[r][len(prompts[r]) :].tolist())
                if "\n" not in answers[r].lstrip():
                    still_unfinished.append(r)
        unfinished = still_unfinished
    return answers


def _cut(sequence: np.ndarray, most: int) -> np.ndarray:
    return sequence if len(sequence) <= most else np.concatenate([sequence[:1], sequence[len(sequence) - most + 1 :]])


def _next_tokens(
    model: Transformer, sequences: Sequence[np.ndarray], end_id: int, layout: ParallelLayout, batch_tokens: int
) -> np.ndarray:
    """The most probable token after each sequence, int64 [R]; of equally probable ones, the smallest id."""
    # The end mark is a placeholder for the token to predict, the only one that is scored.
    requests = [Request(np.append(sequence, np.int32(end_id)), first=len(sequence)) for sequence in sequences]
    found = np.zeros(len(requests), np.int64)
    for batch, own in equal_passes(pack_requests(requests, end_id, batch_tokens), layout, end_id):
        hidden_KD = scored_hidden_states(model, batch)
        if own:
            logits_KV = hidden_KD @ model.lm_head.weight.float().T  # in float32: in bf16 the largest are often equal
            found[batch.requests] = logits_KV.argmax(-1).cpu().numpy()
    return found
