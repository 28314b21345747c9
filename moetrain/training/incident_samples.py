"""Which samples of a step were most involved in an incident.

Shapes: B rows, S samples per row (padded), L layers, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from moetrain.data.packing import Samples
from moetrain.distributed.mesh import ParallelLayout
from moetrain.models.transformer import Output
from moetrain.training.guards import Findings, MicroBatches
from moetrain.training.incidents import Incident


def with_samples(
    findings: Findings, samples: Samples, domains: Sequence[str], count: int, layout: ParallelLayout
) -> Iterator[Incident]:
    """The incidents with the samples of all ranks most involved in each, on the main rank; all ranks must call.

    Args:
        findings: the same incidents on all ranks, each with this rank's micro-batches.
        samples: what the stream's sample numbers stand for.
        domains: names by number.
        count: samples per incident, at most.
    """
    for incident, outputs in findings:
        own = incident_samples(incident, outputs, samples, domains, count)
        worst = worst_samples(layout.all_gather_objects(own), count)
        if layout.is_main:
            yield replace(incident, details=incident.details | {"samples": worst})


def incident_samples(
    incident: Incident, outputs: MicroBatches, samples: Samples, domains: Sequence[str], count: int
) -> list[dict[str, Any]]:
    """This rank's samples most involved in an incident, the worst first, at most ``count``.

    Experts die when samples crowd on others. So for dead experts these are the samples with the largest ``share`` of
    recorded tokens on one expert, in the layers concerned; for every other kind those with the largest ``loss`` in nats
    per token, null where it is not finite, which come first.

    Args:
        samples: what the stream's sample numbers stand for.
        domains: names by number.
    """
    found = []
    for batch, output in outputs:
        if incident.kind == "dead_experts":
            layers = sorted({layer for layer, _ in incident.details["experts"]})
            name, values_BS = "share", _largest_share(output, layers, batch.samples_BS.shape)
        else:
            sums_BS, tokens_BS = batch.sum_by_sample(output.loss_BT.detach().cpu().numpy())
            name, values_BS = "loss", np.where(tokens_BS > 0, sums_BS / np.maximum(tokens_BS, 1), -np.inf)
        for row, slot in np.argwhere((batch.samples_BS.numpy() >= 0) & (values_BS != -np.inf)).tolist():
            sample, value = int(batch.samples_BS[row, slot]), float(values_BS[row, slot])
            found.append(
                {
                    "domain": domains[samples.domain[sample]],
                    "document": int(samples.document[sample]),
                    "piece": int(samples.piece[sample]),
                    name: value if math.isfinite(value) else None,
                }
            )
    return worst_samples([found], count)


def worst_samples(by_rank: Sequence[list[dict[str, Any]]], count: int) -> list[dict[str, Any]]:
    """The worst of the samples that the ranks found, at most ``count``."""

    def value(sample: dict[str, Any]) -> float:
        found = sample.get("loss", sample.get("share"))
        return math.inf if found is None else found

    return sorted((sample for samples in by_rank for sample in samples), key=value, reverse=True)[:count]


def _largest_share(output: Output, layers: list[int], shape: tuple[int, ...]) -> np.ndarray:
    """Largest share of each sample's recorded choices that went to one expert of the layers, [B, S]; -inf for none."""
    assert output.routing is not None
    counts_LBRE = output.routing.counts_LBRE[layers].cpu().numpy()
    if not counts_LBRE.shape[2]:  # the model sums no routing per sample
        return np.full(shape, -np.inf)
    counts_LBSE = counts_LBRE.reshape(len(layers), *shape, 2, -1).sum(3)
    total_LBS = counts_LBSE.sum(-1)
    share_LBS = counts_LBSE.max(-1) / np.maximum(total_LBS, 1)
    return np.where(total_LBS[0] > 0, share_LBS.max(0), -np.inf)
