"""Text embeddings of panel samples and probe items, for pairing groups of both (METRICS, section 4).

Shapes: R texts, D width of an embedding, K text tokens of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from moetrain.config import Settings, SettingsError
from moetrain.data.items import Item, right_answer
from moetrain.data.sources.hub import one_line
from moetrain.data.tokenizer import Tokenizer
from moetrain.distributed.mesh import ParallelLayout
from moetrain.models.transformer import Transformer
from moetrain.probes.requests import (
    BATCH_TOKENS,
    Request,
    RequestBatch,
    equal_passes,
    pack_requests,
    scored_hidden_states,
)

Encoder = Callable[[Sequence[str]], np.ndarray]
"""Texts to embeddings, float32 [R, D]."""


def item_text(item: Item) -> str:
    """An item as one text: its prompt with the right answer."""
    return f"{item['prompt']}{item['sep']}{right_answer(item)}"


@torch.no_grad()
def mean_hidden_states(
    model: Transformer,
    texts: Sequence[Sequence[int]],
    tokenizer: Tokenizer,
    layout: ParallelLayout,
    context_tokens: int,
    batch_tokens: int = BATCH_TOKENS,
) -> np.ndarray:
    """Final hidden states of the model, averaged over the tokens of each text: float32 [R, D].

    The main rank calls this. Where forward passes are collectives, the others read their share of the texts in
    `help_embed`.

    Args:
        model: without the launcher's wrapper; it is not changed.
        texts: token ids without marks. The model reads a beginning mark before them, which does not enter the mean.
        context_tokens: longest input of the model; longer texts are cut from the right.
        batch_tokens: approximate tokens of one forward pass.

    Raises:
        ValueError: a text without tokens.
    """
    if not all(map(len, texts)):
        raise ValueError("a text without tokens has no embedding: leave it out")
    if layout.passes_together:
        layout.broadcast_object((texts, batch_tokens))  # `help_embed` waits for them
    means_RD = _mean_hidden_states(model, texts, tokenizer, layout, context_tokens, batch_tokens)
    assert means_RD is not None
    return means_RD


@torch.no_grad()
def help_embed(model: Transformer, tokenizer: Tokenizer, layout: ParallelLayout, context_tokens: int) -> None:
    """Take part in the main rank's calls of `mean_hidden_states`, until it calls `end_embed`."""
    while layout.passes_together and (call := layout.broadcast_object(None)) is not None:
        texts, batch_tokens = call
        _mean_hidden_states(model, texts, tokenizer, layout, context_tokens, batch_tokens)


def end_embed(layout: ParallelLayout) -> None:
    """The main rank has embedded all its texts: release the others from `help_embed`."""
    if layout.passes_together:
        layout.broadcast_object(None)


def _mean_hidden_states(
    model: Transformer,
    texts: Sequence[Sequence[int]],
    tokenizer: Tokenizer,
    layout: ParallelLayout,
    context_tokens: int,
    batch_tokens: int,
) -> np.ndarray | None:
    """See `mean_hidden_states`; None on ranks other than the main one."""
    ranks = layout if layout.passes_together else ParallelLayout(device=layout.device)
    # The tokens "from which scored tokens are predicted" are the text, between the beginning mark and the end mark.
    requests = [
        Request(np.array([tokenizer.begin_id, *text[: context_tokens - 1], tokenizer.end_id]), first=2)
        for text in texts
    ]
    batches = pack_requests(requests, tokenizer.end_id, batch_tokens)
    own_means: list[tuple[np.ndarray, np.ndarray]] = []
    for batch, own in equal_passes(batches[ranks.rank :: ranks.world_size], ranks, tokenizer.end_id):
        means = _means(model, batch)
        if own:
            own_means.append((batch.requests, means.cpu().numpy()))
    gathered = ranks.gather_objects(own_means)
    if gathered is None:
        return None
    means_RD = np.zeros((len(requests), model.settings.hidden_size), np.float32)
    for numbers, means in (batch_means for part in gathered for batch_means in part):  # one rank reads a text
        means_RD[numbers] = means
    return means_RD


def _means(model: Transformer, batch: RequestBatch) -> torch.Tensor:
    """Mean hidden states of the requests of a batch, by a matmul, whose order of additions is fixed."""
    hidden_KD = scored_hidden_states(model, batch)
    counts_R = torch.from_numpy(batch.counts)
    owner_K = torch.repeat_interleave(torch.arange(len(counts_R)), counts_R)
    weights_RK = (owner_K == torch.arange(len(counts_R))[:, None]) / counts_R[:, None]
    return weights_RK.to(hidden_KD) @ hidden_KD


def check_encoder(settings: Settings) -> None:
    """Load the encoder of ``probes.embeddings`` once, if there is one: it is needed at the end of the run only.

    Raises:
        SettingsError, DataError: as `sentence_encoder`.
    """
    if settings.probes.embeddings is not None:
        sentence_encoder(settings.probes.embeddings)


def sentence_encoder(name: str) -> Encoder:
    """An encoder that is a sentence-transformers model.

    Args:
        name: a name on the hub, or a local folder.

    Raises:
        SettingsError: the package is not installed.
        DataError: the model cannot be loaded.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise SettingsError(
            "probes.embeddings: needs a package that is not installed: pip install 'moetrain[embeddings]', or leave it "
            "empty to pair by the model's own hidden states"
        ) from None
    with one_line(f"probes.embeddings: {name}", "give a sentence-transformers model, or leave it empty"):
        encoder = SentenceTransformer(name, trust_remote_code=False)

    def encode(texts: Sequence[str]) -> np.ndarray:
        embeddings: np.ndarray = encoder.encode(list(texts), convert_to_numpy=True, show_progress_bar=False)
        return embeddings.astype(np.float32)

    return encode
