"""The panel: samples fixed before step 1, and read by forward passes at intervals.

Each domain has three cells. ``seen``: text first trained on in the first tenth of the run; ``to_come``: text first
trained on in its last tenth; ``heldout``: text never trained on. ``to_come`` fills up what ``heldout`` lacks of
`panel.samples`, and has at least a quarter of them. All copies of a text count as one. Routing is compared
over a sample's first panel tokens. The loss is over the same tokens, or over the answer if the document marks one.

Shapes: P panel samples, L layers, E experts, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from moetrain.config import Settings
from moetrain.data.corpus import Corpus
from moetrain.data.packing import Samples, cut_samples, join_samples, pack_rows
from moetrain.data.stream import Stream
from moetrain.distributed.mesh import ParallelLayout
from moetrain.models.transformer import Transformer
from moetrain.routing.answers import AnswerRouting, join_answers, no_answers, read_answers, short_answers
from moetrain.routing.recorder import start_record

_FREQUENCY_TOKENS = 2**22  # of a domain that frequencies are counted on

CELLS = ("seen", "to_come", "heldout")
SEEN, TO_COME, HELDOUT = range(3)


@dataclass(frozen=True)
class Panel:
    """The samples of the panel, in a fixed order; arrays [P]."""

    samples: Samples  # truncated to the tokens that are read
    tokens: np.ndarray  # int32, number of first tokens whose routing is compared
    cell: np.ndarray  # int8, see CELLS
    first_step: np.ndarray  # int64, the step that first trains on the text, 0 if none does
    difficulty: np.ndarray  # float32, nats: mean loss under the frequency of each token in the domain
    packed: Stream | None  # rows that hold each sample once; None for a panel that is not read by `read_panel`

    @property
    def stream(self) -> Stream:
        """Rows that hold each sample once."""
        assert self.packed is not None
        return self.packed

    def __len__(self) -> int:
        return len(self.cell)

    def members(self, domain: int, cell: int, seen_by: int | None = None) -> np.ndarray:
        """Indices of the samples of a domain's cell, int64; with ``seen_by``, of those trained on by that step."""
        chosen = (self.samples.domain == domain) & (self.cell == cell)
        if seen_by is not None:
            chosen &= (self.first_step > 0) & (self.first_step <= seen_by)
        return np.flatnonzero(chosen)

    def follow(self, stream: Stream, steps: int) -> None:
        """Take over when a changed stream first trains on each sample; held-out samples stay untouched."""
        first = dict(
            zip(
                zip(stream.samples.domain.tolist(), stream.samples.start.tolist(), strict=True),
                first_steps(stream, steps).tolist(),
                strict=True,
            )
        )
        places = zip(self.samples.domain.tolist(), self.samples.start.tolist(), strict=True)
        self.first_step[:] = [
            0 if cell == HELDOUT else first[place] for place, cell in zip(places, self.cell.tolist(), strict=True)
        ]

    def names(self, members: np.ndarray) -> list[str]:
        """Names of samples: the id of the document in hexadecimal, and the piece of it."""
        samples = self.samples
        return [
            f"{document:016x}/{piece}"
            for document, piece in zip(samples.document[members], samples.piece[members], strict=True)
        ]


@dataclass(frozen=True)
class PanelReading:
    """Losses and routing of the panel at one step; arrays in the order of the panel."""

    step: int
    loss: np.ndarray  # float32 [P], mean nats per token, over the answer if there is one
    even: np.ndarray  # float32 [P, L, E], mean router probabilities over the even text tokens
    odd: np.ndarray  # float32 [P, L, E], over the odd text tokens
    counts: np.ndarray  # uint16 [P, L, E], tokens sent to each expert
    inputs: np.ndarray  # float32 [P, L, D], mean layer inputs; D is 0 if they were not recorded
    answers: AnswerRouting  # of samples whose document marks an answer


def draw_panel(corpus: Corpus, stream: Stream, settings: Settings, steps: int, rows: int) -> Panel:
    """Draw each domain's cells, seeded, before the first step.

    Args:
        corpus: the data.
        stream: the training stream.
        settings: of the run.
        steps: steps of the run; ``seen`` is from its first tenth, ``to_come`` from its last. Where the run went on from
            a checkpoint, these are the tenths of the stage in which a domain was added, as it was planned.
        rows: rows of a forward pass.
    """
    trained = stream.samples
    first_step = first_steps(stream, steps)
    origins = _origins(stream, steps)
    heldout = cut_samples(corpus, settings.data.seq_len, heldout=True)
    parts: list[Samples] = []
    cells: list[np.ndarray] = []
    first: list[np.ndarray] = []
    for domain, source in enumerate(corpus.domains):
        tokens = settings.panel_tokens(source.name)
        begin, end, met = origins[domain]
        tenth = max(1, (end - begin) // 10)
        long_enough = (trained.domain == domain) & (trained.length >= tokens)
        pools = {
            SEEN: (trained, long_enough & (met >= 1) & (met <= begin + tenth)),
            TO_COME: (trained, long_enough & (met > end - tenth)),
            HELDOUT: (heldout, (heldout.domain == domain) & (heldout.length >= tokens)),
        }
        drawn = {cell: _draw(*pool, settings, domain, cell) for cell, pool in pools.items()}
        drawn[TO_COME] = drawn[TO_COME][: needed_to_come(settings.panel.samples, len(drawn[HELDOUT]))]
        for cell, (samples, _) in pools.items():
            chosen = np.sort(drawn[cell])
            parts.append(_cut(samples.take(chosen), tokens))
            cells.append(np.full(len(chosen), cell, np.int8))
            first.append(first_step[chosen] if cell != HELDOUT else np.zeros(len(chosen), np.int64))
    return _pack(corpus, settings, parts, cells, first, rows)


def _origins(stream: Stream, steps: int) -> dict[int, tuple[int, int, np.ndarray]]:
    """Of each domain the stage that added it: begin, end, and which step first trains on each sample's text."""
    found: dict[int, tuple[int, int, np.ndarray]] = {}
    for stage, planned in stream.stages:
        end = steps if stage.planned is None else stage.planned
        met = first_steps(stream if stage.planned is None else planned, end)
        found |= {domain: (stage.begin, end, met) for domain in stage.domains if domain not in found}
    return found


def document_panel(corpus: Corpus, settings: Settings, trained_domains: int, rows: int) -> Panel:
    """A panel of given documents, drawn with a seed, for models whose training stream is not available.

    Args:
        corpus: the documents.
        settings: of the panel.
        trained_domains: the first so many domains of the corpus were trained on from step 1 on, and become the cell
            ``seen``. The others, which may repeat their names, were not, and become ``heldout``.
        rows: rows of a forward pass.
    """
    lengths = settings.data.seq_len
    samples = join_samples([cut_samples(corpus, lengths, heldout=False), cut_samples(corpus, lengths, heldout=True)])
    parts: list[Samples] = []
    cells: list[np.ndarray] = []
    for domain, source in enumerate(corpus.domains):
        tokens = settings.panel_tokens(source.name)
        cell = SEEN if domain < trained_domains else HELDOUT
        pool = (samples.domain == domain) & (samples.length >= tokens)
        chosen = np.sort(_draw(samples, pool, settings, domain, cell))
        parts.append(_cut(samples.take(chosen), tokens))
        cells.append(np.full(len(chosen), cell, np.int8))
    first = [(cell == SEEN).astype(np.int64) for cell in cells]
    return _pack(corpus, settings, parts, cells, first, rows)


def _draw(samples: Samples, pool: np.ndarray, settings: Settings, domain: int, cell: int) -> np.ndarray:
    """A seeded choice, in random order, of ``panel.samples`` samples of different texts among those in ``pool``.

    One sample of each document is chosen before a second of any, because samples of one document are no independent
    evidence about the domain.
    """
    rng = np.random.default_rng([settings.run.seed, 4, domain, cell])
    texts = rng.permutation(_one_of_each_text(samples, np.flatnonzero(pool)))
    return texts[_by_turns(samples.document[texts])[: settings.panel.samples]]


def needed_to_come(samples: int, heldout: int) -> int:
    """The number of samples to come of a domain with so many held-out ones; ``samples``: that of ``panel.samples``."""
    return max(samples - heldout, _least_to_come(samples))


def most_samples(samples: int) -> int:
    """The largest number of panel samples per domain with ``panel.samples`` set to ``samples``."""
    return 2 * samples + _least_to_come(samples)


def _least_to_come(samples: int) -> int:
    return max(samples // 4, 1)


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
    difficulty = _difficulties(corpus, panel_stream)
    return Panel(joined, tokens, np.concatenate(cells), np.concatenate(first), difficulty, panel_stream)


def _difficulties(corpus: Corpus, stream: Stream) -> np.ndarray:
    """Mean loss of each sample's predicted tokens under the frequencies of tokens in its domain, nats, float32 [P].

    Frequencies are those of the domain's first tokens, of training and held-out documents alike; a token that does
    not occur counts once. Domains of one name count as one.
    """
    counts: dict[str, np.ndarray] = {}
    for domain in corpus.domains:
        found = np.bincount(domain.tokens[:_FREQUENCY_TOKENS], minlength=corpus.tokenizer.vocab_size)
        counts[domain.name] = counts.get(domain.name, 1) + found[: corpus.tokenizer.vocab_size]
    losses = {name: -np.log(count / count.sum()) for name, count in counts.items()}
    names = [domain.name for domain in corpus.domains]
    difficulty = [
        losses[names[domain]][stream.predicted_text(sample)].mean()
        for sample, domain in enumerate(stream.samples.domain.tolist())
    ]
    return np.array(difficulty, np.float32)


def first_steps(stream: Stream, steps: int) -> np.ndarray:
    """Per sample, the step (from 1) that first trains on its text in any copy; 0 if none of ``steps`` does."""
    samples = stream.samples
    rows = np.repeat(np.arange(len(stream.rows)), np.diff(stream.rows.starts))
    own = np.full(len(samples), np.iinfo(np.int64).max)
    own[stream.rows.samples] = rows // stream.batch_rows + 1
    # Copies of a document have the same position in the token file.
    _, text = np.unique(np.stack([samples.domain.astype(np.int64), samples.start]), axis=1, return_inverse=True)
    earliest = np.full(text.max(initial=-1) + 1, np.iinfo(np.int64).max)
    np.minimum.at(earliest, text, own)
    first = earliest[text]
    return np.where(first <= steps, first, 0)


def _one_of_each_text(samples: Samples, chosen: np.ndarray) -> np.ndarray:
    """The first sample of each text, in ascending order: of copies the one with the lowest number.

    So the pieces of a repeated document are all pieces of the same copy, and have the same document id.
    """
    _, first = np.unique(samples.start[chosen], return_index=True)
    return chosen[np.sort(first)]


def _by_turns(documents: np.ndarray) -> np.ndarray:
    """An order in which each document has its first sample before any has its second, and so on; otherwise as given."""
    by_document = np.argsort(documents, kind="stable")
    sorted_documents = documents[by_document]
    turn = np.zeros(len(documents), np.int64)
    turn[by_document] = np.arange(len(documents)) - np.searchsorted(sorted_documents, sorted_documents, side="left")
    return np.argsort(turn, kind="stable")


def _cut(samples: Samples, tokens: int) -> Samples:
    """Samples without the tokens that are not read: those after the compared tokens and the answer."""
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
) -> PanelReading | None:
    """Read the panel by forward passes; each rank reads its share of the rows, and all ranks must call.

    The main rank gets the reading, the others None: they send it their samples alone.

    Args:
        model: unsharded.
        panel: to read.
        step: number of steps trained.
        layout: of the ranks.
        inputs: whether to record layer inputs, for the kernel of linear experts.
    """
    parts = [_no_samples(model, inputs)]
    for number in layout.share(panel.stream.steps):
        layout.progress.mark()
        batch = panel.stream.batch(number, 0, panel.stream.full_rows(number))
        output = model(batch.to(layout.device).model_input(), record_layer_inputs=inputs)
        assert output.routing is not None
        sums, tokens = batch.sum_by_sample(output.loss_BT.cpu().numpy())
        there = batch.samples_BS.numpy() >= 0
        records = start_record(output.routing, batch, first_order=0).wait()
        assert np.array_equal(records.sample, batch.samples_BS.numpy()[there])  # panel samples are all long enough
        pooled = np.zeros((len(records.sample), model.settings.num_hidden_layers, 0), np.float32)
        if inputs:
            pooled = _mean_inputs(output.routing.inputs_LBRD, batch.compared_BS, records.even_SLE, records.odd_SLE)
        loss = (sums[there] / tokens[there]).astype(np.float32)
        halves = records.even_SLE, records.odd_SLE
        parts.append(_Part(records.sample, loss, *halves, records.counts_SLE.astype(np.uint16), pooled))
    answers = _read_answers(model, panel, layout)
    gathered = layout.gather_objects((_joined(parts), answers))
    if gathered is None:
        return None
    found = _joined([part for part, _ in gathered])
    order = np.argsort(found.sample)
    assert np.array_equal(found.sample[order], np.arange(len(panel)))  # each sample is read once
    return PanelReading(
        step=step,
        loss=found.loss[order],
        even=_mean(found.even[order]),
        odd=_mean(found.odd[order]),
        counts=found.counts[order],
        inputs=found.inputs[order],
        answers=join_answers([own for _, own in gathered]),
    )


@dataclass(frozen=True)
class _Part:
    """What was read of some samples; as in `PanelReading`, but for sums of probabilities over tokens."""

    sample: np.ndarray  # int64 [Q], index in the panel
    loss: np.ndarray
    even: np.ndarray
    odd: np.ndarray
    counts: np.ndarray
    inputs: np.ndarray


def _no_samples(model: Transformer, inputs: bool) -> _Part:
    settings = model.settings
    routing = np.zeros((0, settings.num_hidden_layers, settings.recorded_experts), np.float32)
    pooled = np.zeros((0, settings.num_hidden_layers, settings.hidden_size if inputs else 0), np.float32)
    return _Part(np.zeros(0, np.int64), np.zeros(0, np.float32), routing, routing, routing.astype(np.uint16), pooled)


def _joined(parts: Sequence[_Part]) -> _Part:
    """The samples of all parts, one after the other."""
    return _Part(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(_Part)))


def _read_answers(model: Transformer, panel: Panel, layout: ParallelLayout) -> AnswerRouting:
    """The answer tokens of this rank's share of the seen samples that mark a short answer; all ranks must call."""
    chosen = np.flatnonzero(short_answers(panel.stream) & (panel.cell == SEEN))
    found = [no_answers(model.settings.num_hidden_layers, model.settings.recorded_experts)]
    if len(chosen):
        stream = panel.stream.select(chosen)
        for number in layout.share(stream.steps):
            layout.progress.mark()
            found.append(read_answers(model, stream.batch(number, 0, stream.full_rows(number)), stream, layout))
    answers = join_answers(found)
    return replace(answers, member=chosen[answers.member].astype(np.int32))


def _mean_inputs(
    inputs_LBRD: torch.Tensor, compared_BS: torch.Tensor, even_SLE: np.ndarray, odd_SLE: np.ndarray
) -> np.ndarray:
    """Mean layer inputs of a batch's recorded samples, [S, L, D]. The sum of probabilities is the number of tokens."""
    slots = compared_BS.flatten().nonzero()[:, 0].to(inputs_LBRD.device)
    layers, rows, halves, width = inputs_LBRD.shape
    sums_SLD = inputs_LBRD.view(layers, rows * halves // 2, 2, width).sum(2)[:, slots].transpose(0, 1).cpu().numpy()
    return sums_SLD / (even_SLE + odd_SLE).sum(-1, keepdims=True)


def _mean(sums: np.ndarray) -> np.ndarray:
    """Mean probabilities from their sums over tokens; zero without tokens."""
    return sums / np.maximum(sums.sum(-1, keepdims=True), np.finfo(np.float32).tiny)


def reading_steps(steps: int, readings: int) -> frozenset[int]:
    """Steps after which the panel is read: evenly spaced, including step 0 and the last."""
    return frozenset(round(steps * number / max(1, readings - 1)) for number in range(readings))
