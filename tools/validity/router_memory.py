"""Does the router know which texts it was trained on? Two measures from routing alone, with a control from text alone.

``drift``: how far the mean routing weights of a text have moved since the first reading, in squared distance over all
layers; of seen samples minus of held-out samples, relative to the latter. ``membership``: whether ridge regression on
routing weights tells a domain's seen samples from its held-out ones, as AUC by cross-validation over documents. The
same regression on which tokens a text holds is its control: both cells are drawn alike, so it should be at .5.

Shapes: S samples, F features.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moetrain.routing.panel import HELDOUT, SEEN
from moetrain.routing.store import StoredReading
from validity.separation import auc

FOLDS = 5
RIDGE = 1.0  # relative to the mean squared norm of the centred features
LEAST = 20  # samples per cell


def router_memory(readings: Sequence[StoredReading], texts: Sequence[np.ndarray] | None = None) -> dict[str, dict]:
    """Per domain, ``drift``, ``membership``, ``membership_late`` (last half of the layers) and ``membership_text``.

    Args:
        readings: of a run's panel; the first with seen samples, and the last, are compared.
        texts: token ids of each panel sample; None: no control.
    """
    first, last = next(r for r in readings if r.step > 0), readings[-1]
    layers = last.weights.shape[1]
    found = {}
    for domain in dict.fromkeys(last.domain.tolist()):
        seen, heldout = (np.flatnonzero((last.domain == domain) & (last.cell == cell)) for cell in (SEEN, HELDOUT))
        if min(len(seen), len(heldout)) < LEAST:
            continue
        moved = ((last.weights - first.weights) ** 2).sum((1, 2))
        both = np.concatenate([seen, heldout])
        label = np.arange(len(both)) < len(seen)
        document = last.document[both]
        late = last.weights[both][:, layers // 2 :]
        values = {
            "router/drift": float(moved[seen].mean() / moved[heldout].mean() - 1),
            "router/membership": membership(last.weights[both], label, document),
            "router/membership_late": membership(late, label, document),
        }
        if texts is not None:
            values["text/membership"] = membership(_token_counts([texts[k] for k in both]), label, document)
        found[domain] = values
    return found


def membership(features: np.ndarray, label_S: np.ndarray, document_S: np.ndarray) -> float:
    """AUC of predicting a sample's label by ridge regression on the samples of other documents."""
    x_SF = features.reshape(len(label_S), -1).astype(np.float64)
    _, unit_S = np.unique(document_S, return_inverse=True)
    fold_S = np.random.default_rng(0).permutation(unit_S.max() + 1)[unit_S] % FOLDS
    score_S = np.full(len(label_S), np.nan)
    for fold in range(FOLDS):
        fit, held = fold_S != fold, fold_S == fold
        if not held.any() or label_S[fit].all() or not label_S[fit].any():
            continue
        mean_F = x_SF[fit].mean(0)
        x_fit, x_held = x_SF[fit] - mean_F, x_SF[held] - mean_F
        gram = x_fit @ x_fit.T
        penalty = RIDGE * max(np.trace(gram) / len(gram), 1e-12)
        y_fit = label_S[fit] - label_S[fit].mean()
        score_S[held] = x_held @ (x_fit.T @ np.linalg.solve(gram + penalty * np.eye(len(gram)), y_fit))
    known = np.isfinite(score_S)
    return auc(score_S[known & label_S], score_S[known & ~label_S])


def _token_counts(texts: Sequence[np.ndarray]) -> np.ndarray:
    """Relative frequency of each token that occurs, [S, F]."""
    vocabulary, flat = np.unique(np.concatenate(texts), return_inverse=True)
    sample = np.repeat(np.arange(len(texts)), [len(text) for text in texts])
    counts_SF = np.zeros((len(texts), len(vocabulary)))
    np.add.at(counts_SF, (sample, flat), 1)
    return counts_SF / counts_SF.sum(1, keepdims=True)
