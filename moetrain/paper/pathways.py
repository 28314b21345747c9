"""Figures 3 and 13: pathways of two samples, and distance against router entropy over pairs of samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moetrain import grokking
from moetrain.grokking.pathway import distances_within
from moetrain.paper.groups import samples_of
from moetrain.paper.results import COLORS, Result, Row, grid, titled
from moetrain.report.open_run import OpenedRun

PAIRS = 141_530  # as the paper's figure
TAU_OF_ENTROPY = 0.8
RESAMPLES = 200


def two_pathways(run: OpenedRun, domain: str | None = None) -> Result:
    """Figure 3, on real samples: the closest and the farthest pair of a domain at the newest reading.

    For each sample its pathway, and the cosines of consecutive layers from which C_i follows.
    """
    samples = samples_of(run, [domain] if domain else None)[0]
    weights, tau = samples.weights[-1], run.setting("monitor.tau")
    pairs = distances_within(weights, tau, run.setting("panel.max_pairs"), seed=0)
    chosen = {"closest": int(pairs.distances.argmin()), "farthest": int(pairs.distances.argmax())}
    paths = grokking.pathways(weights, tau)
    cosines_SL = grokking.layer_cosines(weights, samples.blocks[-1])
    inconsistency_S = grokking.inconsistency(weights, samples.blocks[-1])
    rows: list[Row] = []
    for name, pair in chosen.items():
        for member in (int(pairs.rows[pair]), int(pairs.columns[pair])):
            layers = np.split(paths[member], np.flatnonzero(paths[member] == -1))
            text = "-".join(",".join(map(str, layer[layer >= 0])) for layer in layers)
            rows.append(
                {"panel": name, "series": f"{samples.documents[member]:016x}", "pathway": text}
                | {"distance": float(pairs.distances[pair]), "inconsistency": float(inconsistency_S[member])}
                | {f"cosine_{layer}_{layer + 1}": value for layer, value in enumerate(cosines_SL[member].tolist())}
            )
    facts = {
        "domain": samples.domain,
        "step": int(samples.steps[-1]),
        "tau": tau,
        "mean_distance": pairs.mean(),
        "pairs": len(pairs.distances),
    }

    def picture(plt: Any) -> Any:
        figure, axes = grid(plt, 2, size=(4.4, 3.0))
        for axis, name in zip(axes, chosen, strict=True):
            own = [row for row in rows if row["panel"] == name]
            titled(axis, f"{name} pair: {own[0]['distance']:.0f} edits", x="layer", y="experts, by routing weight")
            _draw_pair(axis, own)
        return figure

    title = f"Figure 3: pathways of two samples, {samples.domain}, step {int(samples.steps[-1]):,}"
    return Result("figure3", title, rows, picture, facts)


def _draw_pair(axis: Any, rows: Sequence[Row]) -> None:
    """Expert numbers by layer and rank, one sample left and one right of each layer; experts of both are marked."""
    by_layer = [[layer.split(",") for layer in row["pathway"].split("-")] for row in rows]
    for layer, (first, second) in enumerate(zip(*by_layer, strict=True)):
        for shift, experts, others, color in ((-0.2, first, second, COLORS[0]), (0.2, second, first, COLORS[1])):
            for rank, expert in enumerate(experts):
                weight = "bold" if expert in others else "normal"
                axis.text(layer + shift, rank, expert, color=color, fontsize=5.5, ha="center", weight=weight)
    deepest = max(len(layer) for sample in by_layer for layer in sample)
    axis.set(xlim=(-0.6, len(by_layer[0]) - 0.4), ylim=(deepest, -1))
    values = [f"C_i = {row['inconsistency']:.2f}" for row in rows]
    axis.text(0.02, 0.02, " and ".join(values), transform=axis.transAxes, fontsize=6)


def router_entropy(weights: np.ndarray) -> np.ndarray:
    """[S] entropy in nats of each sample's mean routing weights [S, L, E], mean over layers."""
    logs = np.log(weights, where=weights > 0, out=np.zeros_like(weights))
    return -(weights * logs).sum(-1).mean(-1)


def entropy_and_distance(run: OpenedRun, domains: Sequence[str] | None = None, pairs: int = PAIRS) -> Result:
    """Figure 13: distance of pairs of samples against the mean of their entropies, over readings and domains.

    Pairs are within and across domains of equal sample length, equally many of each reading. Beside the correlation
    over all pairs, that within each reading: readings differ in both quantities, which correlates them over all pairs
    even where no reading has a correlation.
    """
    each = samples_of(run, domains)
    alike = [samples for samples in each if samples.tokens[0] == each[0].tokens[0]]
    steps = each[0].steps
    budget = max(1, pairs // len(steps))
    entropies, distances, members = [], [], []
    for t in range(len(steps)):
        weights = np.concatenate([samples.weights[t] for samples in alike])
        found = distances_within(weights, TAU_OF_ENTROPY, budget, seed=t)
        own = router_entropy(weights)
        entropies.append((own[found.rows] + own[found.columns]) / 2)
        distances.append(found.distances)
        members.append((found.rows, found.columns))
    count = sum(len(samples) for samples in alike)
    rows = [
        {"series": "one reading", "step": int(step), **_correlation([entropy], [distance], [pair], count)}
        for step, entropy, distance, pair in zip(steps, entropies, distances, members, strict=True)
    ]
    overall = _correlation(entropies, distances, members, count)
    rows.append({"series": "all readings", "step": None, **overall})
    known = [row["value"] for row in rows[:-1] if np.isfinite(row["value"])]
    facts = {
        "domains": [samples.domain for samples in alike],
        "left_out_for_their_length": [samples.domain for samples in each if samples not in alike],
        "tau": TAU_OF_ENTROPY,
        "pairs": sum(map(len, distances)),
        "mean_within_readings": float(np.mean(known)) if known else None,
    }
    notes = [
        f"over all {facts['pairs']:,} pairs r = {overall['value']:+.2f} ({overall['low']:+.2f} to "
        f"{overall['high']:+.2f}, over {count} samples); within single readings {min(known, default=np.nan):+.2f} to "
        f"{max(known, default=np.nan):+.2f}"
    ]

    def picture(plt: Any) -> Any:
        figure, (axis,) = grid(plt, 1, size=(4.6, 3.4))
        drawn = axis.hexbin(
            np.concatenate(entropies), np.concatenate(distances), gridsize=34, cmap="Blues", mincnt=1, bins="log"
        )
        figure.colorbar(drawn, label="pairs")
        titled(axis, notes[0].partition(";")[0], x="router entropy, nats (mean of both)", y="distance, edits")
        return figure

    return Result("figure13", "Figure 13: pathway distance and router entropy", rows, picture, facts, notes)


def _correlation(
    x: Sequence[np.ndarray], y: Sequence[np.ndarray], members: Sequence[tuple[np.ndarray, np.ndarray]], samples: int
) -> Row:
    """Pearson's r over pairs, with a bootstrap over samples: a pair counts once for each draw of both its samples."""
    x_P, y_P = np.concatenate(x), np.concatenate(y)
    rows_P, columns_P = (np.concatenate([pair[side] for pair in members]) for side in (0, 1))
    rng = np.random.default_rng(0)
    drawn = [np.bincount(rng.integers(samples, size=samples), minlength=samples) for _ in range(RESAMPLES)]
    replicates = [_pearson(x_P, y_P, (counts[rows_P] * counts[columns_P]).astype(float)) for counts in drawn]
    low, high = np.nanpercentile(replicates, [2.5, 97.5]) if np.isfinite(replicates).any() else (np.nan, np.nan)
    value = _pearson(x_P, y_P, np.ones(len(x_P)))
    return {"value": value, "low": float(low), "high": float(high), "n": samples, "pairs": len(x_P)}


def _pearson(x: np.ndarray, y: np.ndarray, weight: np.ndarray) -> float:
    """Weighted correlation; NaN where one of the two does not vary."""
    if not weight.any():
        return float("nan")
    x, y = (each - np.average(each, weights=weight) for each in (x, y))
    scale = np.sqrt((weight * x * x).sum() * (weight * y * y).sum())
    return float((weight * x * y).sum() / scale) if scale > 1e-12 else float("nan")
