"""The one-epoch stream. Each row is a pure function of (seed, step), so a run can resume at any step.

Shapes: B rows, T tokens per row, S samples per row (padded), N spans.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from functools import cached_property

import numpy as np
import torch

from moetrain.config import Settings
from moetrain.data.batch import IGNORED, Batch
from moetrain.data.corpus import Corpus
from moetrain.data.documents import DataError
from moetrain.data.packing import MARKS, Rows, Samples, cut_samples, pack_rows
from moetrain.data.stages import Stage, stage_order, stages


class Stream:
    """Packed rows in a fixed order, in steps of ``batch_rows`` rows.

    With ``truncated``, the samples are cut short, for evaluation: their end mark is not predicted, and if a document
    marks its answer, only the answer is predicted.

    Attributes:
        stages: of a training stream, each with the stream as it was planned at the stage's begin.
    """

    stages: Sequence[tuple[Stage, Stream]] = ()

    def __init__(
        self,
        corpus: Corpus,
        settings: Settings,
        samples: Samples,
        rows: Rows,
        batch_rows: int,
        truncated: bool = False,
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
        self._pack_window, self._seed = settings.data.pack_window, settings.run.seed
        self._truncated = truncated
        # A multiple of 8, so that similar streams share shapes.
        self.most_samples = -(-rows.most_samples // 8) * 8

    def select(self, chosen: np.ndarray) -> Stream:
        """A stream of some samples only, each once, in rows that hold no others; it numbers them from 0."""
        selected = copy(self)
        for name in ("text_of_sample", "text_of_document", "exposures", "answered"):  # cached, of all samples
            selected.__dict__.pop(name, None)
        selected.samples = self.samples.take(chosen)
        lengths = selected.samples.row_lengths
        selected.rows = pack_rows(np.arange(len(chosen)), lengths, self._seq_len, max(1, len(chosen)), seed=0)
        selected.most_samples = -(-selected.rows.most_samples // 8) * 8
        return selected

    def stop_repeats(self, domains: Sequence[int], step: int) -> None:
        """From the row after ``step`` steps on, leave out the texts of some domains that rows before it hold.

        Their texts that have not been met stay, once each. The rest keeps its order and is packed again; rows before
        are not changed. Which rows follow is a pure function of the rows so far, so that a resumed run can repeat it.
        """
        before, after = self._split(step)
        text = self.text_of_sample
        first_in_rest = np.zeros(len(after), bool)
        first_in_rest[np.unique(text[after], return_index=True)[1]] = True
        fresh = first_in_rest & ~np.isin(text[after], text[before])
        rest = after[fresh | ~np.isin(self.samples.domain[after], list(domains))]
        # The number of slots per row is fixed: rows that hold more samples become several.
        packed = [
            part
            for row in self._packed(rest)
            for part in np.split(row, range(self.most_samples, len(row), self.most_samples))
        ]
        self._replace_rows(step, packed)

    def followed_by(self, step: int, rest: np.ndarray) -> Stream:
        """The stream's rows of its first ``step`` steps, and then those of other samples in the order of ``rest``."""
        changed = copy(self)
        packed = changed._packed(rest)
        most = max((len(row) for row in packed), default=1)
        changed.most_samples = max(self.most_samples, -(-most // 8) * 8)
        changed._replace_rows(step, packed)
        return changed

    def trained(self, step: int) -> np.ndarray:
        """The samples of the first ``step`` steps, in the stream's order."""
        return self._split(step)[0]

    def _split(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """The samples of the rows before and after so many steps."""
        end = self.rows.starts[min(step * self.batch_rows, len(self.rows))]
        return self.rows.samples[:end], self.rows.samples[end:]

    def _packed(self, order: np.ndarray) -> list[np.ndarray]:
        packed = pack_rows(order, self.samples.row_lengths, self._seq_len, self._pack_window, self._seed)
        return [packed.row(number) for number in range(len(packed))]

    def _replace_rows(self, step: int, rows: Sequence[np.ndarray]) -> None:
        """Put other rows in the place of those after so many steps."""
        before, _ = self._split(step)
        starts = self.rows.starts[: min(step * self.batch_rows, len(self.rows)) + 1]
        ends = starts[-1] + np.cumsum(np.array([len(row) for row in rows], np.int64))
        self.rows = Rows(np.concatenate([starts, ends]), np.concatenate([before, *rows]))
        self.__dict__.pop("exposures", None)

    @property
    def steps(self) -> int:
        """Steps of the whole stream; the last one may end in empty rows."""
        return -(-len(self.rows) // self.batch_rows)

    def full_rows(self, step: int) -> int:
        """Rows of a step (0 the first) that hold samples, over all ranks; 1 at least, which may be empty.

        A forward pass needs no more rows; training keeps the empty rows of its last step, to have one shape.
        """
        return max(1, min(self.batch_rows, len(self.rows) - step * self.batch_rows))

    def predicted_tokens(self, step: int) -> int:
        """Tokens predicted in a step (0 the first), over all ranks."""
        return self.real_tokens(step) - self._step_samples(step).size

    def real_tokens(self, step: int) -> int:
        """Tokens of a step without padding, over all ranks."""
        return int(self.samples.row_lengths[self._step_samples(step)].sum())

    def _step_samples(self, step: int) -> np.ndarray:
        first = step * self.batch_rows
        last = min(first + self.batch_rows, len(self.rows))
        return self.rows.samples[self.rows.starts[first] : self.rows.starts[last]]

    def fullness(self) -> float:
        """Share of the tokens of all rows that is not padding."""
        filled = self.samples.row_lengths[self.rows.samples].sum()
        return float(filled) / (len(self.rows) * self._seq_len)

    def batch(self, step: int, first: int, count: int) -> Batch:
        """Rows ``first`` to ``first + count`` of a step (0 the first).

        Raises:
            DataError: a token id is outside the vocabulary.
        """
        shape, sample_shape = (count, self._seq_len), (count, self.most_samples)
        tokens = np.full(shape, self._end, np.int64)
        targets = np.full(shape, IGNORED, np.int64)
        positions = np.zeros(shape, np.int64)
        slots = np.full(shape, -1, np.int64)
        recorded = np.full(shape, -1, np.int64)
        samples, domains = np.full(sample_shape, -1, np.int64), np.full(sample_shape, -1, np.int64)
        compared = np.zeros(sample_shape, bool)
        spans: list[tuple[int, int]] = []
        for row in range(count):
            number = step * self.batch_rows + first + row
            place = 0
            for slot, sample in enumerate(self.rows.row(number) if number < len(self.rows) else ()):
                text = self._text(int(sample))
                length = len(text) + MARKS
                here = slice(place, place + length)
                tokens[row, here] = np.concatenate([[self._begin], text, [self._end]])
                begin, end = (place + offset for offset in self._predicted_range(int(sample), length))
                targets[row, begin:end] = tokens[row, begin + 1 : end + 1]
                positions[row, here] = np.arange(length)
                slots[row, here] = slot
                samples[row, slot], domains[row, slot] = sample, self.samples.domain[sample]
                panel_tokens = self._panel_tokens[domains[row, slot]]
                if len(text) >= panel_tokens:
                    compared[row, slot] = True
                    recorded[row, place + 1 : place + 1 + panel_tokens] = 2 * slot + np.arange(panel_tokens) % 2
                spans.append((row * self._seq_len + place, length))
                place += length
            if place < self._seq_len:
                spans.append((row * self._seq_len + place, self._seq_len - place))
                positions[row, place:] = np.arange(self._seq_len - place)
        token_domains = np.where(targets == IGNORED, -1, domains[np.arange(count)[:, None], slots])
        return Batch(
            tokens_BT=torch.from_numpy(tokens),
            targets_BT=torch.from_numpy(targets),
            positions_BT=torch.from_numpy(positions),
            slots_BT=torch.from_numpy(slots),
            domains_BT=torch.from_numpy(token_domains),
            recorded_BT=torch.from_numpy(recorded),
            spans_N2=torch.from_numpy(np.asarray(spans, np.int64)),
            samples_BS=torch.from_numpy(samples),
            domains_BS=torch.from_numpy(domains),
            compared_BS=torch.from_numpy(compared),
        )

    @cached_property
    def text_of_sample(self) -> np.ndarray:
        """A number of each sample's text, int64 [samples]; copies of a text share it, as they share their tokens."""
        places = np.stack([self.samples.domain.astype(np.int64), self.samples.start])
        return np.unique(places, axis=1, return_inverse=True)[1].reshape(-1)

    @cached_property
    def text_of_document(self) -> np.ndarray:
        """A number of the text of a sample's whole document, int64 [samples]; copies of a document share it."""
        start = self.samples.start - self.samples.piece.astype(np.int64) * (self._seq_len - MARKS)
        places = np.stack([self.samples.domain.astype(np.int64), start])
        return np.unique(places, axis=1, return_inverse=True)[1].reshape(-1)

    @cached_property
    def exposures(self) -> np.ndarray:
        """How often the stream holds a sample's text before that sample, int64 [samples]; 0 outside of the stream."""
        order = self.rows.samples
        text = self.text_of_sample[order]
        by_text = np.argsort(text, kind="stable")
        first = np.searchsorted(text[by_text], text[by_text], side="left")
        exposures = np.zeros(len(self.samples), np.int64)
        exposures[order[by_text]] = np.arange(len(order)) - first
        return exposures

    @cached_property
    def answered(self) -> np.ndarray:
        """Whether the document of a sample marks an answer and the sample holds all of it, bool [samples]."""
        samples = self.samples
        return (samples.answer_length > 0) & (samples.answer_start + samples.answer_length <= samples.length)

    def _predicted_range(self, sample: int, length: int) -> tuple[int, int]:
        """The tokens (first, one past the last) of a sample from which the next one is predicted."""
        if not self._truncated:
            return 0, length - 1
        # Text token j is at j + 1, after the begin mark, and is predicted from j.
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

    def predicted_text(self, sample: int) -> np.ndarray:
        """Ids of the text tokens of a sample that are predicted: its answer in a truncated stream, if it has one."""
        text = self._text(sample)
        begin, end = self._predicted_range(sample, len(text) + MARKS)
        return text[begin:end]  # text token j is predicted from position j

    def sequence(self, sample: int) -> np.ndarray:
        """Token ids of a sample with its marks, int64."""
        return np.concatenate([[self._begin], self._text(sample), [self._end]]).astype(np.int64)


def training_stream(corpus: Corpus, settings: Settings) -> Stream:
    """The run's training stream.

    Where the run went on from a checkpoint with other data, the rows of its earlier stages stay as they were trained
    on, and no sample of them comes again.

    Raises:
        DataError: a domain has fewer tokens than one step.
    """
    data, seed, names = settings.data, settings.run.seed, list(settings.data.domains)
    samples = cut_samples(corpus, data.seq_len, heldout=False)
    _check_size(corpus, samples, settings)
    within = [domain.repeats_within for domain in data.domains.values()]
    first, *later = stages(data)
    order = stage_order(samples, np.zeros(0, np.int64), first, names, seed, within)
    rows = pack_rows(order, samples.row_lengths, data.seq_len, data.pack_window, seed)
    stream = Stream(corpus, settings, samples, rows, settings.train.batch_rows)
    found = [(first, copy(stream))]
    stopped: list[int] = []
    for stage in later:
        before = found[-1][0]
        for step, numbers in before.stops:
            stream.stop_repeats(numbers, step)
            stopped += numbers
        if not stage.mixes_as(before):
            rest = stage_order(samples, stream.trained(stage.begin), stage, names, seed, within)
            stream = stream.followed_by(stage.begin, rest)
            if stopped:
                stream.stop_repeats(stopped, stage.begin)
        found.append((stage, copy(stream)))
    stream.stages = found
    return stream


def run_steps(stream: Stream, settings: Settings) -> int:
    """Steps of a run: those of its stream, or ``train.max_steps`` if that is less."""
    return min(stream.steps, settings.train.max_steps or stream.steps)


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
    """Error message for a domain without held-out text."""
    return (
        f"data.domains.{name}: none of its {documents} documents is held out: "
        f"give it more documents, or raise data.heldout_share (now {settings.data.heldout_share})"
    )


def validation_streams(corpus: Corpus, settings: Settings, batch_rows: int) -> dict[str, Stream]:
    """Per domain, a stream of held-out samples, a seeded choice of at most ``train.eval_tokens`` tokens.

    Raises:
        DataError: a domain has no held-out text.
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
    """Text tokens of each domain in steps ``first`` (0 the first) to before ``last``, int64 [domains]."""
    rows = [min(step * stream.batch_rows, len(stream.rows)) for step in (first, last)]
    samples = stream.rows.samples[stream.rows.starts[rows[0]] : stream.rows.starts[rows[1]]]
    counts = np.bincount(stream.samples.domain[samples], weights=stream.samples.length[samples], minlength=domains)
    return counts.astype(np.int64)
