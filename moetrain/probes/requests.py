"""What the model is asked to score: prompt and answer as tokens, encoded once, in batches that never change.

Shapes: N tokens of a batch, D hidden size, K scored tokens of a batch, R requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from moetrain.data.tokenizer import Tokenizer
from moetrain.device_transfer import to_device
from moetrain.model_input import PackedTokens
from moetrain.models.transformer import Transformer

_MULTIPLE = 64  # batch sizes are multiples of this, so that shapes, and with them kernels, repeat


def split_prompt(prompt: str, answer: str) -> tuple[str, str]:
    """Context and continuation as lm-evaluation-harness parts them: white space at the context's end goes over."""
    context = prompt.rstrip()
    return context, prompt[len(context) :] + answer


@dataclass(frozen=True)
class Request:
    """A text of which the last part is scored, given what stands before it."""

    tokens: np.ndarray  # int32: the beginning mark and the text, cut from the left to the model's context
    first: int  # the first token that is scored, 1 or more; all from there on are
    characters: int  # of the answer (of what is left of it, where the answer itself was cut)
    bytes_: int
    cut: bool

    @property
    def read(self) -> int:
        """Tokens that the model reads: all but the last."""
        return len(self.tokens) - 1


def make_requests(pairs: Sequence[tuple[str, str, str]], tokenizer: Tokenizer, context_tokens: int) -> list[Request]:
    """Encode (prompt, sep, answer) triples as lm-evaluation-harness does.

    Prompt and continuation are encoded as one text; what exceeds the tokens of the context alone is scored. Where that
    leaves nothing, because the end of the prompt and the answer are one token, the tokens that hold the answer are.

    Args:
        context_tokens: the longest sample that the model was trained on; what is longer is cut from the left.
    """
    parts = [split_prompt(prompt, sep + answer) for prompt, sep, answer in pairs]
    texts = list(dict.fromkeys(text for context, rest in parts for text in (context, context + rest)))
    encoded = dict(zip(texts, tokenizer.encode_all(texts), strict=True))
    token_bytes = tokenizer.token_bytes()
    requests = []
    for (context, rest), (_, _, answer) in zip(parts, pairs, strict=True):
        whole = encoded[context + rest]
        first = len(encoded[context])
        if first >= len(whole):
            first = tokenizer.span(context + rest, whole, len(context), len(context + rest))[0]
        kept = whole[-context_tokens:]
        lost = len(whole) - len(kept)
        characters, bytes_ = len(answer), len(answer.encode())
        if lost > first:
            characters, bytes_ = len(tokenizer.decode(kept)), int(token_bytes[kept].sum())
        tokens = np.array([tokenizer.begin_id, *kept], np.int32)
        requests.append(Request(tokens, 1 + max(0, first - lost), characters, bytes_, lost > 0))
    return requests


@dataclass(frozen=True)
class RequestBatch:
    """Requests side by side in one row, each a sample of its own; what the model reads, and what is scored of it."""

    tokens_N: torch.Tensor  # int64, padding is the end mark
    positions_N: torch.Tensor  # int64, from 0 in each request
    slots_N: torch.Tensor  # int64, 0 for a token of a request, -1 for padding
    spans_R2: torch.Tensor  # int64 on the CPU: (start, length) of each request, and of the padding
    scored_K: torch.Tensor  # int64, the tokens that a scored one is predicted from
    targets_K: torch.Tensor  # int64, the scored tokens
    requests: np.ndarray  # int64 [requests of the batch], which ones
    counts: np.ndarray  # int64 [requests of the batch], scored tokens of each; none is 0

    def to(self, device: torch.device) -> RequestBatch:
        """The batch with what the model reads on ``device``."""
        moved = {
            f.name: to_device(getattr(self, f.name), device) for f in fields(self) if f.name.endswith(("_N", "_K"))
        }
        return RequestBatch(**moved, spans_R2=self.spans_R2, requests=self.requests, counts=self.counts)


def pack_requests(requests: Sequence[Request], padding: int, batch_tokens: int) -> list[RequestBatch]:
    """Batches of about ``batch_tokens`` tokens: of requests of like length, and nearly of one size.

    Requests are sorted by length, so that those of a batch need little padding in attention, and spread evenly over as
    few batches as can be. What a request scores does not depend on which others are beside it.
    """
    order = np.argsort([-request.read for request in requests], kind="stable")
    lengths = np.array([requests[r].read for r in order], np.int64)
    total = int(lengths.sum())
    share = total / max(1, -(-total // batch_tokens))
    # A request belongs where its middle falls: no batch is longer than its share by more than one request.
    part = (np.cumsum(lengths) - lengths / 2) // share if total else lengths
    chosen = [order[part == number] for number in np.unique(part)]
    return [_batch(requests, members, padding) for members in chosen]


def batch_hidden_states(model: Transformer, batch: RequestBatch) -> torch.Tensor:
    """Final hidden states of a batch, float32 [N, D]; the routing of no sample is recorded."""
    inputs = PackedTokens(
        tokens_BT=batch.tokens_N[None],
        targets_BT=None,
        positions_BT=batch.positions_N[None],
        slots_BT=batch.slots_N[None],
        recorded_BT=torch.full_like(batch.tokens_N, -1)[None],
        spans_N2=batch.spans_R2,
    )
    return model.hidden_states(inputs)[0]


def _batch(requests: Sequence[Request], chosen: np.ndarray, padding: int) -> RequestBatch:
    size = -(-sum(requests[r].read for r in chosen) // _MULTIPLE) * _MULTIPLE
    tokens, positions, slots = np.full(size, padding, np.int64), np.zeros(size, np.int64), np.full(size, -1, np.int64)
    spans, scored, targets, counts = [], [], [], []
    place = 0
    for number in chosen:
        request = requests[number]
        here = slice(place, place + request.read)
        tokens[here], positions[here], slots[here] = request.tokens[:-1], np.arange(request.read), 0
        spans.append((place, request.read))
        scored.append(np.arange(place + request.first - 1, place + request.read))
        targets.append(request.tokens[request.first :])
        counts.append(len(request.tokens) - request.first)
        place += request.read
    if place < size:
        spans.append((place, size - place))
        positions[place:] = np.arange(size - place)
    return RequestBatch(
        tokens_N=torch.from_numpy(tokens),
        positions_N=torch.from_numpy(positions),
        slots_N=torch.from_numpy(slots),
        spans_R2=torch.tensor(spans),
        scored_K=torch.from_numpy(np.concatenate(scored)),
        targets_K=torch.from_numpy(np.concatenate(targets).astype(np.int64)),
        requests=chosen,
        counts=np.array(counts),
    )
