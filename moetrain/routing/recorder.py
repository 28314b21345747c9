"""Routing of a step's samples: from the tensors that the model returns to arrays on the host.

Shapes: S samples, L layers, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np

from moetrain.device_transfer import HostCopy, to_device

if TYPE_CHECKING:  # other training loops use this module without our data and model
    from moetrain.data.batch import Batch
    from moetrain.models.transformer import Routing


@dataclass(frozen=True)
class SampleRouting:
    """Routing of samples over their first panel tokens; arrays [S, ...] in the order of the stream."""

    order: np.ndarray  # int64, position in the stream: unique, ascending over a run
    sample: np.ndarray  # int64, number of the sample
    domain: np.ndarray  # int64, number of the domain
    even_SLE: np.ndarray  # float32, router probabilities before top-k, summed over the even text tokens
    odd_SLE: np.ndarray  # float32, summed over the odd text tokens
    counts_SLE: np.ndarray  # float32, tokens sent to each expert

    def __len__(self) -> int:
        return len(self.sample)

    def take(self, which: np.ndarray | slice) -> SampleRouting:
        """Some of the samples, by mask, index or slice."""
        return SampleRouting(**{field.name: getattr(self, field.name)[which] for field in fields(self)})

    @classmethod
    def join(cls, parts: list[SampleRouting]) -> SampleRouting:
        """The samples of all parts, in this order."""
        names = [field.name for field in fields(cls)]
        return cls(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})

    @classmethod
    def from_weights(
        cls, weights_SLE: np.ndarray, samples: np.ndarray, domains: np.ndarray, first_order: int
    ) -> SampleRouting:
        """Routing measured by any training loop: mean router probabilities per sample, without even and odd halves.

        Args:
            weights_SLE: mean probabilities over the tokens of each sample, each [sample, layer] summing to 1. Samples
                to be compared should have equal numbers of tokens.
            samples: int64 [S], number of each sample.
            domains: int64 [S], number of its domain.
            first_order: number of samples recorded before.
        """
        half_SLE = np.asarray(weights_SLE, np.float32) / 2
        return cls(
            order=first_order + np.arange(len(half_SLE)),
            sample=np.asarray(samples),
            domain=np.asarray(domains),
            even_SLE=half_SLE,
            odd_SLE=half_SLE,
            counts_SLE=np.zeros_like(half_SLE),
        )

    @property
    def weights(self) -> np.ndarray:
        """Sample routing weights g [S, L, E]: mean router probabilities, each [sample, layer] summing to 1."""
        return mean_routing(self.even_SLE, self.odd_SLE)


def mean_routing(even_SLE: np.ndarray, odd_SLE: np.ndarray) -> np.ndarray:
    """Mean probabilities in float64 from the sums over the even and the odd tokens, normalised to sum to 1."""
    total_SLE = even_SLE.astype(np.float64) + odd_SLE
    return total_SLE / total_SLE.sum(-1, keepdims=True)


@dataclass(frozen=True)
class ComingRouting:
    """Routing of samples that is being copied to the host; see `SampleRouting`."""

    order: np.ndarray
    sample: np.ndarray
    domain: np.ndarray
    copy: HostCopy  # sums of probabilities, and counts, of even and odd tokens, each [L, S, 2, E]

    def wait(self) -> SampleRouting:
        """The routing; waits for the copy."""
        both_SL2E, counts_SL2E = (tensor.transpose(0, 1).numpy() for tensor in self.copy.wait())
        return SampleRouting(
            order=self.order,
            sample=self.sample,
            domain=self.domain,
            even_SLE=np.ascontiguousarray(both_SL2E[:, :, 0]),
            odd_SLE=np.ascontiguousarray(both_SL2E[:, :, 1]),
            counts_SLE=np.ascontiguousarray(counts_SL2E.sum(2)),
        )


def start_record(routing: Routing, batch: Batch, first_order: int) -> ComingRouting:
    """Start the copy to the host of the routing of a micro-batch's samples that are long enough to be compared.

    Args:
        routing: of the micro-batch's forward pass.
        batch: the micro-batch.
        first_order: position in the stream of its first slot; slots follow row by row.
    """
    slots = batch.compared_BS.flatten().nonzero()[:, 0]
    layers, rows, halves, experts = routing.sums_LBRE.shape
    shape = (layers, rows * halves // 2, 2, experts)
    on_device = to_device(slots, routing.sums_LBRE.device)
    kept = [x.detach().reshape(shape).index_select(1, on_device) for x in (routing.sums_LBRE, routing.counts_LBRE)]
    return ComingRouting(
        order=first_order + slots.numpy(),
        sample=batch.samples_BS.flatten()[slots].numpy(),
        domain=batch.domains_BS.flatten()[slots].numpy(),
        copy=HostCopy(kept),
    )
