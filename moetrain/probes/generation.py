"""Greedy answers to open questions, and whether they are the target exactly.

The model keeps no keys and values of what it has read, so each new token costs a pass over all that stands before it:
meant for short answers.

Shapes: K sequences of a batch, R sequences.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from moetrain.data.items import Item
from moetrain.data.tokenizer import Tokenizer
from moetrain.distributed.mesh import ParallelLayout
from moetrain.models.transformer import Transformer
from moetrain.probes.requests import Request, batch_hidden_states, pack_requests
from moetrain.probes.tasks import Task


def is_generated(task: Task) -> bool:
    """Whether a task's answers can be generated: they are short, and not worked out at length first."""
    return task.kind == "open" and not any("solution" in item for item in task.items)


def is_exact(text: str, item: Item) -> bool:
    """Whether a generated text's first line is the target, white space around it and a final full stop aside."""
    lines = text.strip().splitlines()
    return bool(lines) and _bare(lines[0]) == _bare(item["target"])


def _bare(text: str) -> str:
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
    """The likeliest next tokens after each prompt as text, up to the end mark, a full line, or ``max_new_tokens``.

    Args:
        prompts: token ids with the beginning mark.
        context_tokens: tokens that the model reads at most; more are cut from the left, behind the beginning mark.
        batch_tokens: tokens of one forward pass, about.
    """
    sequences = [prompt.astype(np.int32) for prompt in prompts]
    answers = [""] * len(sequences)
    unfinished = list(range(len(sequences)))
    for _ in range(max_new_tokens):
        if not unfinished:
            break
        read = [_cut(sequences[r], context_tokens) for r in unfinished]
        found = _next_tokens(model, read, tokenizer.end_id, layout, batch_tokens).tolist()
        going_on = []
        for r, token in zip(unfinished, found, strict=True):
            if token != tokenizer.end_id:
                sequences[r] = np.append(sequences[r], np.int32(token))
                answers[r] = tokenizer.decode(sequences[r][len(prompts[r]) :].tolist())
                if "\n" not in answers[r].lstrip():
                    going_on.append(r)
        unfinished = going_on
    return answers


def _cut(sequence: np.ndarray, most: int) -> np.ndarray:
    return sequence if len(sequence) <= most else np.concatenate([sequence[:1], sequence[len(sequence) - most + 1 :]])


def _next_tokens(
    model: Transformer, sequences: Sequence[np.ndarray], end_id: int, layout: ParallelLayout, batch_tokens: int
) -> np.ndarray:
    """The likeliest token after each sequence, int64 [R]; of two as likely, the first."""
    # The end mark stands for the token to come, which is all that is looked at.
    requests = [Request(np.append(sequence, np.int32(end_id)), len(sequence), 0, 0, False) for sequence in sequences]
    found = np.zeros(len(requests), np.int64)
    for batch in pack_requests(requests, end_id, batch_tokens):
        hidden_KD = batch_hidden_states(model, batch.to(layout.device)).index_select(
            0, batch.scored_K.to(layout.device)
        )
        logits_KV = (hidden_KD.to(model.dtype) @ model.lm_head.weight.to(model.dtype).T).float()
        found[batch.requests] = logits_KV.argmax(-1).cpu().numpy()
    return found
