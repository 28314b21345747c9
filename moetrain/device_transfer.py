"""Tensors to a device and back without the host waiting for it.

A copy between the device and ordinary memory stops the host until the device has caught up. From and to page-locked
memory it does not: the copy takes its turn on a stream, and the host goes on.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host on ``device``; work queued there after this call sees its content."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class HostCopy:
    """Tensors on their way to the host; on CPU they are there already.

    The copy runs on a stream of its own, beside the training, and begins when the work queued so far is done.
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
            for mine, theirs in zip(self._tensors, tensors, strict=True):
                mine.copy_(theirs, non_blocking=True)
                # Its memory may not be given to others before this stream has read it.
                theirs.record_stream(stream)
            self._arrived = stream.record_event()

    @property
    def arrived(self) -> bool:
        """Whether `wait` would return at once."""
        return self._arrived is None or self._arrived.query()

    def wait(self) -> list[torch.Tensor]:
        """The tensors, in the host's memory."""
        if self._arrived is not None:
            self._arrived.synchronize()
            self._arrived = None
        return self._tensors


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
