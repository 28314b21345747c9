"""A panel of rows of another trainer's data set, and how it is read through a model of transformers.

A sample is the first tokens of a row, as the model reads them in training but without what follows. Its loss is over
those of them that are predicted. Each row counts as a document of its own.

Shapes: P panel samples, K tokens, L routers, E experts, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from moetrain.data.packing import Samples, join_samples
from moetrain.integrations.recorder import RouterRecorder
from moetrain.integrations.rows import MonitorError, Rows
from moetrain.models.router import RecordingMasks
from moetrain.routing.answers import no_answers
from moetrain.routing.panel import HELDOUT, SEEN, TO_COME, Panel, PanelReading, needed_to_come
from moetrain.training.train_metrics import expert_load

NEVER = np.iinfo(np.int64).max
"""The first step of a row that is not trained on, as far as is known."""


@dataclass(frozen=True)
class RowPanel:
    """The panel with what is read of it."""

    panel: Panel
    tokens_PK: torch.Tensor  # int64
    predicted_PK: torch.Tensor  # bool, whether a token is predicted from those before it
    copies: int  # held-out rows left out because the training data holds them too

    @property
    def keys(self) -> np.ndarray:
        """What the rows are known by, uint64 [P]."""
        return self.panel.samples.document


def draw_row_panel(
    train: Rows, heldout: Rows | None, first_step: np.ndarray | None, steps: int, samples: int, seed: int
) -> RowPanel:
    """Draw each domain's cells, seeded, before the first step.

    Args:
        train: what is trained on.
        heldout: what is not; None where there is none.
        first_step: the step that first trains on each row, int64 [n]; `NEVER` where none does. None where the order is
            not known: then samples ``seen`` are any rows of the training data, and there are none to come.
        steps: steps of the run; ``seen`` is from its first tenth, ``to_come`` from its last.
        samples: of a cell, at most.

    Raises:
        MonitorError: no row of the training data is long enough.
    """
    chosen: list[tuple[Rows, np.ndarray]] = []
    parts: list[Samples] = []
    cells: list[np.ndarray] = []
    first: list[np.ndarray] = []
    early, late = max(1, steps // 10), steps - max(1, steps // 10)
    copied = np.zeros(0, bool) if heldout is None else np.isin(heldout.keys, train.keys)
    for domain in np.unique(train.domain).tolist():
        usable = train.long_enough & (train.domain == domain)
        known = np.full(len(train), NEVER) if first_step is None else first_step
        pools = {SEEN: (train, usable if first_step is None else usable & (known <= early), known)}
        if first_step is not None:
            pools[TO_COME] = (train, usable & (known > late) & (known <= steps), known)
        if heldout is not None:
            untouched = heldout.long_enough & (heldout.domain == domain) & ~copied
            pools[HELDOUT] = (heldout, untouched, np.zeros(len(heldout), np.int64))
        drawn = {
            cell: _draw(rows.keys, pool, samples, [seed, 4, domain, cell]) for cell, (rows, pool, _) in pools.items()
        }
        if TO_COME in drawn:
            drawn[TO_COME] = drawn[TO_COME][: needed_to_come(samples, len(drawn.get(HELDOUT, ())))]
        for cell, (rows, _, by_step) in pools.items():
            members = np.sort(drawn[cell])
            chosen.append((rows, members))
            parts.append(_as_samples(rows, members))
            cells.append(np.full(len(members), cell, np.int8))
            first.append(by_step[members])
    joined = join_samples(parts)
    if not len(joined):
        count = train.tokens_nK.shape[1]
        raise MonitorError(
            f"no row of the training data has {count} tokens and a label among them: lower tokens={count}"
        )
    tokens_PK = np.concatenate([rows.tokens_nK[members] for rows, members in chosen])
    predicted_PK = np.concatenate([rows.predicted_nK[members] for rows, members in chosen])
    difficulty = np.concatenate(
        [_difficulties(train, rows.tokens_nK[m], rows.predicted_nK[m], rows.domain[m]) for rows, m in chosen]
    )
    panel = Panel(
        samples=joined,
        tokens=np.full(len(joined), tokens_PK.shape[1], np.int32),
        cell=np.concatenate(cells),
        first_step=np.concatenate(first),
        difficulty=difficulty,
        packed=None,
    )
    return RowPanel(
        panel, torch.from_numpy(tokens_PK.astype(np.int64)), torch.from_numpy(predicted_PK), int(copied.sum())
    )


def _draw(keys: np.ndarray, pool: np.ndarray, samples: int, seed: list[int]) -> np.ndarray:
    """A seeded choice of rows of different texts, in random order."""
    among = np.flatnonzero(pool)
    _, one_of_each = np.unique(keys[among], return_index=True)
    texts = among[np.sort(one_of_each)]
    return np.random.default_rng(seed).permutation(texts)[:samples]


def _as_samples(rows: Rows, members: np.ndarray) -> Samples:
    nothing = np.zeros(len(members), np.int32)
    return Samples(
        domain=rows.domain[members].astype(np.int16),
        document=rows.keys[members],
        piece=nothing,
        start=members.astype(np.int64),
        length=np.full(len(members), rows.tokens_nK.shape[1], np.int32),
        answer_start=nothing,
        answer_length=nothing,
    )


def _difficulties(train: Rows, tokens_SK: np.ndarray, predicted_SK: np.ndarray, domain_S: np.ndarray) -> np.ndarray:
    """Mean loss of the predicted tokens of samples of one domain under the frequencies of its tokens, float32 [S]."""
    if not len(domain_S):
        return np.zeros(0, np.float32)
    known = train.tokens_nK[train.domain == domain_S[0]]
    count = np.bincount(known[known >= 0], minlength=int(tokens_SK.max()) + 1) + 1
    loss_V = -np.log(count / count.sum())
    return np.average(loss_V[tokens_SK], axis=1, weights=predicted_SK).astype(np.float32)


@torch.no_grad()
def read_row_panel(
    model: nn.Module, recorder: RouterRecorder, rows: RowPanel, step: int, batch_rows: int, device: torch.device
) -> tuple[PanelReading, float, dict[str, float]]:
    """Read the panel by forward passes in evaluation mode.

    Returns:
        The reading; the entropy of the routing, mean over its tokens and layers, nats; the load of experts by tag.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        parts = [
            _read(model, recorder, rows, slice(start, start + batch_rows), device)
            for start in range(0, len(rows.panel), batch_rows)
        ]
    finally:
        for module in training:
            module.training = True
    loss, even, odd, counts = (np.concatenate([part[place] for part in parts]) for place in range(4))
    load_LE, entropy_L = (sum(part[place] for part in parts) for place in (4, 5))
    tokens = rows.tokens_PK.numel()
    reading = PanelReading(
        step=step,
        loss=loss,
        even=even,
        odd=odd,
        counts=counts.astype(np.uint16),
        inputs=np.zeros((len(loss), even.shape[1], 0), np.float32),
        answers=no_answers(*even.shape[1:]),
    )
    return reading, float(entropy_L.mean()) / tokens, expert_load(load_LE)


def _read(model: nn.Module, recorder: RouterRecorder, rows: RowPanel, which: slice, device: torch.device) -> Any:
    """Loss [S], mean probabilities over even and odd tokens and counts [S, L, E]; load [L, E] and entropy [L]."""
    tokens_SK, predicted_SK = rows.tokens_PK[which].to(device), rows.predicted_PK[which].to(device)
    parity_K = torch.arange(tokens_SK.shape[1], device=device) % 2
    halves_2K = torch.stack([parity_K == 0, parity_K == 1]).float()
    masks = RecordingMasks(
        real_N=torch.ones(tokens_SK.numel(), device=device), halves_BRT=halves_2K.expand(len(tokens_SK), -1, -1)
    )
    with recorder.recording(masks) as layers:
        logits_SKV = model(input_ids=tokens_SK, attention_mask=torch.ones_like(tokens_SK), use_cache=False).logits
    losses_SK = F.cross_entropy(
        logits_SKV[:, :-1].float().flatten(0, 1), tokens_SK[:, 1:].flatten(), reduction="none"
    ).view(len(tokens_SK), -1)
    weights_SK = predicted_SK[:, 1:]
    loss_S = (losses_SK * weights_SK).sum(1) / weights_SK.sum(1)
    sums_SL2E = torch.stack([layer.sums_BRE for layer in layers], 1)
    tokens_2 = halves_2K.sum(1)
    even_SLE, odd_SLE = (sums_SL2E / tokens_2[:, None]).unbind(2)
    counts_SLE = torch.stack([layer.counts_BRE for layer in layers], 1).sum(2)
    load_LE = torch.stack([layer.load_E for layer in layers]).double()
    entropy_L = torch.stack([layer.entropy for layer in layers]).double()
    return (
        *(each.cpu().numpy() for each in (loss_S, even_SLE, odd_SLE, counts_SLE)),
        *(each.cpu() for each in (load_LE, entropy_L)),
    )
