"""Interpolated Kneser-Ney n-grams: the baseline that a language model must beat on held-out text.

P_n(w | h) = (max(a(hw) - D_n, 0) + D_n N(h) P_{n-1}(w | h')) / A(h), where h' is the context h without its first token,
a(hw) the count of hw at the highest order and below it the number of different tokens met before hw, A(h) the sum and
N(h) the number of the a(hw) above zero, and P_0 = 1 / vocabulary. An unseen context passes to h' whole. The one
discount of an order is D_n = n1 / (n1 + 2 n2), with n1, n2 the numbers of n-grams whose a is 1, 2 (Ney, Essen & Kneser
1994; Kneser & Ney 1995; interpolated as in Chen & Goodman 1999). Nothing stands before the first token of a sequence,
so an n-gram that starts there counts as often as it occurs, and contexts near the start are as long as there is room.

Shape suffixes: T all tokens, training and then test; K n-grams by number; C contexts by number; P predicted tokens.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

NO_SINGLES_DISCOUNT = 0.5  # where no n-gram was met once: 0 would leave unseen tokens no probability


def kneser_ney_nats(train: Sequence[NDArray[Any]], test: Sequence[NDArray[Any]], order: int, vocab_size: int) -> float:
    """Return the total negative log probability, in nats, of the test tokens but the first of each sequence.

    Each sequence is a 1-D integer array that starts with its begin mark and ends with its end mark; no context reaches
    into another. In every context the probabilities of the `vocab_size` tokens sum to 1. Raises ValueError for an order
    or vocabulary under 1 and for a token outside 0 .. vocab_size - 1.
    """
    if order < 1 or vocab_size < 1:
        raise ValueError(f"order and vocab_size must be at least 1, got {order} and {vocab_size}")
    # Training and test text are numbered together: equal n-grams have equal numbers, and no table is searched.
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
        # What reaches back over the start of a sequence is numbered too; the places below leave it aside.
        next_context_T = np.roll(gram_T, 1)
        longer_T = np.unique(next_context_T * vocab_size + tokens_T, return_inverse=True)[1]
        trained_T = in_train_T & (place_T >= max(n - 1, 1))  # a training n-gram ends here, and not with a begin mark
        count_K = _counts(gram_T, longer_T, trained_T, trained_T & (place_T == n - 1), highest=n == order)
        here_P = place_T[predicted_P] >= n - 1
        at = predicted_P[here_P]
        probability_P[here_P] = _interpolated(probability_P[here_P], count_K, gram_T, context_T, trained_T, at)
        context_T, gram_T = next_context_T, longer_T
    return float(-np.log(probability_P).sum())


def _counts(gram_T: Ints, longer_T: Ints, trained_T: Mask, starting_T: Mask, highest: bool) -> Ints:
    """Return a() of every n-gram: occurrences at the highest order, else kinds of tokens met before it."""
    size = int(gram_T.max(initial=0)) + 1
    if highest:
        return np.bincount(gram_T[trained_T], minlength=size)
    preceded = _one_end_each(longer_T, trained_T & ~starting_T)
    return np.bincount(gram_T[preceded], minlength=size) + np.bincount(gram_T[starting_T], minlength=size)


def _interpolated(lower_P: Floats, count_K: Ints, gram_T: Ints, context_T: Ints, trained_T: Mask, at: Ints) -> Floats:
    """Return P_n of the tokens at the places `at`, given their P_{n-1}."""
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
    """Return one of the places in the mask for every different n-gram that ends there."""
    places = np.flatnonzero(mask_T)
    place_K = np.full(int(gram_T.max(initial=0)) + 1, -1)
    place_K[gram_T[places]] = places
    return place_K[place_K >= 0]
