"""Copies between host and device that do not block the host.

A copy between the device and pageable memory blocks the host until the device has caught up. From and to page-locked
memory it is queued on a stream.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy of a host tensor on ``device``, ordered before all work queued there later."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class HostCopy:
    """Tensors being copied to the host; on CPU, the tensors themselves.

    The copy runs on a stream of its own, overlapping with training, once the work queued so far is done.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._arrived: torch.cuda.Event | None = None
        device = tensors[0].device
        if device.type != "cuda":
            self._tensors = list(tensors)
            return
        stream = _side_stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            self._tensors = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors]
            for copy, tensor in zip(self._tensors, tensors, strict=True):
                copy.copy_(tensor, non_blocking=True)
                tensor.record_stream(stream)  # the allocator must not reuse its memory before this stream has read it
            self._arrived = stream.record_event()

    @property
    def arrived(self) -> bool:
        """Whether `wait` would return at once."""
        return self._arrived is None or self._arrived.query()

    def wait(self) -> list[torch.Tensor]:
        """The tensors in host memory, once the copy is done."""
        if self._arrived is not None:
            self._arrived.synchronize()
            self._arrived = None
        return self._tensors


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
