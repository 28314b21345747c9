"""Slow, literal references in plain Python, and random inputs. Nothing here is imported from the package."""

import math
from itertools import combinations, pairwise

import numpy as np
from hypothesis import strategies as st


def random_weights(samples, layers, experts, seed=0, concentration=0.5):
    """Routing weights [S, L, E] that sum to 1, without ties."""
    return np.random.default_rng(seed).dirichlet(np.full(experts, concentration), size=(samples, layers))


def weights_strategy(min_samples=1, max_samples=6, max_layers=4, max_experts=8, layers=None):
    """Weights from small whole numbers, so that ties are common."""

    @st.composite
    def draw_weights(draw):
        samples = draw(st.integers(min_samples, max_samples))
        depth = layers or draw(st.integers(1, max_layers))
        experts = draw(st.integers(1, max_experts))
        size = samples * depth * experts
        counts = np.array(draw(st.lists(st.integers(0, 4), min_size=size, max_size=size)), dtype=float)
        counts = counts.reshape(samples, depth, experts)
        counts[..., 0] += counts.sum(axis=-1) == 0
        return counts / counts.sum(axis=-1, keepdims=True)

    return draw_weights()


def pathway(weights_LE, tau):
    symbols = []
    for layer, row in enumerate(weights_LE):
        if layer:
            symbols.append(-1)
        total = 0.0
        for expert in sorted(range(len(row)), key=lambda e: (-row[e], e)):
            symbols.append(expert)
            total += float(row[expert])
            if total > tau:
                break
    return symbols


def levenshtein(a, b):
    previous = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        current = [i]
        for j, y in enumerate(b, 1):
            current.append(min(previous[j] + 1, current[j - 1] + 1, previous[j - 1] + (x != y)))
        previous = current
    return previous[-1]


def distance(a, b, normalized):
    return levenshtein(a, b) / max(len(a), len(b)) if normalized else levenshtein(a, b)


def mean_distance_within(weights, tau, normalized):
    sequences = [pathway(w, tau) for w in weights]
    return np.mean([distance(a, b, normalized) for a, b in combinations(sequences, 2)])


def cosine_of(u, v):
    dot = sum(x * y for x, y in zip(u, v, strict=True))
    return dot / math.sqrt(sum(x * x for x in u)) / math.sqrt(sum(y * y for y in v))


def layer_cosines(weights_LE, rows_LED):
    vectors = []
    for weights_E, rows_ED in zip(weights_LE, rows_LED, strict=True):
        vectors.append(
            [sum(g * row[d] for g, row in zip(weights_E, rows_ED, strict=True)) for d in range(len(rows_ED[0]))]
        )
    return [cosine_of(u, v) for u, v in pairwise(vectors)]
