"""Routing of every training sample on disk: the experts with the largest weights of each layer, in Parquet.

Each rank writes the samples of its own rows in files that are written atomically. A checkpoint writes all samples added
so far, so that a run resumed from it stores each sample once.

Shapes: S samples, L layers, K experts stored per layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from moetrain.data.packing import Samples
from moetrain.routing.recorder import SampleRouting
from moetrain.routing.store import FOLDER, fixed_lists, read_table, write_table

FILE_SAMPLES = 16_384
"""Samples of a file."""
_MOST_HELD = 4 * FILE_SAMPLES  # while the disk is full, older samples are dropped beyond this


class SampleStore:
    """Collects the routing of training samples and writes it to files.

    Args:
        run: the run's folder.
        rank: of this process; each rank writes its own files.
        top: experts stored per layer, K.
        samples: the samples by number.
        domains: names by number.
        places: slots for samples in a step, used or not: position in the stream // places + 1 is the step.
    """

    def __init__(self, run: Path, rank: int, top: int, samples: Samples, domains: list[str], places: int) -> None:
        self._run = run
        self._rank = rank
        self._top = top
        self._samples = samples
        self._domains = domains
        self._places = places
        self._held: list[tuple[SampleRouting, np.ndarray, np.ndarray]] = []
        self.lost = 0  # samples dropped because they could not be written

    def __len__(self) -> int:
        """Samples that are not written yet."""
        return sum(len(records) for records, _, _ in self._held)

    def add(self, records: SampleRouting) -> None:
        """Add samples that were trained on."""
        if len(records):
            experts, shares = top_experts(records.weights, self._top)
            self._held.append((_without_routing(records), experts, shares))

    def write(self, everything: bool = False) -> None:
        """Write the samples added so far if they fill a file; with ``everything`` in any case.

        Raises:
            OSError: nothing was written; the samples are kept, up to four files of them.
        """
        if not self._held or (len(self) < FILE_SAMPLES and not everything):
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
            write_table(folder / f"samples_{steps[-1]:08d}_{self._rank:03d}.parquet", pa.table(columns), metadata)
        except OSError:
            while len(self) > _MOST_HELD:
                self.lost += len(self._held.pop(0)[0])
            raise
        self._held.clear()


def top_experts(weights_SLE: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    """The experts with the largest weights per sample and layer, ties to the lower index: (experts, shares) [S, L, K].

    Experts are uint8 if all numbers fit, else uint16; shares of the routing weight are float16.
    """
    order_SLE = np.argsort(-weights_SLE, axis=-1, kind="stable")[..., :top]
    shares = np.take_along_axis(weights_SLE, order_SLE, -1).astype(np.float16)
    return order_SLE.astype(np.uint8 if weights_SLE.shape[-1] <= 256 else np.uint16), shares


def read_samples(run: Path) -> Iterator[pa.Table]:
    """The files of a run, by step and rank; list columns hold L * K values, layer by layer.

    Raises:
        StoreError: a file is truncated or corrupt; the message names it.
    """
    for path in sorted((run / FOLDER).glob("samples_*.parquet")):
        yield read_table(path)


def _without_routing(records: SampleRouting) -> SampleRouting:
    """The records without their large arrays."""
    empty = np.zeros((len(records), 0, 0), np.float32)
    return replace(records, even_SLE=empty, odd_SLE=empty, counts_SLE=empty)
