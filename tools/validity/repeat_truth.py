"""The truth of a repeat's worth: controlled continuations of a run from a checkpoint.

From one checkpoint the run is continued for a number of steps in three ways: as it was; with a domain's texts replaced
by fresh texts of the same source; and with them left out. All other texts, their order, the learning rate and the
optimizer's state are the same. The worth of the repeats is what they did for the loss of texts set apart, over what the
fresh texts did, both relative to leaving them out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from moetrain import grokking
from moetrain.checkpoint.manager import load_checkpoint
from moetrain.checkpoint.restore import open_model
from moetrain.data.packing import cut_samples, join_samples, pack_rows
from moetrain.data.stream import Stream
from moetrain.distributed.mesh import ParallelLayout
from moetrain.models.transformer import Transformer
from moetrain.monitoring.repeats import RepeatMonitor
from moetrain.optim.builder import Optimizer, initial_optimizer_state, make_optimizer
from moetrain.optim.schedule import learning_rate
from moetrain.training.balancing import Balancing
from moetrain.training.step import forward_backward, update
from validity.plan import Planned
from validity.readings import with_other_runs
from validity.text_truth import LONGEST, RunData, Texts, losses, rows

STEPS = 40  # of a continuation
FRESH_BYTES = 500_000  # at least so much text of a source is read, in and outside of the run
DOCUMENTS = 120  # set apart
SEED = 12


FILE = "worth.parquet"
STEPS_OF_RUN = (0.3, 0.6, 0.9)  # of a run's steps, at which it is continued


def measure(
    runs: Sequence[Planned], output: Path, progress: Callable[[str, int, int], None] = lambda *_: None
) -> pd.DataFrame:
    """run, domain, step, metric, value, low, high, n of the runs, each continued from three of its checkpoints."""
    parts = []
    for number, planned in enumerate(runs):
        progress(planned.name, number, len(runs))
        continued = Continuations(output / planned.name)
        saved = sorted(
            int(path.name.removeprefix("step_")) for path in (output / planned.name / "checkpoints").iterdir()
        )
        for share in STEPS_OF_RUN:
            distance = {step: abs(step - share * continued.steps) for step in saved}
            step = min(distance, key=distance.__getitem__)
            found = pd.DataFrame(continued.measure(step, continued.repeated()))
            parts.append(found.assign(run=planned.name))
    return pd.concat(parts, ignore_index=True)


def save(table: pd.DataFrame, folder: Path) -> None:
    """Write the worths; those of other runs are kept."""
    with_other_runs(table, folder / FILE).to_parquet(folder / FILE)


def tables(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """True and measured worths per unit, and how far apart they are."""
    worths = table.pivot_table(index=["run", "domain", "step"], columns="metric", values=["value", "low", "high"])
    rows = pd.DataFrame(
        {
            "passes": worths["value", "repeat/passes"],
            "true": worths["value", "true/worth"],
            "true low": worths["low", "true/worth"],
            "true high": worths["high", "true/worth"],
            "measured": worths["value", "repeat/worth"],
            "low": worths["low", "repeat/worth"],
            "high": worths["high", "repeat/worth"],
        }
    ).reset_index()
    known = rows.dropna(subset=["true", "measured"])
    covers = (known["low"] <= known["true"]) & (known["true"] <= known["high"])
    difference = known["measured"] - known["true"]
    summary = pd.DataFrame(
        [
            ("units", float(len(known))),
            ("mean of measured minus true", float(difference.mean())),
            ("root mean square of it", float(np.sqrt((difference**2).mean()))),
            ("rank correlation", float(known["measured"].corr(known["true"], method="spearman"))),
            ("share of intervals that hold the truth", float(covers.mean())),
        ],
        columns=["number", "value"],
    )
    return {"worth of the next pass": rows, "measured against true worth": summary}


class Continuations(RunData):
    """A run's data, with fresh text of its repeated domains."""

    def __init__(self, run: Path) -> None:
        super().__init__(run)
        self.wider = self.wider_corpus(FRESH_BYTES)
        length = self.settings.data.seq_len
        self.samples = join_samples([cut_samples(self.wider, length, heldout) for heldout in (False, True)])
        self._place = {
            (int(domain), int(document), int(piece)): number
            for number, (domain, document, piece) in enumerate(
                zip(self.samples.domain, self.samples.document, self.samples.piece, strict=True)
            )
        }

    def repeated(self) -> list[str]:
        """Domains with repeats whose order of tokens is kept."""
        return [name for name, each in self.settings.data.domains.items() if each.copies > 1 and not each.shuffled]

    def measure(self, step: int, domains: Sequence[str]) -> Iterator[dict[str, object]]:
        """Rows of domain, step, metric, value, low, high, n: the true worth, and the monitor's at the same weights."""
        order = self._next_samples(step)
        model, optimizer = self._open(step)
        monitor = RepeatMonitor(self.panel, self.stream, list(self.settings.data.domains))
        measured = monitor.measure(model, optimizer, step, ParallelLayout())
        as_was = self._continued(step, order)
        for domain in domains:
            number = list(self.settings.data.domains).index(domain)
            own = self.samples.domain[order] == number
            apart, pool = self._fresh(number)
            replaced = order.copy()
            if own.sum() > len(pool):
                continue
            replaced[own] = pool[: own.sum()]
            with_fresh, without = self._continued(step, replaced), self._continued(step, order[~own])
            loss = [losses(each, apart) for each in (as_was, with_fresh, without)]
            found = {"true/worth": _paired(loss), "true/fresh_gain": grokking.mean_of_samples(loss[2] - loss[1])}
            if domain in measured:
                found["repeat/worth"] = measured[domain].worth
                passes = measured[domain].passes
                found["repeat/passes"] = grokking.Estimate(passes, passes, passes, 1, 0)
            yield from rows(domain, step, found)

    def _open(self, step: int) -> tuple[Transformer, Optimizer]:
        folder = self.run / "checkpoints" / f"step_{step:08d}"
        model = open_model(folder, "cpu", torch.float32).model
        model.requires_grad_(True)
        optimizer = make_optimizer(model, self.settings.optim)
        load_checkpoint(folder).states.fill("optimizer", initial_optimizer_state(model, optimizer))
        return model, optimizer

    def _next_samples(self, step: int) -> np.ndarray:
        """The samples of the next steps in the stream's order, as numbers of the wider samples."""
        rows = self.stream.rows
        first, last = step * self.stream.batch_rows, min((step + STEPS) * self.stream.batch_rows, len(rows))
        order = rows.samples[rows.starts[first] : rows.starts[last]]
        samples = self.stream.samples
        # Copies of a document share its place in the token file: the first copy has the id that the wider corpus knows.
        text = self.stream.text_of_document
        first_copy = np.zeros(text.max() + 1, samples.document.dtype)
        first_copy[text[::-1]] = samples.document[::-1]
        keys = zip(samples.domain[order], first_copy[text[order]], samples.piece[order], strict=True)
        return np.array([self._place[int(domain), int(document), int(piece)] for domain, document, piece in keys])

    def _fresh(self, number: int) -> tuple[Texts, np.ndarray]:
        """Texts set apart, and numbers of other fresh samples, of documents that are no part of the run."""
        samples = self.samples
        known = self.corpus.domains[number].index["id"]
        own = np.flatnonzero((samples.domain == number) & ~np.isin(samples.document, known))
        documents = np.random.default_rng([SEED, number]).permutation(np.unique(samples.document[own]))
        apart = own[np.isin(samples.document[own], documents[:DOCUMENTS]) & (samples.piece[own] == 0)]
        pool = own[np.isin(samples.document[own], documents[DOCUMENTS:])]
        tokens, begin = self.wider.domains[number].tokens, self.wider.tokenizer.begin_id
        texts = [
            np.concatenate([[begin], tokens[samples.start[k] : samples.start[k] + min(LONGEST, samples.length[k])]])
            for k in apart
        ]
        zeros = np.zeros(len(apart))
        found = Texts([text.astype(np.int64) for text in texts], samples.document[apart], zeros.astype(int), zeros)
        return found, np.random.default_rng([SEED, number, 1]).permutation(pool)

    def _continued(self, step: int, order: np.ndarray) -> Transformer:
        """The model after the steps that train on some samples."""
        model, optimizer = self._open(step)
        model.train()
        settings, layout = self.settings, ParallelLayout()
        rows = pack_rows(order, self.samples.row_lengths, settings.data.seq_len, 4096, settings.run.seed)
        stream = Stream(self.wider, settings, self.samples, rows, -(-len(rows) // STEPS))
        fewer = settings.train.model_copy(update={"batch_rows": stream.batch_rows, "micro_batch_rows": None})
        settings = settings.model_copy(update={"train": fewer})
        balancing = Balancing(model, settings.model)
        for number in range(stream.steps):
            statistics = forward_backward(layout, model, stream, number, balancing, settings, lambda *_: None)
            rate = learning_rate(min(step + number + 1, self.steps), self.steps, settings.optim)
            _, applied = update(layout, model, optimizer, rate, settings.optim.grad_clip, statistics.loss)
            balancing.after_step(statistics.load_LE, applied)
        return model.eval()


def _paired(loss: Sequence[np.ndarray]) -> grokking.Estimate:
    """The ratio of the two gains over the same texts, with the interval of a ratio of paired means."""
    repeated, fresh = loss[2] - loss[0], loss[2] - loss[1]
    return grokking.mean_per_token(repeated, fresh, np.arange(len(fresh)))
