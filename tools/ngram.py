"""Interpolated Kneser-Ney n-grams: the baseline that a language model must beat on held-out text.

    python tools/ngram.py runs/quickstart --orders 2 5

The n-grams are trained on the samples that the run trained on and tested on the samples of its validation loss: once on
all domains together, once on the tested domain alone.

P_n(w | h) = (max(a(hw) - D_n, 0) + D_n N(h) P_{n-1}(w | h')) / A(h), where h' is the context h without its first token,
a(hw) is the count of hw at the highest order and the number of distinct tokens before hw at lower orders, A(h) is the
sum and N(h) the number of the a(hw) above zero, and P_0 = 1 / vocabulary. P_n is P_{n-1} for an unseen context. Each
order has one discount D_n = n1 / (n1 + 2 n2), with n1, n2 the numbers of n-grams with a = 1, 2 (Ney, Essen & Kneser
1994; Kneser & Ney 1995; interpolated as in Chen & Goodman 1999). No token precedes the first token of a sequence: an
n-gram that starts there counts by its occurrences, and contexts near the start are shorter.

Shape suffixes: T all tokens, training and then test; K n-grams by number; C contexts by number; P predicted tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common.command_line import make_parser, reports_errors, write_json
from numpy.typing import NDArray

from moetrain.config import SettingsError, load_settings
from moetrain.data.corpus import prepare_corpus
from moetrain.data.errors import DataError
from moetrain.data.stream import Stream, training_stream, validation_streams
from moetrain.loggers.terminal import Terminal

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

NO_SINGLES_DISCOUNT = 0.5  # if no n-gram occurs once: 0 would give unseen tokens no probability


def kneser_ney_nats(train: Sequence[NDArray[Any]], test: Sequence[NDArray[Any]], order: int, vocab_size: int) -> float:
    """Total negative log probability, in nats, of the test tokens except the first of each sequence.

    Contexts do not cross sequences. In every context the probabilities of the `vocab_size` tokens sum to 1.

    Args:
        train, test: 1-D integer arrays, each from its begin mark to its end mark.

    Raises:
        ValueError: an order or vocabulary below 1, or a token outside 0 .. vocab_size - 1.
    """
    if order < 1 or vocab_size < 1:
        raise ValueError(f"order and vocab_size must be at least 1, got {order} and {vocab_size}")
    # N-grams of training and test text are numbered together, so that equal n-grams have equal numbers.
    tokens_T = np.concatenate([np.zeros(0, np.int64), *train, *test]).astype(np.int64)
    if tokens_T.size and not 0 <= tokens_T.min() <= tokens_T.max() < vocab_size:
        raise ValueError(f"tokens must be in 0..{vocab_size - 1}, got {tokens_T.min()}..{tokens_T.max()}")
    place_T = np.concatenate([np.zeros(0, np.int64), *(np.arange(len(sequence)) for sequence in (*train, *test))])
    in_train_T = np.arange(tokens_T.size) < sum(map(len, train))
    predicted_P = np.flatnonzero(~in_train_T & (place_T > 0))

    probability_P = np.full(predicted_P.size, 1 / vocab_size)
    context_T = np.zeros_like(tokens_T)  # the number of the n - 1 tokens before each token
    gram_T = tokens_T  # the number of the n tokens that end with each token
    for n in range(1, order + 1):
        # N-grams that cross the start of a sequence are numbered too; the masks below exclude them.
        next_context_T = np.roll(gram_T, 1)
        longer_T = np.unique(next_context_T * vocab_size + tokens_T, return_inverse=True)[1]
        trained_T = in_train_T & (place_T >= max(n - 1, 1))  # a training n-gram ends here, other than a begin mark
        count_K = _counts(gram_T, longer_T, trained_T, trained_T & (place_T == n - 1), highest=n == order)
        here_P = place_T[predicted_P] >= n - 1
        at = predicted_P[here_P]
        probability_P[here_P] = _interpolated(probability_P[here_P], count_K, gram_T, context_T, trained_T, at)
        context_T, gram_T = next_context_T, longer_T
    return float(-np.log(probability_P).sum())


def _counts(gram_T: Ints, longer_T: Ints, trained_T: Mask, starting_T: Mask, highest: bool) -> Ints:
    """[K] a() of every n-gram: occurrences at the highest order, else the number of distinct tokens before it."""
    size = int(gram_T.max(initial=0)) + 1
    if highest:
        return np.bincount(gram_T[trained_T], minlength=size)
    preceded = _one_end_each(longer_T, trained_T & ~starting_T)
    return np.bincount(gram_T[preceded], minlength=size) + np.bincount(gram_T[starting_T], minlength=size)


def _interpolated(lower_P: Floats, count_K: Ints, gram_T: Ints, context_T: Ints, trained_T: Mask, at: Ints) -> Floats:
    """[P] P_n of the tokens at the positions `at`, given their P_{n-1}."""
    ends = _one_end_each(gram_T, trained_T)
    size = int(context_T.max(initial=0)) + 1
    sum_C = np.bincount(context_T[ends], count_K[gram_T[ends]], size)
    kinds_C = np.bincount(context_T[ends], minlength=size)
    singles, doubles = np.count_nonzero(count_K == 1), np.count_nonzero(count_K == 2)
    discount = singles / (singles + 2 * doubles) if singles else NO_SINGLES_DISCOUNT

    sum_P, kinds_P = sum_C[context_T[at]], kinds_C[context_T[at]]
    kept_P = np.maximum(count_K[gram_T[at]] - discount, 0)
    return np.where(sum_P > 0, (kept_P + discount * kinds_P * lower_P) / np.maximum(sum_P, 1), lower_P)


def _one_end_each(gram_T: Ints, mask_T: Mask) -> Ints:
    """For every distinct n-gram that ends in the mask, one position where it does."""
    places = np.flatnonzero(mask_T)
    place_K = np.full(int(gram_T.max(initial=0)) + 1, -1)
    place_K[gram_T[places]] = places
    return place_K[place_K >= 0]


def baselines(run: Path, orders: Sequence[int], terminal: Terminal | None = None) -> dict[str, dict[str, float]]:
    """Held-out bits per byte of a finished run by domain: ``model``, and ``N-gram`` and ``N-gram alone`` of each order.

    The latter is trained on the domain's own samples alone.

    Raises:
        FileNotFoundError: the run has no summary.
    """
    terminal = terminal or Terminal(speaks=False)
    settings = load_settings(run / "config.yaml")
    summary = json.loads((run / "summary.json").read_text())
    corpus = prepare_corpus(settings, terminal.preparing)
    stream = training_stream(corpus, settings)
    seen = stream.rows.samples[: stream.rows.starts[min(summary["steps"] * stream.batch_rows, len(stream.rows))]]
    size, token_bytes = corpus.tokenizer.vocab_size, corpus.tokenizer.token_bytes()
    found: dict[str, dict[str, float]] = {}
    for number, (name, heldout) in enumerate(validation_streams(corpus, settings, 1).items()):
        terminal.preparing("counting n-grams", number, len(corpus.domains))
        test = _sequences(heldout, heldout.rows.samples)
        bits = math.log(2) * sum(int(token_bytes[sequence].sum()) for sequence in test)
        found[name] = {"model": summary["domains"][name]["metrics"]["bits_per_byte"]["value"]}
        own = seen[stream.samples.domain[seen] == number]
        for order in orders:
            for kind, samples in ((f"{order}-gram", seen), (f"{order}-gram alone", own)):
                found[name][kind] = kneser_ney_nats(_sequences(stream, samples), test, order, size) / bits
    return found


def _sequences(stream: Stream, samples: Ints) -> list[Ints]:
    return [stream.sequence(int(sample)) for sample in samples]


@reports_errors(SettingsError, DataError, OSError)
def main(arguments: list[str] | None = None) -> int:
    """Print the baselines of a run, and those that the model does not beat; returns the exit status, 2 for no run."""
    parser = make_parser(__doc__)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--orders", type=_order, nargs="+", default=[2], help="orders of the n-grams (default 2)")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args(arguments)
    terminal = Terminal()
    found = baselines(options.run, options.orders, terminal)
    kinds = list(next(iter(found.values())))
    rows = [[name, *(f"{row[kind]:.3f}" for kind in kinds)] for name, row in found.items()]
    terminal.table("held-out bits/byte", ["domain", *kinds], rows)
    write_json(options.json, found)
    for kind in kinds[1:]:
        if better := [name for name, row in found.items() if row[kind] < row["model"]]:
            terminal.note(f"the model does not reach {kind} in {', '.join(better)}")
    return 0


def _order(text: str) -> int:
    if not (text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not an order: give 1 or more")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
