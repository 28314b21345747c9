"""The truth of the study on natural text: losses of texts that the monitor never reads.

A unit is a domain of a run. Its texts *set apart* are further documents of the same source that are no part of the run,
and held-out documents that are not in its panel. Its texts *trained on* are documents that the run has trained on by
then, outside its panel where enough of them are. The true memorized share is that of these two.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from moetrain import grokking
from moetrain.checkpoint.restore import open_model
from moetrain.config import Settings, load_settings
from moetrain.data.corpus import Corpus, prepare_corpus
from moetrain.data.packing import Samples, cut_samples
from moetrain.data.stream import run_steps, training_stream
from moetrain.model_input import PackedTokens
from moetrain.models.transformer import Transformer
from moetrain.routing.claims import read_claims, swap_first_halves
from moetrain.routing.panel import draw_panel, first_steps
from moetrain.routing.store import read_reading

DOCUMENTS, DOCUMENTS_BEFORE = 80, 40  # of each kind that are read at the last step, and at earlier ones
CLAIMS_AT = (280, 560)  # steps at which the claim ratio is read
OUTSIDE_PANEL = 30  # trained documents outside the panel from which on only they are read
LONGEST = 160  # text tokens of a document that are read
CLAIM_TOKENS = 64  # that the claim ratio is read on; 40 where fewer than 24 texts have so many
CLAIM_SAMPLES = 64
SEED = 11


@dataclass(frozen=True)
class Texts:
    """First pieces of documents: token ids with the begin mark, and the step that first trains on each (0: none)."""

    tokens: list[np.ndarray]
    document: np.ndarray
    first_step: np.ndarray
    difficulty: np.ndarray  # loss under the frequencies of tokens in the domain, nats per token

    def __len__(self) -> int:
        return len(self.tokens)

    def take(self, which: np.ndarray) -> Texts:
        return Texts(
            [self.tokens[k] for k in which], self.document[which], self.first_step[which], self.difficulty[which]
        )

    def without(self, documents: np.ndarray) -> Texts:
        """The texts of all other documents."""
        return self.take(np.flatnonzero(~np.isin(self.document, documents)))


@dataclass(frozen=True)
class Unit:
    domain: str
    trained: Texts
    apart: Texts


class RunData:
    """The data of a finished run, opened again: its stream of ``steps`` steps and its panel."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.settings = load_settings(run / "config.yaml")
        self.corpus = prepare_corpus(self.settings)
        self.stream = training_stream(self.corpus, self.settings)
        self.steps = run_steps(self.stream, self.settings)
        self.panel = draw_panel(self.corpus, self.stream, self.settings, self.steps, self.settings.train.batch_rows)

    def wider_corpus(self, least_bytes: int = 0) -> Corpus:
        """The same sources, met once, with twice the text of each domain, or ``least_bytes`` if that is more."""
        domains = {
            name: domain.model_copy(
                update={"size": max(2 * domain.size, least_bytes) if domain.size else None, "repeats": 1}
            )
            for name, domain in self.settings.data.domains.items()
        }
        model = str(next(self.run.glob("tokenizer*.model")))
        changed = {
            "data": self.settings.data.model_copy(update={"domains": domains}),
            "tokenizer": self.settings.tokenizer.model_copy(update={"model": model}),
        }
        return prepare_corpus(self.settings.model_copy(update=changed))


def units_of_run(data: RunData) -> list[Unit]:
    """The texts of each domain of a finished run."""
    settings, corpus, samples = data.settings, data.corpus, data.stream.samples
    first, wider = first_steps(data.stream, data.steps), data.wider_corpus()
    heldout = cut_samples(corpus, settings.data.seq_len, heldout=True)
    more = [cut_samples(wider, settings.data.seq_len, heldout=part) for part in (True, False)]
    in_panel = data.panel.samples.document
    found = []
    for number, domain in enumerate(corpus.domains):
        count = np.bincount(domain.tokens, minlength=corpus.tokenizer.vocab_size) + 1
        cost = -np.log(count / count.sum())
        trained = _texts(corpus, samples, number, first, cost, settings)
        outside = trained.without(in_panel)
        apart = [_texts(corpus, heldout, number, None, cost, settings).without(in_panel)]
        apart += [_texts(wider, part, number, None, cost, settings).without(domain.index["id"]) for part in more]
        found.append(
            Unit(domain.name, outside if len(outside) >= OUTSIDE_PANEL else trained, _drawn(_joined(apart), number))
        )
    return found


def panel_texts(data: RunData) -> list[np.ndarray]:
    """The text tokens of each panel sample of a run, int64."""
    return [data.panel.stream.sequence(sample)[1:-1] for sample in range(len(data.panel))]


def _texts(
    corpus: Corpus, samples: Samples, domain: int, first: np.ndarray | None, cost: np.ndarray, settings: Settings
) -> Texts:
    """The first pieces of a domain's documents, the first copy of each.

    Args:
        first: the step that first trains on each sample; None: none does.
        cost: loss of each token under the frequencies of tokens.
    """
    chosen = np.flatnonzero(
        (samples.domain == domain) & (samples.piece == 0) & (samples.length >= settings.panel.tokens)
    )
    _, one = np.unique(samples.start[chosen], return_index=True)
    chosen = chosen[np.sort(one)]
    ids, begin = corpus.domains[domain].tokens, corpus.tokenizer.begin_id
    tokens = [
        np.concatenate([[begin], ids[start : start + min(LONGEST, length)]]).astype(np.int64)
        for start, length in zip(samples.start[chosen], samples.length[chosen], strict=True)
    ]
    steps = np.zeros(len(chosen), np.int64) if first is None else first[chosen]
    difficulty = np.array([cost[text[1:]].mean() for text in tokens])
    return Texts(tokens, samples.document[chosen], steps, difficulty)


def _joined(parts: list[Texts]) -> Texts:
    return Texts(
        [tokens for part in parts for tokens in part.tokens],
        np.concatenate([part.document for part in parts]),
        np.concatenate([part.first_step for part in parts]),
        np.concatenate([part.difficulty for part in parts]),
    )


def _drawn(texts: Texts, number: int, most: int = DOCUMENTS) -> Texts:
    order = np.random.default_rng([SEED, number]).permutation(len(texts))
    return texts.take(order[:most])


def measure(data: RunData, steps: list[int]) -> Iterator[dict[str, object]]:
    """Rows of domain, step, metric, value, low, high and n: true losses and shares, and the claim ratio."""
    units = units_of_run(data)
    initial = initial_losses(data.run)
    for step in steps:
        model = open_model(data.run / "checkpoints" / f"step_{step:08d}", "cpu", torch.float32).model
        for number, unit in enumerate(units):
            by_now = (unit.trained.first_step > 0) & (unit.trained.first_step <= step)
            most = DOCUMENTS if step == steps[-1] else DOCUMENTS_BEFORE
            trained = _drawn(unit.trained.take(np.flatnonzero(by_now)), number, most)
            texts_apart = unit.apart.take(np.arange(min(most, len(unit.apart))))
            seen, apart = losses(model, trained), losses(model, texts_apart)
            found = {
                "true/loss_trained": grokking.mean_of_samples(seen),
                "true/loss_apart": grokking.mean_of_samples(apart),
                "true/gap": grokking.memorized_gap(apart, seen),
                "true/share": grokking.memorized_share(
                    apart, seen, initial[unit.domain], None, None, texts_apart.difficulty, trained.difficulty
                ),
            }
            if step in CLAIMS_AT:
                found["claim_ratio"] = claim_ratio(model, trained)
                found["claim_ratio_apart"] = claim_ratio(model, texts_apart)
            yield from rows(unit.domain, step, found)


def rows(domain: str, step: int, found: Mapping[str, grokking.Estimate]) -> Iterator[dict[str, object]]:
    """A row of domain, step, metric, value, low, high and n of each estimate."""
    for name, each in found.items():
        numbers = {"value": each.mean, "low": each.low, "high": each.high, "n": each.samples}
        yield {"domain": domain, "step": step, "metric": name, **numbers}


def initial_losses(run: Path) -> dict[str, float]:
    """Mean loss of each domain's panel before the first step."""
    reading = read_reading(run, 0)
    return {str(name): float(reading.loss[reading.domain == name].mean()) for name in np.unique(reading.domain)}


@torch.no_grad()
def losses(model: Transformer, texts: Texts) -> np.ndarray:
    """Mean loss per token of each text, nats, float64 [texts]."""
    found = np.zeros(len(texts))
    order = np.argsort([len(tokens) for tokens in texts.tokens], kind="stable")
    for start in range(0, len(order), 16):
        chosen = order[start : start + 16]
        longest = max(len(texts.tokens[k]) for k in chosen)
        tokens = np.zeros((len(chosen), longest), np.int64)
        targets = np.full((len(chosen), longest), -100, np.int64)
        for row, k in enumerate(chosen):
            text = texts.tokens[k]
            tokens[row, : len(text)] = text
            targets[row, : len(text) - 1] = text[1:]
        output = model(PackedTokens.one_sample_per_row(torch.from_numpy(tokens), torch.from_numpy(targets)))
        found[chosen] = output.loss_BT.double().sum(1).numpy() / (targets >= 0).sum(1)
    return found


def claim_ratio(model: Transformer, texts: Texts) -> grokking.Estimate:
    """Gain over claim of the second halves of texts."""
    lengths = np.array([len(tokens) - 1 for tokens in texts.tokens])
    size = CLAIM_TOKENS if (lengths >= CLAIM_TOKENS).sum() >= 24 else 40
    chosen = np.flatnonzero(lengths >= size)[:CLAIM_SAMPLES]
    if len(chosen) < 8:
        return grokking.Estimate.undefined(len(chosen))
    tokens = torch.from_numpy(np.stack([texts.tokens[k][: size + 1] for k in chosen]))
    swapped, _ = swap_first_halves(tokens, texts.document[chosen])
    gain, claim = read_claims(model, tokens, swapped)
    return grokking.mean_per_token(gain, claim, texts.document[chosen])
