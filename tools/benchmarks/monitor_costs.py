"""The cost of the monitor's computations over numbers of samples, experts and layers, on one core.

Routing weights are random: softmax of Gaussian logits, scaled by the router's sharpness. Flatter routing has longer
pathways. A router is flat before its first step and becomes sharper in training.

Shapes: S samples, L layers, E experts, D hidden size.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from common.figures import new_figure, save
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist
from rich.table import Table

from benchmarks.timing import ratio, repeat, take_turns
from moetrain.data.batch import Batch
from moetrain.grokking import d_path, gram_blocks, pathways
from moetrain.models.transformer import Routing
from moetrain.routing.recorder import start_record
from moetrain.routing.stream import stream_metrics

USUAL = {"samples": 64, "layers": 16, "experts": 64}
VARIED = {"samples": (16, 64, 256, 1024), "layers": (4, 16, 32, 64), "experts": (8, 64, 256)}
SHARPNESS = {"sharp": 1.0, "flat": 0.1}
TAU = 0.7
_HIDDEN = 256
_COLORS = {"reading_seconds": "#3182bd", "record_seconds": "#d95f02"}


def draw_weights(samples: int, layers: int, experts: int, sharpness: float = 1.0, seed: int = 0) -> np.ndarray:
    """Routing weights [S, L, E] in float32, of logits with a component common to all samples and one per sample."""
    rng = np.random.default_rng([seed, samples, layers, experts])
    logits_SLE = sharpness * (rng.normal(size=(1, layers, experts)) + rng.normal(size=(samples, layers, experts)))
    weights_SLE = np.exp(logits_SLE - logits_SLE.max(-1, keepdims=True))
    return (weights_SLE / weights_SLE.sum(-1, keepdims=True)).astype(np.float32)


def costs(varied: dict[str, tuple[int, ...]] | None = None, seconds: float = 0.2) -> list[dict[str, Any]]:
    """`cost` over each dimension, with the others at `USUAL`.

    Args:
        seconds: the least time for which each is repeated.
    """
    shapes = [USUAL | {name: value} for name, values in (varied or VARIED).items() for value in values]
    return [cost(**shape, seconds=seconds) for shape in {tuple(shape.items()): shape for shape in shapes}.values()]


def cost(samples: int, layers: int, experts: int, tau: float = TAU, seconds: float = 0.2) -> dict[str, Any]:
    """Seconds of a reading of one domain with ``samples`` samples, and of recording as many, on one core."""
    weights_SLE = draw_weights(samples, layers, experts)
    rows_LED = np.random.default_rng(1).normal(size=(layers, experts, _HIDDEN)).astype(np.float32)
    reading = repeat(lambda: stream_metrics(weights_SLE, gram_blocks(rows_LED), tau), seconds)
    # As the model returns it: both halves of all samples in one row.
    halves = torch.from_numpy(np.repeat(weights_SLE / 2, 2, axis=0)).transpose(0, 1)[:, None].contiguous()
    places = torch.arange(samples)[None]
    complete = torch.ones_like(places, dtype=torch.bool)
    routing = cast(Routing, SimpleNamespace(sums_LBRE=halves, counts_LBRE=halves))
    batch = cast(Batch, SimpleNamespace(samples_BS=places, domains_BS=torch.zeros_like(places), compared_BS=complete))
    recording = repeat(lambda: start_record(routing, batch, first_order=0).wait(), seconds)
    return {
        "samples": samples,
        "layers": layers,
        "experts": experts,
        "reading_seconds": reading.cpu_seconds,
        "record_seconds": recording.cpu_seconds,
    }


def distances(samples: int = 1000, layers: int = 16, experts: int = 64, tau: float = TAU) -> dict[str, Any]:
    """`d_path` over all pairs on one core, against only the edit distances of the same sequences, by sharpness."""
    shape = {"samples": samples, "layers": layers, "experts": experts}
    return shape | {name: _distances(draw_weights(**shape, sharpness=scale), tau) for name, scale in SHARPNESS.items()}


def _distances(weights_SLE: np.ndarray, tau: float) -> dict[str, Any]:
    # One character per symbol, the separator being the first: the library's fastest input.
    texts = ["".join(map(chr, pathway + 1)) for pathway in pathways(weights_SLE, tau)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        timings = take_turns(
            {
                "d_path": lambda turn: d_path(weights_SLE, tau),
                "cdist": lambda turn: cdist(texts, texts, scorer=Levenshtein.distance, dtype=np.int32, workers=1),
            },
            turns=3,
            device=torch.device("cpu"),
        )
    finally:
        torch.set_num_threads(threads)
    return {
        "symbols": float(np.mean([len(text) for text in texts])),
        "d_path": timings["d_path"].summary(),
        "cdist": timings["cdist"].summary(),
        "ratio_to_cdist": ratio(timings["d_path"].wall, timings["cdist"].wall),
        "cpu_ratio_to_cdist": ratio(timings["d_path"].cpu, timings["cdist"].cpu),
    }


def cost_table(found: list[dict[str, Any]]) -> Table:
    table = Table("samples", "layers", "experts", "a domain's reading, ms", "recording, ms")
    for row in found:
        sizes = (str(row[name]) for name in USUAL)
        table.add_row(*sizes, f"{row['reading_seconds'] * 1e3:.2f}", f"{row['record_seconds'] * 1e3:.2f}")
    return table


def distance_table(found: dict[str, Any]) -> Table:
    table = Table(
        f"all pairs of {found['samples']} samples, {found['layers']} x {found['experts']}",
        *("symbols", "d_path, s", "only cdist, s", "ratio", "ratio by CPU time"),
    )
    for name in SHARPNESS:
        row = found[name]
        seconds = (f"{row[side]['seconds']:.2f}" for side in ("d_path", "cdist"))
        ratios = (f"{row[key]['ratio']:.2f}" for key in ("ratio_to_cdist", "cpu_ratio_to_cdist"))
        table.add_row(f"{name} routing", f"{row['symbols']:.0f}", *seconds, *ratios)
    return table


def draw(found: list[dict[str, Any]], path: Path) -> None:
    """Seconds over samples, layers and experts, with the others at `USUAL`."""
    figure, axes = new_figure(len(USUAL))
    for axis, varied in zip(axes, USUAL, strict=True):
        fixed = {name: value for name, value in USUAL.items() if name != varied}
        rows = sorted(
            (row for row in found if all(row[name] == value for name, value in fixed.items())),
            key=lambda row: row[varied],
        )
        for key, color in _COLORS.items():
            axis.plot([r[varied] for r in rows], [r[key] for r in rows], "o-", color=color, label=key.partition("_")[0])
        axis.set(xscale="log", yscale="log", xlabel=varied, title=", ".join(f"{v} {n}" for n, v in fixed.items()))
        axis.set_xticks([row[varied] for row in rows], [str(row[varied]) for row in rows])
        axis.minorticks_off()
    axes[0].set(ylabel="seconds, one core")
    axes[0].legend(frameon=False)
    save(figure, path)
