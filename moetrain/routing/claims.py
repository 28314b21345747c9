"""The claim ratio: what a model gains from a text's own far context, over what it believes it gains (ours).

The first half of a text is replaced by that of another text of the domain. p and q are the model's predictions behind
its own and behind the foreign half. Over the tokens of the second half, the gain is log p(y) - log q(y) of the true
token y, and the claim is KL(p || q), the gain that p expects. A calibrated model gains what it claims, on texts of any
difficulty; of texts that it knows by heart it gains more.

Shapes: S samples, T tokens with the begin mark, N compared tokens of all samples of a chunk, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from moetrain.distributed.mesh import ParallelLayout
from moetrain.model_input import PackedTokens
from moetrain.models.transformer import Transformer
from moetrain.routing.panel import SEEN, Panel

LEAST_TOKENS = 16
"""Shorter texts have too few tokens to compare."""
_KEPT = 1  # last token of the first half, which is kept: the seam is not where the second half begins
_SKIPPED, _END = 4, 2  # tokens of the second half that are not compared, behind the seam and at the end
_CHUNK_LOGITS = 2**23  # of a forward pass, float32


def swap_first_halves(tokens_ST: torch.Tensor, document_S: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
    """Texts whose first half is that of another document's text, and which of the samples have one.

    Args:
        tokens_ST: a begin mark and n text tokens per sample.
        document_S: the document of each sample; a sample takes the half of the next sample of another document.

    Returns:
        The tokens with the halves swapped, and bool [S]: False where all samples are of one document.
    """
    count = len(document_S)
    donor_S = np.arange(count)
    for sample in range(count):
        others = (np.arange(1, count) + sample) % count
        different = others[document_S[others] != document_S[sample]]
        if len(different):
            donor_S[sample] = different[0]
    half = (tokens_ST.shape[1] - 1) // 2
    swapped_ST = tokens_ST.clone()
    swapped_ST[:, 1 : 1 + half - _KEPT] = tokens_ST[torch.from_numpy(donor_S), 1 : 1 + half - _KEPT]
    return swapped_ST, donor_S != np.arange(count)


@torch.no_grad()
def panel_claims(
    model: Transformer, panel: Panel, step: int, layout: ParallelLayout
) -> tuple[np.ndarray, np.ndarray] | None:
    """Gain and claim of the panel samples that the run has trained on by ``step``; all ranks must call.

    Returns:
        None on ranks other than the main one, and there:
        Sums over the compared tokens in nats, float32 [P] each. NaN for all other samples, for those of fewer than
        `LEAST_TOKENS` tokens, and for domains whose documents mark answers.
    """
    own: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    chunks = list(_chunks(model, panel, step))
    for number in layout.share(len(chunks)):  # numbers beyond the chunks are empty passes
        layout.progress.mark()
        members, tokens_ST, swapped_ST = chunks[min(number, len(chunks) - 1)]
        gains, claims = read_claims(model, tokens_ST.to(layout.device), swapped_ST.to(layout.device))
        if number < len(chunks):
            own.append((members, gains, claims))
    gathered = layout.gather_objects(own)
    if gathered is None:
        return None
    gain, claim = (np.full(len(panel), np.nan, np.float32) for _ in range(2))
    for members, gains, claims in (chunk for part in gathered for chunk in part):
        gain[members], claim[members] = gains, claims
    return gain, claim


def _chunks(model: Transformer, panel: Panel, step: int) -> Iterator[tuple[np.ndarray, torch.Tensor, torch.Tensor]]:
    """Members of one forward pass each, with their tokens and the tokens behind other first halves."""
    for domain in np.unique(panel.samples.domain):
        members = panel.members(domain, SEEN, seen_by=step)
        members = members[~panel.stream.answered[members]]
        if not len(members) or panel.tokens[members[0]] < LEAST_TOKENS:
            continue
        length = int(panel.tokens[members[0]]) + 1
        tokens_ST = torch.from_numpy(np.stack([panel.stream.sequence(member)[:length] for member in members]))
        swapped_ST, swapped = swap_first_halves(tokens_ST, panel.samples.document[members])
        rows = max(1, _CHUNK_LOGITS // (len(model.lm_head.weight) * length))
        for start in range(0, int(swapped.sum()), rows):
            chosen = np.flatnonzero(swapped)[start : start + rows]
            yield members[chosen], tokens_ST[chosen], swapped_ST[chosen]


@torch.no_grad()
def read_claims(model: Transformer, tokens_ST: torch.Tensor, swapped_ST: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Gain and claim per sample in nats, summed over the compared tokens, float64 [S] each.

    Args:
        model: the model.
        tokens_ST: int64, a begin mark and n text tokens per sample, at least `LEAST_TOKENS`.
        swapped_ST: the same behind other first halves, see `swap_first_halves`.
    """
    text = tokens_ST.shape[1] - 1
    first, last = text // 2 + _SKIPPED, text - _END  # text tokens first to last - 1 are compared
    own_NV, foreign_NV = (_log_probabilities(model, each, first, last) for each in (tokens_ST, swapped_ST))
    target_N1 = tokens_ST[:, first + 1 : last + 1].reshape(-1, 1)
    gain_N = (own_NV - foreign_NV).gather(1, target_N1)[:, 0]
    claim_N = (own_NV.exp() * (own_NV - foreign_NV)).sum(-1)
    gain_S, claim_S = (
        values_N.view(len(tokens_ST), -1).double().sum(1).cpu().numpy() for values_N in (gain_N, claim_N)
    )
    return gain_S, claim_S


def _log_probabilities(model: Transformer, tokens_ST: torch.Tensor, first: int, last: int) -> torch.Tensor:
    """Log-probabilities at the text tokens first to last - 1, float32 [N, V]."""
    # Text token j is at j + 1, after the begin mark, and is predicted from j.
    hidden_ND, _ = model.hidden_states(PackedTokens.one_sample_per_row(tokens_ST))
    hidden_STD = hidden_ND.view(*tokens_ST.shape, -1)[:, first:last]
    return (hidden_STD.flatten(0, 1).float() @ model.lm_head.weight.float().T).log_softmax(-1)
