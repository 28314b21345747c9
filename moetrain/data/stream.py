"""The one-epoch stream: every row a pure function of (seed, step), so a run can go on at any step.

Shapes: B rows, T tokens a row, S samples a row (padded), N spans.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
import torch

from moetrain.config import Settings
from moetrain.data.corpus import Corpus
from moetrain.data.documents import DataError
from moetrain.data.mixture import order_by_size, order_by_weights
from moetrain.data.packing import MARKS, Rows, Samples, cut_samples, pack_rows
from moetrain.device_transfer import to_device
from moetrain.model_input import PackedTokens

IGNORED = -100
"""Target of a token that nothing is predicted from: a sample's end mark, and padding."""


@dataclass(frozen=True)
class Batch:
    """Packed rows as tensors; what the model needs, and what ties its answers to samples and domains."""

    tokens_BT: torch.Tensor  # int64, padding is the end mark
    targets_BT: torch.Tensor  # int64, IGNORED where nothing is predicted
    positions_BT: torch.Tensor  # int64, from 0 in each sample
    slots_BT: torch.Tensor  # int64, which of the row's samples a token belongs to, -1 for padding
    domains_BT: torch.Tensor  # int64, the domain a predicted token counts for, -1 where nothing is predicted
    recorded_BT: torch.Tensor  # int64, 2 * slot + parity of the text tokens whose routing counts, else -1
    spans_N2: torch.Tensor  # int64 on the CPU: (start, length) of each sample and of each row's padding, in [B * T]
    samples_BS: torch.Tensor  # int64 on the CPU, number of the sample, -1 where the row has fewer
    domains_BS: torch.Tensor  # int64 on the CPU, -1 likewise
    compared_BS: torch.Tensor  # bool on the CPU, whether the sample is long enough for its first tokens to be compared

    def model_input(self, by_sample: bool = True) -> PackedTokens:
        """The input of `moetrain.models.transformer.Transformer`; without ``by_sample`` no routing sums per sample."""
        return PackedTokens(
            tokens_BT=self.tokens_BT,
            targets_BT=self.targets_BT,
            positions_BT=self.positions_BT,
            slots_BT=self.slots_BT,
            recorded_BT=self.recorded_BT,
            spans_N2=self.spans_N2,
            slots_per_row=self.samples_BS.shape[1] if by_sample else 0,
        )

    def sum_by_sample(self, values_BT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Values of predicted tokens summed by sample, and how many there are: two float64 arrays [B, S]."""
        rows, slots = self.samples_BS.shape
        predicted = self.targets_BT.cpu().numpy() != IGNORED
        place = (np.arange(rows)[:, None] * slots + self.slots_BT.cpu().numpy())[predicted]
        sums = np.bincount(place, values_BT[predicted], rows * slots)
        return sums.reshape(rows, slots), np.bincount(place, minlength=rows * slots).reshape(rows, slots).astype(float)

    def each_predicted(self, chosen_BS: torch.Tensor) -> tuple[torch.Tensor, int]:
        """``recorded_BT`` and the samples a row that have each token by itself which another is predicted from.

        Args:
            chosen_BS: bool, the samples whose tokens they are.

        In place of ``2 * slot + parity`` these tokens hold 0, 1, ... in order of their place in the row, the others -1.
        The number of samples leaves room for them, in steps of 8, so that shapes repeat.
        """
        theirs_BT = chosen_BS.gather(1, self.slots_BT.clamp(min=0))  # nothing is predicted from padding
        mine_BT = theirs_BT & (self.targets_BT != IGNORED)
        recorded_BT = torch.where(mine_BT, mine_BT.cumsum(1) - 1, -1)
        return recorded_BT, -(-int(mine_BT.sum(1).max()) // 16) * 8

    def to(self, device: torch.device) -> Batch:
        """The batch with what the model reads on ``device``; what only the host reads stays."""
        host = ("spans_N2", "samples_BS", "domains_BS", "compared_BS")
        moved = {
            f.name: getattr(self, f.name) if f.name in host else to_device(getattr(self, f.name), device)
            for f in fields(self)
        }
        return Batch(**moved)


class Stream:
    """Rows of samples in their order, cut into steps of ``batch_rows`` rows.

    With ``beginnings``, samples are cut short to be read, not trained on: their end mark stands but is not predicted,
    and where a document marks its answer, the answer alone is.
    """

    def __init__(
        self,
        corpus: Corpus,
        settings: Settings,
        samples: Samples,
        rows: Rows,
        batch_rows: int,
        beginnings: bool = False,
    ) -> None:
        self.samples = samples
        self.rows = rows
        self.batch_rows = batch_rows
        self._tokens = [domain.tokens for domain in corpus.domains]
        self._begin, self._end = corpus.tokenizer.begin_id, corpus.tokenizer.end_id
        self._vocab_size = corpus.tokenizer.vocab_size
        self._names = [domain.name for domain in corpus.domains]
        self._panel_tokens = np.array([settings.panel_tokens(name) for name in self._names])
        self._seq_len = settings.data.seq_len
        self._beginnings = beginnings
        # A multiple of 8, so that streams that differ a little still share shapes.
        self.most_samples = -(-rows.most_samples // 8) * 8

    @property
    def steps(self) -> int:
        """Steps that the whole stream takes; the last one may end in empty rows."""
        return -(-len(self.rows) // self.batch_rows)

    def predicted_tokens(self, step: int) -> int:
        """Tokens predicted in a whole step (0 the first), over all processes."""
        return self.real_tokens(step) - self._step_samples(step).size

    def real_tokens(self, step: int) -> int:
        """Tokens of a whole step without padding."""
        return int(self.samples.row_lengths[self._step_samples(step)].sum())

    def _step_samples(self, step: int) -> np.ndarray:
        first = step * self.batch_rows
        last = min(first + self.batch_rows, len(self.rows))
        return self.rows.samples[self.rows.starts[first] : self.rows.starts[last]]

    def fullness(self) -> float:
        """Share of the rows' places that hold tokens of samples."""
        filled = self.samples.row_lengths[self.rows.samples].sum()
        return float(filled) / (len(self.rows) * self._seq_len)

    def batch(self, step: int, first: int, count: int) -> Batch:
        """Rows ``first`` to ``first + count`` of a step (0 the first)."""
        shape, slots = (count, self._seq_len), (count, self.most_samples)
        tokens = np.full(shape, self._end, np.int64)
        targets = np.full(shape, IGNORED, np.int64)
        positions = np.zeros(shape, np.int64)
        owner = np.full(shape, -1, np.int64)
        recorded = np.full(shape, -1, np.int64)
        samples, domains, whole = np.full(slots, -1, np.int64), np.full(slots, -1, np.int64), np.zeros(slots, bool)
        spans: list[tuple[int, int]] = []
        for row in range(count):
            number = step * self.batch_rows + first + row
            place = 0
            for slot, sample in enumerate(self.rows.row(number) if number < len(self.rows) else ()):
                text = self._text(int(sample))
                length = len(text) + MARKS
                here = slice(place, place + length)
                tokens[row, here] = np.concatenate([[self._begin], text, [self._end]])
                begin, end = (place + place_in_sample for place_in_sample in self._predicted(int(sample), length))
                targets[row, begin:end] = tokens[row, begin + 1 : end + 1]
                positions[row, here] = np.arange(length)
                owner[row, here] = slot
                samples[row, slot], domains[row, slot] = sample, self.samples.domain[sample]
                compared = self._panel_tokens[domains[row, slot]]
                if len(text) >= compared:
                    whole[row, slot] = True
                    recorded[row, place + 1 : place + 1 + compared] = 2 * slot + np.arange(compared) % 2
                spans.append((row * self._seq_len + place, length))
                place += length
            if place < self._seq_len:
                spans.append((row * self._seq_len + place, self._seq_len - place))
                positions[row, place:] = np.arange(self._seq_len - place)
        rows = np.arange(count)[:, None]
        token_domains = np.where(targets == IGNORED, -1, domains[rows, owner])
        arrays = (
            tokens,
            targets,
            positions,
            owner,
            token_domains,
            recorded,
            np.asarray(spans, np.int64),
            samples,
            domains,
            whole,
        )
        return Batch(*map(torch.from_numpy, arrays))

    @cached_property
    def answered(self) -> np.ndarray:
        """Whether a sample's document marks an answer and the sample holds all of it, bool [samples]."""
        samples = self.samples
        return (samples.answer_length > 0) & (samples.answer_start + samples.answer_length <= samples.length)

    def _predicted(self, sample: int, length: int) -> tuple[int, int]:
        """From which to before which of a sample's tokens the next one is predicted."""
        if not self._beginnings:
            return 0, length - 1
        # Text token j stands at j + 1, behind the begin mark, and is predicted from j.
        if self.answered[sample]:
            answer = int(self.samples.answer_start[sample])
            return answer, answer + int(self.samples.answer_length[sample])
        return 0, length - MARKS

    def _text(self, sample: int) -> np.ndarray:
        domain, start = int(self.samples.domain[sample]), int(self.samples.start[sample])
        text = self._tokens[domain][start : start + int(self.samples.length[sample])]
        if len(text) and int(text.max()) >= self._vocab_size:
            raise DataError(
                f"domain {self._names[domain]}: token id {int(text.max())} is outside the vocabulary of "
                f"{self._vocab_size}: remove the cached token files, they are prepared again"
            )
        return text

    def sequence(self, sample: int) -> np.ndarray:
        """One sample's token ids with its marks, int64."""
        return np.concatenate([[self._begin], self._text(sample), [self._end]]).astype(np.int64)


def training_stream(corpus: Corpus, settings: Settings) -> Stream:
    """The run's training stream.

    Raises:
        DataError: less data than one step takes.
    """
    data = settings.data
    samples = cut_samples(corpus, data.seq_len, heldout=False)
    _check_size(corpus, samples, settings)
    within = [domain.repeats_within for domain in data.domains.values()]
    if data.mixture == "weights":
        order = order_by_weights(samples, mixture_phases(settings), settings.run.seed, within)
    else:
        order = order_by_size(samples, settings.run.seed, within)
    rows = pack_rows(order, samples.row_lengths, data.seq_len, data.pack_window, settings.run.seed)
    return Stream(corpus, settings, samples, rows, settings.train.batch_rows)


def mixture_phases(settings: Settings) -> list[tuple[int, list[float]]]:
    """(first token of the stream, weight of each domain) of each phase of a mixture by weights."""
    data = settings.data
    first = [float(domain.weight or 0) for domain in data.domains.values()]
    later = [(phase.from_tokens, [phase.weights.get(name, 0.0) for name in data.domains]) for phase in data.phases]
    return [(0, first), *later]


def _check_size(corpus: Corpus, samples: Samples, settings: Settings) -> None:
    batch_tokens = settings.train.batch_rows * settings.data.seq_len
    for number, domain in enumerate(corpus.domains):
        tokens = int(samples.row_lengths[samples.domain == number].sum())
        if tokens < batch_tokens:
            raise DataError(
                f"data.domains.{domain.name}: {tokens} training tokens are less than one step takes ({batch_tokens}): "
                "give it more text, or lower train.batch_rows or data.seq_len"
            )


def nothing_held_out(name: str, documents: int, settings: Settings) -> str:
    """What is wrong with a domain without held-out text, and what helps."""
    return (
        f"data.domains.{name}: none of its {documents} documents is held out: "
        f"give it more documents, or raise data.heldout_share (now {settings.data.heldout_share})"
    )


def validation_streams(corpus: Corpus, settings: Settings, batch_rows: int) -> dict[str, Stream]:
    """By domain, a seeded choice of held-out samples of about ``train.eval_tokens`` tokens.

    Raises:
        DataError: a domain without any held-out text.
    """
    data = settings.data
    samples = cut_samples(corpus, data.seq_len, heldout=True)
    streams = {}
    for number, domain in enumerate(corpus.domains):
        members = np.flatnonzero(samples.domain == number)
        if not len(members):
            raise DataError(nothing_held_out(domain.name, domain.report.documents, settings))
        order = np.random.default_rng([settings.run.seed, 3, number]).permutation(members)
        within = np.cumsum(samples.row_lengths[order]) <= settings.train.eval_tokens
        within[0] = True
        rows = pack_rows(order[within], samples.row_lengths, data.seq_len, data.pack_window, settings.run.seed)
        streams[domain.name] = Stream(corpus, settings, samples, rows, batch_rows)
    return streams


def stream_tokens(stream: Stream, domains: int, first: int, last: int) -> np.ndarray:
    """Text tokens of each domain that steps ``first`` (0 the first) to before ``last`` meet, int64 [domains]."""
    rows = [min(step * stream.batch_rows, len(stream.rows)) for step in (first, last)]
    met = stream.rows.samples[stream.rows.starts[rows[0]] : stream.rows.starts[rows[1]]]
    counts = np.bincount(stream.samples.domain[met], weights=stream.samples.length[met], minlength=domains)
    return counts.astype(np.int64)
