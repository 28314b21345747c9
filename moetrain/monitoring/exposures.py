"""The training loss of samples by the number of earlier exposures to their text, at no extra forward pass.

The loss of a sample comes from the training step itself, before the update. At the first exposure it is a test loss:
the model has never seen the text (prequential evaluation; Dawid, 1984). The difference to later exposures is what
having seen the text is worth.

Shapes: B rows, T tokens, S samples per row (padded).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from moetrain import grokking
from moetrain.data.batch import IGNORED, Batch
from moetrain.data.stream import Stream
from moetrain.device_transfer import HostCopy
from moetrain.distributed.mesh import ParallelLayout
from moetrain.distributed.newest import among_newest
from moetrain.grokking import Estimate
from moetrain.models.transformer import Output

MOST = 64
"""Exposures from this number on are one group."""
BUCKETS = 2 + MOST.bit_length() - 1  # of exposures: 0, 1, 2, 4, ..., `MOST`
LEAST_DOCUMENTS = 8
"""Fewer documents in a window give no value."""
_MOST_PENDING = 64  # micro-batches whose losses may still be on their way to the host


@dataclass(frozen=True)
class SampleLosses:
    """Losses of samples in the order in which they were trained on; arrays [samples]."""

    order: np.ndarray  # int64, place in the stream
    domain: np.ndarray  # int64
    exposures: np.ndarray  # int64, earlier exposures: 0, 1, 2, 4, ..., `MOST`
    document: np.ndarray  # int64, the same for all copies of a document
    loss: np.ndarray  # float64, nats, summed over predicted tokens
    tokens: np.ndarray  # float64, predicted tokens
    entropy: np.ndarray  # float64, nats, of these tokens' predictions; NaN where the step did not compute it

    def __len__(self) -> int:
        return len(self.order)

    def take(self, which: np.ndarray) -> SampleLosses:
        return SampleLosses(**{f.name: getattr(self, f.name)[which] for f in fields(self)})

    @classmethod
    def join(cls, parts: Sequence[SampleLosses]) -> SampleLosses:
        return cls(**{f.name: np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(cls)})


class ExposureLosses:
    """A window of the newest samples per domain and number of earlier exposures; each rank holds its own rows'.

    Args:
        size: samples of a window, over all ranks.
    """

    def __init__(self, stream: Stream, domains: Sequence[str], size: int, layout: ParallelLayout) -> None:
        self._stream, self._domains, self._size, self._layout = stream, list(domains), size, layout
        self._pending: deque[tuple[np.ndarray, np.ndarray, HostCopy]] = deque()
        self._held: SampleLosses | None = None

    @torch.no_grad()
    def add(self, batch: Batch, output: Output, first_order: int) -> None:
        """Add a micro-batch that was trained on; its losses are copied to the host without waiting.

        Args:
            first_order: place in the stream of the micro-batch's first slot.
        """
        slots = torch.arange(batch.samples_BS.shape[1], device=batch.slots_BT.device)
        predicted_BT = batch.targets_BT != IGNORED
        member_BST = (batch.slots_BT[:, None] == slots[None, :, None]) & predicted_BT[:, None]
        entropy_BT = torch.full_like(output.loss_BT, torch.nan) if output.entropy_BT is None else output.entropy_BT
        parts = (output.loss_BT, predicted_BT, torch.where(predicted_BT, entropy_BT, 0.0))
        values_BT3 = torch.stack([part.detach().double() for part in parts], dim=-1)
        sums_BS3 = torch.bmm(member_BST.double(), values_BT3)
        samples_BS = batch.samples_BS.numpy()
        order_BS = first_order + np.arange(samples_BS.size).reshape(samples_BS.shape)
        self._pending.append((samples_BS, order_BS, HostCopy([sums_BS3])))
        self._settle(_MOST_PENDING)

    def windows(self) -> SampleLosses | None:
        """The newest samples over all ranks, ``size`` per domain and group of exposures; on the main rank alone.

        All ranks must call; the others get None.
        """
        self._settle(0)
        held = self._held
        if self._layout.world_size > 1:
            none = np.zeros(0, np.int64)
            order, group = (none, none) if held is None else (held.order, _groups(held))
            newest = among_newest(order, group, len(self._domains) * BUCKETS, self._size, self._layout)
            held = held.take(newest) if held is not None else None
        parts = [part for part in self._layout.gather_objects(held) or () if part is not None]
        return self._newest(SampleLosses.join(parts)) if parts else None

    def metrics(self, after_step: int = 0) -> dict[str, Estimate]:
        """Metrics per predicted token, in nats, by tag, with intervals over documents; all ranks must call.

        On ranks other than the main one there are none.

        ``loss/first_exposure`` and ``loss/exposure_K``: mean loss. ``memorized/excess_confidence``: entropy of the
        prediction minus loss, over the newest texts trained on before; ``..._unseen``: at first exposure.

        Args:
            after_step: windows without a sample of a later step have no value: a curve ends where a domain has no
                more samples of its kind.
        """
        held = self.windows()
        found: dict[str, Estimate] = {}
        if held is None:
            return found
        first_order = after_step * self._stream.batch_rows * self._stream.most_samples

        def add(tag: str, group: SampleLosses, values: np.ndarray) -> None:
            current = len(group) and group.order[-1] >= first_order
            if current and len(np.unique(group.document)) >= LEAST_DOCUMENTS:
                found[tag] = grokking.mean_per_token(values, group.tokens, group.document)

        for number, domain in enumerate(self._domains):
            own = held.take(held.domain == number)
            for exposures in np.unique(own.exposures).tolist():
                group = own.take(own.exposures == exposures)
                tag = f"loss/exposure_{exposures}" if exposures else "loss/first_exposure"
                add(f"{tag}/{domain}", group, group.loss)
            for tag, seen_before in (("excess_confidence", True), ("excess_confidence_unseen", False)):
                measured = own.take(((own.exposures > 0) == seen_before) & np.isfinite(own.entropy))
                newest = measured.take(np.arange(len(measured))[-self._size :])
                add(f"memorized/{tag}/{domain}", newest, newest.entropy - newest.loss)
        return found

    def state(self) -> dict[str, torch.Tensor]:
        """The windows of all ranks as tensors, for the main rank's checkpoint; all ranks must call."""
        held = self.windows()
        if held is None:
            return {}
        return {f.name: torch.from_numpy(np.ascontiguousarray(getattr(held, f.name))) for f in fields(held)}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore what `state` returned, on the main rank, so that all ranks together hold each sample once."""
        if state and self._layout.is_main:
            self._held = SampleLosses(**{f.name: state[f.name].numpy() for f in fields(SampleLosses)})

    def _settle(self, pending: int) -> None:
        """Take losses that have arrived into the windows, waiting for all but the newest ``pending`` micro-batches."""
        arrived: list[SampleLosses] = []
        while self._pending and (len(self._pending) > pending or self._pending[0][2].arrived):
            samples_BS, order_BS, copy = self._pending.popleft()
            (sums_BS3,) = copy.wait()
            there = samples_BS >= 0
            samples, sums = samples_BS[there], sums_BS3.numpy()[there]
            exposures = grokking.exposure_bucket(self._stream.exposures[samples])
            losses = SampleLosses(
                order=order_BS[there],
                domain=self._stream.samples.domain[samples].astype(np.int64),
                exposures=np.minimum(exposures, MOST),
                document=self._stream.text_of_document[samples],
                loss=sums[:, 0],
                tokens=sums[:, 1],
                entropy=sums[:, 2],
            )
            arrived.append(losses.take(np.isfinite(losses.loss) & (losses.tokens > 0)))
        if arrived:
            held = [] if self._held is None else [self._held]
            self._held = self._newest(SampleLosses.join([*held, *arrived]))

    def _newest(self, losses: SampleLosses) -> SampleLosses:
        """The newest ``size`` samples of each domain and group, in the stream's order."""
        ordered = losses.take(np.argsort(losses.order, kind="stable"))
        group = _groups(ordered)
        place_from_end = np.zeros(len(ordered), np.int64)
        for number in np.unique(group):
            members = np.flatnonzero(group == number)
            place_from_end[members] = np.arange(len(members))[::-1]
        return ordered.take(place_from_end < self._size)


def _groups(losses: SampleLosses) -> np.ndarray:
    """A number for each sample's domain and group of exposures, int64 [samples]: `BUCKETS` for each domain."""
    bucket = np.where(losses.exposures > 0, np.log2(np.maximum(losses.exposures, 1)).astype(np.int64) + 1, 0)
    return losses.domain * BUCKETS + bucket
