"""Routing of every training sample on disk: the heaviest experts of each layer, in Parquet.

Each process writes the samples of its own rows, in pieces that are whole or absent. A checkpoint closes the piece that
is being gathered, so that a run which goes on from it holds each sample once.

Shapes: S samples, L layers, K experts kept a layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from moetrain.data.packing import Samples
from moetrain.routing.recorder import SampleRouting
from moetrain.routing.store import FOLDER, fixed_lists, read_piece, write_piece

PIECE = 16_384
"""Samples of a piece."""
_MOST_HELD = 4 * PIECE  # where the disk stays full, older ones are let go


class SampleStore:
    """Gathers the routing of training samples and writes it, piece by piece.

    Args:
        run: the run's folder.
        process: number of this process; each writes pieces of its own.
        top: experts kept a layer, K.
        samples: what the numbers of samples stand for.
        domains: names by number.
        places: of samples in a step, used or not: places in the stream over it count steps.
    """

    def __init__(self, run: Path, process: int, top: int, samples: Samples, domains: list[str], places: int) -> None:
        self._run = run
        self._process = process
        self._top = top
        self._samples = samples
        self._domains = domains
        self._places = places
        self._held: list[tuple[SampleRouting, np.ndarray, np.ndarray]] = []
        self.lost = 0  # samples let go because they could not be written

    def __len__(self) -> int:
        """Samples that are gathered and not written yet."""
        return sum(len(records) for records, _, _ in self._held)

    def add(self, records: SampleRouting) -> None:
        """Take in samples that were trained on."""
        if len(records):
            experts, shares = top_experts(records.weights, self._top)
            self._held.append((_without_routing(records), experts, shares))

    def write(self, everything: bool = False) -> None:
        """Write what was gathered, if it fills a piece, or with ``everything`` in any case.

        Raises:
            OSError: nothing was written; what was gathered is kept, up to four pieces.
        """
        if len(self) < PIECE and not everything:
            return
        if not self._held:
            return
        records = SampleRouting.join([part for part, _, _ in self._held])
        experts = np.concatenate([part for _, part, _ in self._held])
        shares = np.concatenate([part for _, _, part in self._held])
        steps = records.order // self._places + 1
        columns = {
            "step": steps,
            "order": records.order,
            "domain": pa.array([self._domains[number] for number in records.domain]).dictionary_encode(),
            "document": self._samples.document[records.sample],
            "piece": self._samples.piece[records.sample],
            "experts": fixed_lists(experts),
            "shares": fixed_lists(shares),
        }
        folder = self._run / FOLDER
        metadata = {"layers": str(experts.shape[1]), "top": str(experts.shape[2])}
        try:
            write_piece(folder / f"samples_{steps[-1]:08d}_{self._process:03d}.parquet", pa.table(columns), metadata)
        except OSError:
            while len(self) > _MOST_HELD:
                self.lost += len(self._held.pop(0)[0])
            raise
        self._held.clear()


def top_experts(weights_SLE: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    """The heaviest experts of each sample and layer, ties to the lower index: (experts, shares), both [S, L, K].

    Experts are uint8 where their numbers fit, else uint16; shares of the routing weight are float16.
    """
    order_SLE = np.argsort(-weights_SLE, axis=-1, kind="stable")[..., :top]
    shares = np.take_along_axis(weights_SLE, order_SLE, -1).astype(np.float16)
    return order_SLE.astype(np.uint8 if weights_SLE.shape[-1] <= 256 else np.uint16), shares


def read_samples(run: Path) -> Iterator[pa.Table]:
    """The pieces of a run, by step and process; list columns hold L * K values, layer by layer.

    Raises:
        StoreError: a piece that is cut off or altered, by name.
    """
    for path in sorted((run / FOLDER).glob("samples_*.parquet")):
        yield read_piece(path)


def _without_routing(records: SampleRouting) -> SampleRouting:
    """The records with nothing in their large arrays."""
    nothing = np.zeros((len(records), 0, 0), np.float32)
    return SampleRouting(records.order, records.sample, records.domain, nothing, nothing, nothing)
