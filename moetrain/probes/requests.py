"""Requests: texts of which the model scores the last part, encoded once and packed into batches that never change.

Choices of one token, and an answer that is also a choice, are predicted from the same tokens: a request whose tokens
begin those of another is read with it, once. Attention is causal, so what follows does not affect its score.

Shapes: N tokens of a batch, D hidden size, K scored tokens of a batch, R requests, X texts that are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from moetrain.data.instructions import Example
from moetrain.data.tokenizer import Tokenizer
from moetrain.device_transfer import to_device
from moetrain.distributed.mesh import ParallelLayout
from moetrain.model_input import PackedTokens
from moetrain.models.transformer import Transformer

BATCH_TOKENS = 4096  # approximate tokens of a forward pass over probe items
_MULTIPLE = 64  # batch sizes are rounded up to it, so that shapes, and with them kernels, repeat


def split_prompt(prompt: str, answer: str) -> tuple[str, str]:
    """(context, continuation) as in lm-evaluation-harness: trailing white space of the prompt moves to the answer."""
    context = prompt.rstrip()
    return context, prompt[len(context) :] + answer


@dataclass(frozen=True)
class Request:
    """A text whose tokens from ``first`` on are scored."""

    tokens: np.ndarray  # int32: the beginning mark and the text, cut from the left to the model's context
    first: int  # index of the first scored token, 1 or more
    characters: int = 0  # of the answer (of what is left of it, if the answer itself was cut)
    bytes_: int = 0
    cut: bool = False

    @property
    def read(self) -> int:
        """Number of tokens that the model reads: all but the last."""
        return len(self.tokens) - 1

    @property
    def scored(self) -> int:
        """Number of scored tokens."""
        return len(self.tokens) - self.first


def make_requests(examples: Sequence[Example], tokenizer: Tokenizer, context_tokens: int) -> list[Request]:
    """Encode prompts with answers as lm-evaluation-harness does.

    Prompt and answer are encoded as one text; its tokens beyond the number of tokens of the context alone are scored.
    Where the end of the prompt and the answer are one token, so that none are left, the tokens with the answer are.

    Args:
        context_tokens: the longest sample that the model was trained on. Longer texts are cut from the left.
    """
    splits = [split_prompt(prompt, sep + answer) for prompt, sep, answer in examples]
    texts = list(dict.fromkeys(text for context, rest in splits for text in (context, context + rest)))
    encoded = dict(zip(texts, tokenizer.encode_all(texts), strict=True))
    token_bytes = tokenizer.token_bytes()
    requests = []
    for (context, rest), (_, _, answer) in zip(splits, examples, strict=True):
        ids = encoded[context + rest]
        first = len(encoded[context])
        if first >= len(ids):
            first = tokenizer.span(context + rest, ids, len(context), len(context + rest))[0]
        kept = ids[-context_tokens:]
        lost = len(ids) - len(kept)
        characters, bytes_ = len(answer), len(answer.encode())
        if lost > first:
            characters, bytes_ = len(tokenizer.decode(kept)), int(token_bytes[kept].sum())
        tokens = np.array([tokenizer.begin_id, *kept], np.int32)
        requests.append(Request(tokens, 1 + max(0, first - lost), characters, bytes_, lost > 0))
    return requests


@dataclass(frozen=True)
class RequestBatch:
    """Requests packed into one row, each text that is read a sample of its own."""

    tokens_N: torch.Tensor  # int64, padded with the end mark
    positions_N: torch.Tensor  # int64, from 0 in each request
    slots_N: torch.Tensor  # int64, 0 for a token of a text, -1 for padding
    spans_X2: torch.Tensor  # int64 on the CPU: (start, length) of each text, and of the padding
    scored_K: torch.Tensor  # int64, the tokens from which the scored tokens are predicted
    targets_K: torch.Tensor  # int64, the scored tokens
    requests: np.ndarray  # int64 [requests of the batch], their numbers
    counts: np.ndarray  # int64 [requests of the batch], scored tokens of each, 1 or more

    def to(self, device: torch.device) -> RequestBatch:
        """The batch with the model's inputs on ``device``."""
        moved = {
            f.name: to_device(getattr(self, f.name), device) for f in fields(self) if f.name.endswith(("_N", "_K"))
        }
        return RequestBatch(**moved, spans_X2=self.spans_X2, requests=self.requests, counts=self.counts)


def pack_requests(requests: Sequence[Request], padding: int, batch_tokens: int) -> list[RequestBatch]:
    """Batches of about ``batch_tokens`` tokens each, of texts of similar length.

    Texts are sorted by length, so that attention needs little padding, and spread evenly over the smallest number of
    batches. The other requests of a batch do not affect a request's score.
    """
    texts = sorted(_read_together(requests), key=lambda members: -requests[members[0]].read)
    lengths = np.array([requests[members[0]].read for members in texts], np.int64)
    total = int(lengths.sum())
    share = total / max(1, -(-total // batch_tokens))
    # The middle of a text decides its batch, so a batch exceeds its share by less than one text.
    part = (np.cumsum(lengths) - lengths / 2) // share if total else lengths
    chosen = [[texts[x] for x in np.flatnonzero(part == number)] for number in np.unique(part)]
    return [_batch(requests, members, padding) for members in chosen]


def _read_together(requests: Sequence[Request]) -> list[list[int]]:
    """Numbers of the requests that are read by one text each: the first is the text, the others begin it.

    Texts are in the order of their first request.
    """
    keys = [request.tokens[:-1].astype(">u4").tobytes() for request in requests]
    groups: list[list[int]] = []
    following = b""
    # In lexicographic order, what begins a text stands before it, and all between the two begin with it too.
    for number in sorted(range(len(requests)), key=lambda r: (keys[r], -r), reverse=True):
        if not (groups and following.startswith(keys[number])):
            groups.append([])
        groups[-1].append(number)
        following = keys[number]
    return sorted(groups, key=min)


def equal_passes(
    batches: Sequence[RequestBatch], layout: ParallelLayout, end_id: int
) -> Iterator[tuple[RequestBatch, bool]]:
    """The batches on the layout's device, each with True; then those to pass through the model without use, with False.

    There are such where the model is sharded and another rank has more batches. Then this is a collective.
    """
    for number in range(layout.passes(len(batches))):
        layout.progress.mark()
        own = number < len(batches)
        batch = batches[number] if own else pack_requests([Request(np.array([end_id, end_id]), first=1)], end_id, 1)[0]
        yield batch.to(layout.device), own


def batch_hidden_states(model: Transformer, batch: RequestBatch) -> torch.Tensor:
    """Final hidden states of a batch, float32 [N, D]. No routing is recorded."""
    inputs = PackedTokens(
        tokens_BT=batch.tokens_N[None],
        targets_BT=None,
        positions_BT=batch.positions_N[None],
        slots_BT=batch.slots_N[None],
        recorded_BT=torch.full_like(batch.tokens_N, -1)[None],
        spans_N2=batch.spans_X2,
    )
    return model.hidden_states(inputs)[0]


def scored_hidden_states(model: Transformer, batch: RequestBatch) -> torch.Tensor:
    """Final hidden states from which the scored tokens of a batch are predicted, float32 [K, D]."""
    return batch_hidden_states(model, batch).index_select(0, batch.scored_K)


def _batch(requests: Sequence[Request], texts: Sequence[Sequence[int]], padding: int) -> RequestBatch:
    size = -(-sum(requests[members[0]].read for members in texts) // _MULTIPLE) * _MULTIPLE
    tokens, positions, slots = np.full(size, padding, np.int64), np.zeros(size, np.int64), np.full(size, -1, np.int64)
    spans, scored, targets = [], [], []
    start = 0
    for members in texts:
        text = requests[members[0]]
        here = slice(start, start + text.read)
        tokens[here], positions[here], slots[here] = text.tokens[:-1], np.arange(text.read), 0
        spans.append((start, text.read))
        for request in (requests[number] for number in members):
            scored.append(np.arange(start + request.first - 1, start + request.read))
            targets.append(request.tokens[request.first :])
        start += text.read
    chosen = np.array([number for members in texts for number in members], np.int64)
    if start < size:
        spans.append((start, size - start))
        positions[start:] = np.arange(size - start)
    return RequestBatch(
        tokens_N=torch.from_numpy(tokens),
        positions_N=torch.from_numpy(positions),
        slots_N=torch.from_numpy(slots),
        spans_X2=torch.tensor(spans),
        scored_K=torch.from_numpy(np.concatenate(scored)),
        targets_K=torch.from_numpy(np.concatenate(targets).astype(np.int64)),
        requests=chosen,
        counts=np.array([requests[number].scored for number in chosen]),
    )
