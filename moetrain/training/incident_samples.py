"""Which samples of a step were involved in what went wrong.

Shapes: B rows, T tokens, S samples a row (padded), L layers, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from moetrain.data.packing import Samples
from moetrain.models.transformer import Output
from moetrain.training.guards import Recorded
from moetrain.training.incidents import Incident


def suspects(
    incident: Incident,
    recorded: Recorded,
    samples: Samples,
    domains: Sequence[str],
    count: int,
) -> list[dict[str, Any]]:
    """The samples of a step most involved in an incident, the worst first, at most ``count``.

    Experts die where samples crowd on others: then it is the samples with the largest share of their recorded tokens
    on one expert, in the layers concerned; each with its ``share``. Else it is those with the largest ``loss``, nats a
    token, null where it is not finite; those come first.

    Args:
        recorded: the step's micro-batches and what the model gave for them, of one process.
        samples: what the stream's numbers of samples stand for.
        domains: names by number.
    """
    found: list[tuple[float, dict[str, Any]]] = []
    for batch, output in recorded:
        if incident.kind == "dead_experts":
            layers = sorted({layer for layer, _ in incident.details["experts"]})
            name, values_BS = "share", _crowding(output, layers, batch.samples_BS.shape)
        else:
            sums_BS, tokens_BS = batch.sum_by_sample(output.loss_BT.detach().cpu().numpy())
            name, values_BS = "loss", np.where(tokens_BS > 0, sums_BS / np.maximum(tokens_BS, 1), -np.inf)
        for row, slot in np.argwhere((batch.samples_BS.numpy() >= 0) & (values_BS != -np.inf)).tolist():
            sample, value = int(batch.samples_BS[row, slot]), float(values_BS[row, slot])
            named = {
                "domain": domains[samples.domain[sample]],
                "document": int(samples.document[sample]),
                "piece": int(samples.piece[sample]),
                name: value if math.isfinite(value) else None,
            }
            found.append((value if math.isfinite(value) else math.inf, named))
    return [named for _, named in sorted(found, key=lambda pair: -pair[0])[:count]]


def merge(parts: Sequence[list[dict[str, Any]]], count: int) -> list[dict[str, Any]]:
    """The worst of what several processes found."""

    def badness(named: dict[str, Any]) -> float:
        value = named.get("loss", named.get("share"))
        return math.inf if value is None else value

    return sorted((named for part in parts for named in part), key=badness, reverse=True)[:count]


def _crowding(output: Output, layers: list[int], shape: tuple[int, ...]) -> np.ndarray:
    """Largest share of each sample's recorded choices that one expert of the layers got, [B, S]; -inf without any."""
    assert output.routing is not None
    counts_LBRE = output.routing.counts_LBRE[layers].cpu().numpy()
    if not counts_LBRE.shape[2]:  # nothing watches the routing by sample
        return np.full(shape, -np.inf)
    counts_LBSE = counts_LBRE.reshape(len(layers), *shape, 2, -1).sum(3)
    total_LBS = counts_LBSE.sum(-1)
    share_LBS = counts_LBSE.max(-1) / np.maximum(total_LBS, 1)
    return np.where(total_LBS[0] > 0, share_LBS.max(0), -np.inf)
