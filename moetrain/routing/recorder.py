"""The routing of a step's samples, from the values the model returned to arrays on the host.

Shapes: S samples, L layers, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch

from moetrain.device_transfer import HostCopy, to_device


@dataclass(frozen=True)
class SampleRouting:
    """Routing of samples over their first panel tokens, one entry a sample; arrays [S, ...] in the stream's order."""

    order: np.ndarray  # int64: place in the stream, growing over a run and unique; ties no two samples
    sample: np.ndarray  # int64: number of the sample
    domain: np.ndarray  # int64: number of the domain
    even_SLE: np.ndarray  # float32: router probabilities summed over the even text tokens, before the top-k cut
    odd_SLE: np.ndarray  # float32: over the odd ones
    counts_SLE: np.ndarray  # float32: tokens sent to each expert

    def __len__(self) -> int:
        return len(self.sample)

    def take(self, which: np.ndarray | slice) -> SampleRouting:
        return SampleRouting(*(getattr(self, field.name)[which] for field in fields(self)))

    @classmethod
    def join(cls, parts: list[SampleRouting]) -> SampleRouting:
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)))

    @classmethod
    def from_weights(
        cls, weights_SLE: np.ndarray, samples: np.ndarray, domains: np.ndarray, first_order: int
    ) -> SampleRouting:
        """Routing that any training loop has measured: mean router probabilities by sample, without their halves.

        Args:
            weights_SLE: mean probabilities over the tokens of each sample, each [sample, layer] summing to 1; samples
                that are compared should have equal numbers of tokens.
            samples, domains: int64 [S], the number of each sample and of its domain.
            first_order: samples given before: orders them by time.
        """
        half_SLE = np.asarray(weights_SLE, np.float32) / 2
        order = first_order + np.arange(len(half_SLE))
        return cls(order, np.asarray(samples), np.asarray(domains), half_SLE, half_SLE, np.zeros_like(half_SLE))

    @property
    def weights(self) -> np.ndarray:
        """Sample routing weights g [S, L, E]: mean router probabilities, each [sample, layer] summing to 1."""
        return mean_routing(self.even_SLE, self.odd_SLE)


def mean_routing(even_SLE: np.ndarray, odd_SLE: np.ndarray) -> np.ndarray:
    """Mean probabilities from the sums over two halves, float64, divided by their own total so that they sum to 1."""
    total_SLE = even_SLE.astype(np.float64) + odd_SLE
    return total_SLE / total_SLE.sum(-1, keepdims=True)


@dataclass(frozen=True)
class ComingRouting:
    """Routing of samples on its way to the host; see `SampleRouting`."""

    order: np.ndarray
    sample: np.ndarray
    domain: np.ndarray
    copy: HostCopy  # sums of probabilities and counts by half, each [L, S, 2, E]

    def wait(self) -> SampleRouting:
        """The routing, once it has arrived."""
        both_SL2E, counts_SL2E = (tensor.transpose(0, 1).numpy() for tensor in self.copy.wait())
        return SampleRouting(
            order=self.order,
            sample=self.sample,
            domain=self.domain,
            even_SLE=np.ascontiguousarray(both_SL2E[:, :, 0]),
            odd_SLE=np.ascontiguousarray(both_SL2E[:, :, 1]),
            counts_SLE=np.ascontiguousarray(counts_SL2E.sum(2)),
        )


def record_samples(
    sums_LBRE: torch.Tensor,
    counts_LBRE: torch.Tensor,
    samples_BS: torch.Tensor,
    domains_BS: torch.Tensor,
    compared_BS: torch.Tensor,
    first_order: int,
) -> SampleRouting:
    """The routing of a micro-batch's samples, as by `start_record`, waited for."""
    return start_record(sums_LBRE, counts_LBRE, samples_BS, domains_BS, compared_BS, first_order).wait()


def start_record(
    sums_LBRE: torch.Tensor,
    counts_LBRE: torch.Tensor,
    samples_BS: torch.Tensor,
    domains_BS: torch.Tensor,
    compared_BS: torch.Tensor,
    first_order: int,
) -> ComingRouting:
    """Begin to bring the routing of a micro-batch's samples that are long enough to be compared to the host.

    Args:
        sums_LBRE: probabilities summed by half of sample, R = 2S with the even half of a sample before its odd one.
        counts_LBRE: tokens sent to each expert, likewise.
        samples_BS, domains_BS: what stands in each slot of each row.
        compared_BS: which slots hold a sample whose first panel tokens were recorded.
        first_order: place in the stream of the micro-batch's first slot; slots follow row by row.
    """
    slots = compared_BS.flatten().nonzero()[:, 0]
    layers, rows, halves, experts = sums_LBRE.shape
    shape = (layers, rows * halves // 2, 2, experts)
    on_device = to_device(slots, sums_LBRE.device)
    kept = [x.detach().reshape(shape).index_select(1, on_device) for x in (sums_LBRE, counts_LBRE)]
    return ComingRouting(
        order=first_order + slots.numpy(),
        sample=samples_BS.flatten()[slots].numpy(),
        domain=domains_BS.flatten()[slots].numpy(),
        copy=HostCopy(kept),
    )
