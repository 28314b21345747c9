"""Metrics of a dense run's last model with its hidden units in other blocks, or with other shares.

Shares of blocks are sums of those of their units. So one reading in which every unit is a block of its own gives the
routing over any partition.

Shapes: P panel samples, L layers, F hidden units, E blocks, S samples.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from moetrain.checkpoint.manager import list_checkpoints
from moetrain.config import load_settings
from moetrain.distributed.mesh import ParallelLayout
from moetrain.loggers.terminal import Terminal
from moetrain.metrics import table
from moetrain.metrics.cell import HELDOUT
from moetrain.models import dense_experts
from moetrain.replay import own_model, replay, texts_of_run
from moetrain.routing.panel import CELLS
from moetrain.routing.panel_metrics import panel_metrics
from moetrain.routing.store import StoredReading, read_reading

BLOCKS = 16  # of the runs themselves, and of partitions other than consecutive blocks
SIZES = (8, 32, 48)
_ROUNDS = 20  # of the clustering, at most
_OF_ROUTER_ROWS = ("cosine", "consistency", "inconsistency")  # other partitions have no rows here
_COLUMNS = ["domain", "step", "metric", "value"]


def other_blocks(run: Path) -> dict[str, pd.DataFrame]:
    """By partition and share, the metrics of the domains at the last step: rows of domain, step, metric and value."""
    units = unit_reading(run)
    layers, width = units.even.shape[1:]
    rng = np.random.default_rng(0)
    shuffled_LF = np.stack([rng.permutation(width) for _ in range(layers)])
    partitions = {f"{size} blocks": consecutive(layers, width, size) for size in SIZES}
    partitions["16 random blocks"] = np.take_along_axis(consecutive(layers, width, BLOCKS), shuffled_LF, 1)
    partitions["16 clusters of units active together"] = co_activation(units, BLOCKS)
    found = {name: _metrics(regrouped(units, block_LF)) for name, block_LF in partitions.items()}
    found[f"{width} single units"] = _metrics(units)
    for name, shares in {"16 blocks, squares": squared_shares, "16 blocks, activation alone": plain_shares}.items():
        other = unit_reading(run, shares)
        found[name] = _metrics(regrouped(other, consecutive(layers, width, BLOCKS)))
    return found


def squared_shares(units_NF: Tensor, down_DF: Tensor, blocks: int) -> Tensor:
    """As `moetrain.models.dense_experts.block_shares`, of squares: of the squared norm, were all columns orthogonal."""
    length_F = torch.linalg.vector_norm(down_DF, dim=0, dtype=torch.float32)
    return _shares((units_NF.float() * length_F).square(), blocks)


def plain_shares(units_NF: Tensor, down_DF: Tensor, blocks: int) -> Tensor:
    """As `moetrain.models.dense_experts.block_shares`, without the lengths of the columns."""
    return _shares(units_NF.float().abs(), blocks)


def _shares(mass_NF: Tensor, blocks: int) -> Tensor:
    mass_NE = mass_NF.view(len(mass_NF), blocks, -1).sum(-1) + torch.finfo(torch.float32).tiny
    return mass_NE / mass_NE.sum(-1, keepdim=True)


def unit_reading(run: Path, shares: Callable[[Tensor, Tensor, int], Tensor] | None = None) -> StoredReading:
    """The panel read by the last model of a run, with every hidden unit as a block.

    Args:
        shares: another definition of shares; None: that of `moetrain.models.dense_experts`.
    """
    width = load_settings(run / "config.yaml").model.dense_width
    overrides = [f"model.dense_experts={width}", "run.report=false", "probes.builtin=false"]
    settings = load_settings(run / "config.yaml", overrides)
    layout, terminal = ParallelLayout(), Terminal(speaks=False)
    texts = texts_of_run(settings, layout, terminal, start=False)
    model = own_model(list_checkpoints(run)[-1], texts.corpus.fingerprint)
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.object(dense_experts, "block_shares", shares or dense_experts.block_shares),
    ):
        replay([model], texts, Path(folder) / "units", layout, terminal)
        return read_reading(Path(folder) / "units", model.step)


def regrouped(units: StoredReading, block_LF: np.ndarray) -> StoredReading:
    """A reading over units as one over blocks, given the block of each unit."""
    layers, width = block_LF.shape
    member_LFE = np.zeros((layers, width, int(block_LF.max()) + 1), np.float32)
    np.put_along_axis(member_LFE, block_LF[..., None], 1, axis=2)

    def grouped(weights: np.ndarray) -> np.ndarray:
        return np.einsum("plf,lfe->ple", weights.astype(np.float32), member_LFE)

    answers = replace(units.answers, weights=grouped(units.answers.weights))
    return replace(units, even=grouped(units.even), odd=grouped(units.odd), answers=answers)


def consecutive(layers: int, width: int, blocks: int) -> np.ndarray:
    """The block of each unit [L, F], where blocks are of consecutive units."""
    return np.tile(np.arange(width) // (width // blocks), (layers, 1))


def co_activation(units: StoredReading, blocks: int) -> np.ndarray:
    """The cluster of each unit [L, F]: clusters of equal size of units that are active in the same samples.

    Balanced k-means on the units' shares over the held-out samples of all domains, standardized for each unit.
    """
    weights_SLF = units.weights[units.finite & (units.cell == CELLS.index(HELDOUT))]
    return np.stack([_balanced(weights_SLF[:, layer].T, blocks) for layer in range(weights_SLF.shape[1])])


def _balanced(shares_FS: np.ndarray, blocks: int) -> np.ndarray:
    centred_FS = shares_FS - shares_FS.mean(1, keepdims=True)
    z_FS = centred_FS / np.maximum(np.linalg.norm(centred_FS, axis=1, keepdims=True), 1e-12)
    size = len(z_FS) // blocks
    rng = np.random.default_rng(0)
    centres_ES = z_FS[rng.choice(len(z_FS), blocks, replace=False)]
    cluster_F = np.full(len(z_FS), -1)
    for _ in range(_ROUNDS):
        likeness_FE = z_FS @ centres_ES.T
        unit, place = linear_sum_assignment(np.repeat(likeness_FE, size, axis=1), maximize=True)
        assigned_F = np.empty_like(cluster_F)
        assigned_F[unit] = place // size
        if np.array_equal(assigned_F, cluster_F):
            break
        cluster_F = assigned_F
        centres_ES = np.stack([z_FS[cluster_F == block].mean(0) for block in range(blocks)])
    return cluster_F


def _metrics(reading: StoredReading) -> pd.DataFrame:
    rows = [metric for metric in table.METRICS if metric.name not in _OF_ROUTER_ROWS]
    domains = sorted(set(reading.domain))
    found = panel_metrics(reading, domains, tau=0.7, steps=2 * max(1, reading.step), rows=rows)
    named = [(*tag.rpartition("/")[::2], each.mean) for tag, each in found.items()]
    return pd.DataFrame([(domain, reading.step, tag, value) for tag, domain, value in named], columns=_COLUMNS)
