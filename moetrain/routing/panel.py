"""The panel: samples fixed before step 1 and read again now and then, forward only (METRICS, section 4).

Each domain has three cells. ``seen``: text that the stream first meets in its first tenth; ``to_come``: text it first
meets in its last tenth; ``heldout``: text it never meets. A text counts with all its copies. Routing is compared over a
sample's first panel tokens. Its loss is taken over the same, or, where its document marks an answer, over that alone.

Shapes: P panel samples, L layers, E experts, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from moetrain.config import Settings
from moetrain.data.corpus import Corpus
from moetrain.data.packing import Samples, cut_samples, join_samples, pack_rows
from moetrain.data.stream import Stream
from moetrain.distributed.mesh import ParallelLayout
from moetrain.models.transformer import Transformer
from moetrain.routing.answers import AnswerRouting, join_answers, no_answers, read_answers, short_answers
from moetrain.routing.recorder import record_samples

CELLS = ("seen", "to_come", "heldout")
SEEN, TO_COME, HELDOUT = range(3)


@dataclass(frozen=True)
class Panel:
    """The panel's members, in an order that never changes; arrays [P]."""

    samples: Samples  # cut to the tokens that are read
    tokens: np.ndarray  # int32, the first tokens of each, whose routing is compared
    cell: np.ndarray  # int8, see CELLS
    first_step: np.ndarray  # int64, the step that first trains on the text, 0 where none does
    stream: Stream  # rows that hold each member once

    def __len__(self) -> int:
        return len(self.cell)

    def members(self, domain: int, cell: int, met_by: int | None = None) -> np.ndarray:
        """Places in the panel of a domain's cell, int64; with ``met_by``, those that step or an earlier one met."""
        chosen = (self.samples.domain == domain) & (self.cell == cell)
        if met_by is not None:
            chosen &= (self.first_step > 0) & (self.first_step <= met_by)
        return np.flatnonzero(chosen)

    def names(self, members: np.ndarray) -> list[str]:
        """Members as their document's id, in hexadecimal, and the piece of it."""
        samples = self.samples
        return [
            f"{document:016x}/{piece}"
            for document, piece in zip(samples.document[members], samples.piece[members], strict=True)
        ]


@dataclass(frozen=True)
class PanelReading:
    """What the model made of the panel at one step; arrays in the panel's order."""

    step: int
    loss: np.ndarray  # float32 [P], mean nats a token (of the answer, where there is one)
    even: np.ndarray  # float32 [P, L, E], mean router probabilities over the even text tokens
    odd: np.ndarray  # float32 [P, L, E], over the odd ones
    counts: np.ndarray  # uint16 [P, L, E], tokens sent to each expert
    inputs: np.ndarray  # float32 [P, L, D], mean inputs of each layer; D is 0 where they were not asked for
    answers: AnswerRouting  # of samples whose document marks an answer


def draw_panel(corpus: Corpus, stream: Stream, settings: Settings, steps: int, rows: int) -> Panel:
    """Draw each domain's cells, seeded, before the first step.

    Args:
        steps: steps of the run; its tenths say which text is seen early and which is to come.
        rows: rows of one forward pass.
    """
    trained = stream.samples
    first_step = _first_steps(stream, steps)
    heldout = cut_samples(corpus, settings.data.seq_len, heldout=True)
    parts: list[Samples] = []
    cells: list[np.ndarray] = []
    first: list[np.ndarray] = []
    early, late = max(1, steps // 10), steps - max(1, steps // 10)
    for domain, source in enumerate(corpus.domains):
        tokens = settings.panel_tokens(source.name)
        long_enough = (trained.domain == domain) & (trained.length >= tokens)
        pools = {
            SEEN: (trained, long_enough & (first_step >= 1) & (first_step <= early)),
            TO_COME: (trained, long_enough & (first_step > late)),
            HELDOUT: (heldout, (heldout.domain == domain) & (heldout.length >= tokens)),
        }
        for cell, (samples, pool) in pools.items():
            chosen = _draw(samples, pool, settings, domain, cell)
            parts.append(_cut(samples.take(chosen), tokens))
            cells.append(np.full(len(chosen), cell, np.int8))
            first.append(first_step[chosen] if cell != HELDOUT else np.zeros(len(chosen), np.int64))
    return _pack(corpus, settings, parts, cells, first, rows)


def document_panel(corpus: Corpus, settings: Settings, met: int, rows: int) -> Panel:
    """A panel of given documents, for models whose training stream is not at hand; drawn, seeded, from all of them.

    Args:
        corpus: its first ``met`` domains are text that the models have trained on from step 1 on, and become the cell
            ``seen``; the others, which may repeat their names, are text they never met: ``heldout``.
        rows: rows of one forward pass.
    """
    lengths = settings.data.seq_len
    samples = join_samples([cut_samples(corpus, lengths, heldout=False), cut_samples(corpus, lengths, heldout=True)])
    parts: list[Samples] = []
    cells: list[np.ndarray] = []
    for domain, source in enumerate(corpus.domains):
        tokens = settings.panel_tokens(source.name)
        cell = SEEN if domain < met else HELDOUT
        pool = (samples.domain == domain) & (samples.length >= tokens)
        chosen = _draw(samples, pool, settings, domain, cell)
        parts.append(_cut(samples.take(chosen), tokens))
        cells.append(np.full(len(chosen), cell, np.int8))
    first = [(cell == SEEN).astype(np.int64) for cell in cells]
    return _pack(corpus, settings, parts, cells, first, rows)


def _draw(samples: Samples, pool: np.ndarray, settings: Settings, domain: int, cell: int) -> np.ndarray:
    """A seeded choice of ``panel.samples`` samples of different texts from those that ``pool`` marks."""
    rng = np.random.default_rng([settings.run.seed, 4, domain, cell])
    texts = _one_of_each_text(samples, rng.permutation(np.flatnonzero(pool)))
    return np.sort(texts[: settings.panel.samples])


def _pack(
    corpus: Corpus,
    settings: Settings,
    parts: list[Samples],
    cells: list[np.ndarray],
    first: list[np.ndarray],
    rows: int,
) -> Panel:
    joined = join_samples(parts)
    order = np.arange(len(joined))
    packed = pack_rows(order, joined.row_lengths, settings.data.seq_len, len(joined) or 1, settings.run.seed)
    panel_stream = Stream(corpus, settings, joined, packed, rows, truncated=True)
    tokens = np.array([settings.panel_tokens(source.name) for source in corpus.domains], np.int32)[joined.domain]
    return Panel(joined, tokens, np.concatenate(cells), np.concatenate(first), panel_stream)


def _first_steps(stream: Stream, steps: int) -> np.ndarray:
    """By sample, the step (1 the first) that first meets its text in any copy, 0 where none of ``steps`` does."""
    samples = stream.samples
    rows = np.repeat(np.arange(len(stream.rows)), np.diff(stream.rows.starts))
    met = np.full(len(samples), np.iinfo(np.int64).max)
    met[stream.rows.samples] = rows // stream.batch_rows + 1
    # Copies of a document share their place in the token file.
    _, text = np.unique(np.stack([samples.domain.astype(np.int64), samples.start]), axis=1, return_inverse=True)
    earliest = np.full(text.max(initial=-1) + 1, np.iinfo(np.int64).max)
    np.minimum.at(earliest, text, met)
    first = earliest[text]
    return np.where(first <= steps, first, 0)


def _one_of_each_text(samples: Samples, chosen: np.ndarray) -> np.ndarray:
    """Of samples given in a drawn order, the first of each text."""
    _, first = np.unique(samples.start[chosen], return_index=True)
    return chosen[np.sort(first)]


def _cut(samples: Samples, tokens: int) -> Samples:
    """Samples without what is not read: beyond the tokens that are compared, and beyond the answer."""
    answer_end = samples.answer_start + samples.answer_length
    needed = np.where(samples.answer_length > 0, np.maximum(answer_end, tokens), tokens)
    return replace(samples, length=np.minimum(samples.length, needed).astype(samples.length.dtype))


@torch.no_grad()
def read_panel(
    model: Transformer,
    panel: Panel,
    step: int,
    layout: ParallelLayout,
    inputs: bool = False,
) -> PanelReading:
    """Read the panel forward only, each rank its share of the rows; training is left as it was.

    Args:
        inputs: whether each layer's inputs are read too, for the kernel of linear experts.
    """
    size = len(panel)
    settings = model.settings
    shape = (size, settings.num_hidden_layers, settings.num_experts)
    loss = np.zeros(size, np.float32)
    even, odd = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    counts = np.zeros(shape, np.uint16)
    pooled = np.zeros((size, shape[1], settings.hidden_size if inputs else 0), np.float32)
    answers, answered = [no_answers(*shape[1:])], short_answers(panel.stream)
    for number in layout.share(panel.stream.steps):
        layout.progress.mark()
        batch = panel.stream.batch(number, 0, panel.stream.batch_rows)
        output = model(batch.to(layout.device).model_input(), record_layer_inputs=inputs)
        assert output.routing is not None
        sums, tokens = batch.sum_by_sample(output.loss_BT.cpu().numpy())
        there = batch.samples_BS.numpy() >= 0
        loss[batch.samples_BS.numpy()[there]] = sums[there] / tokens[there]
        routing = output.routing
        records = record_samples(
            routing.sums_LBRE, routing.counts_LBRE, batch.samples_BS, batch.domains_BS, batch.compared_BS, 0
        )
        even[records.sample] = records.even_SLE
        odd[records.sample] = records.odd_SLE
        counts[records.sample] = records.counts_SLE
        if inputs:
            pooled[records.sample] = _mean_inputs(
                routing.inputs_LBRD, batch.compared_BS, records.even_SLE, records.odd_SLE
            )
        answers.append(read_answers(model, batch, panel.stream, answered, layout))
    own = PanelReading(
        step=step, loss=loss, even=even, odd=odd, counts=counts, inputs=pooled, answers=join_answers(answers)
    )
    joined = _joined(layout.all_gather_objects(own))
    return replace(joined, even=_mean(joined.even), odd=_mean(joined.odd))


def _joined(parts: Sequence[PanelReading]) -> PanelReading:
    """The parts of all ranks as one reading: a sample is read by one rank, and zero on the others."""

    def total(name: str) -> np.ndarray:
        return np.sum([getattr(part, name) for part in parts], axis=0, dtype=getattr(parts[0], name).dtype)

    return PanelReading(
        step=parts[0].step,
        loss=total("loss"),
        even=total("even"),
        odd=total("odd"),
        counts=total("counts"),
        inputs=total("inputs"),
        answers=join_answers([part.answers for part in parts]),
    )


def _mean_inputs(
    inputs_LBRD: torch.Tensor, compared_BS: torch.Tensor, even_SLE: np.ndarray, odd_SLE: np.ndarray
) -> np.ndarray:
    """Mean inputs of a batch's recorded samples, [S, L, D]; the probabilities of a token sum to 1 and so count them."""
    slots = compared_BS.flatten().nonzero()[:, 0].to(inputs_LBRD.device)
    layers, rows, halves, width = inputs_LBRD.shape
    sums_SLD = inputs_LBRD.view(layers, rows * halves // 2, 2, width).sum(2)[:, slots].transpose(0, 1).cpu().numpy()
    return sums_SLD / (even_SLE + odd_SLE).sum(-1, keepdims=True)


def _mean(sums: np.ndarray) -> np.ndarray:
    """Sums of probabilities over tokens as mean probabilities; zero where there was no token."""
    return sums / np.maximum(sums.sum(-1, keepdims=True), np.finfo(np.float32).tiny)


def reading_steps(steps: int, readings: int) -> frozenset[int]:
    """Steps after which the panel is read: evenly spaced, step 0 and the last included."""
    return frozenset(round(steps * number / max(1, readings - 1)) for number in range(readings))
