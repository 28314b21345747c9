"""TensorBoard files of a run under the fixed tag names, and how a resumed run cuts them to its checkpoint."""

from __future__ import annotations

import io
import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.scalar.metadata import create_summary_metadata
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import histogram, image, text

from moetrain.atomic_io import AppendOnlyFile
from moetrain.fault_injection import fault_point
from moetrain.loggers.monitor_page import Pages, charts_laid_out, layout_summary, monitor_charts
from moetrain.metrics import table

_PREFIX = "events.out.tfevents."
_BINS = 30  # of a histogram: as many as TensorBoard shows


class TensorBoard:
    """Scalars, images and histograms of a run, in a file of its folder; `flush` writes what was added."""

    def __init__(self, run: Path, purge_step: int | None = None) -> None:
        _wait_for_a_later_name(run)
        # TensorBoard looks for this name; the time in it orders a run's files.
        self._file = AppendOnlyFile(run / f"{_PREFIX}{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.0")
        self._tags: set[str] = set()  # that have a point in this file
        self._pages: Pages = {}
        self._laid_out = charts_laid_out(sorted(run.glob(_PREFIX + "*")))
        self._add(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if purge_step is not None:
            start = SessionLog(status=SessionLog.START)
            self._add(Event(wall_time=time.time(), step=purge_step, session_log=start))

    def lay_out(self, domains: Sequence[str], tasks: Sequence[str] = (), trained_tasks: Sequence[str] = ()) -> None:
        """Begin the pages of custom scalars: each of `monitor_charts` is there from its first point on."""
        self._pages = monitor_charts(domains, tasks, trained_tasks)

    def lay_out_charts(self, pages: Pages) -> None:
        """Write pages of custom scalars."""
        self._show(layout_summary(pages), step=0)

    def scalar(self, tag: str, value: float, step: int, remark: str = "", same_as: str = "") -> None:
        """Add one point. A tag's first point carries its description, or that of ``same_as``, and the remark."""
        metadata = None
        if tag not in self._tags:
            self._tags.add(tag)
            described = f"{table.describe(same_as or tag)} {remark}".strip()
            metadata = create_summary_metadata(display_name=tag, description=described)
        self._show(Summary(value=[Summary.Value(tag=tag, simple_value=value, metadata=metadata)]), step)

    def image(self, tag: str, pixels_HW3: np.ndarray, step: int) -> None:
        """Add an image, uint8 [H, W, 3]."""
        self._show(image(tag, pixels_HW3, dataformats="HWC"), step)

    def histogram(self, tag: str, values: np.ndarray, step: int) -> None:
        """Add a histogram; nothing if there are no values."""
        if len(values):
            self._show(histogram(tag, values, bins=_BINS), step)

    def text(self, tag: str, markdown: str, step: int) -> None:
        """Add a text."""
        self._show(text(tag, markdown), step)

    def flush(self, durable: bool = False) -> None:
        """Write what was added.

        Raises:
            OSError: the disk is full; everything is kept for the next call.
        """
        charts = {title: chart for charts in self._pages.values() for title, chart in charts.items()}
        shown = {title for title, chart in charts.items() if self._tags.intersection(chart.tags)}
        if not shown <= self._laid_out:
            self._laid_out |= shown
            known = {
                page: {title: chart for title, chart in charts.items() if title in self._laid_out}
                for page, charts in self._pages.items()
            }
            self.lay_out_charts({page: charts for page, charts in known.items() if charts})
        self._file.write(durable)

    def _show(self, summary: Summary, step: int) -> None:
        self._add(Event(wall_time=time.time(), step=step, summary=summary))

    def _add(self, event: Event) -> None:
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        self._file.add(record.getvalue())


def _wait_for_a_later_name(run: Path) -> None:
    """Wait until a new file's name, which begins with the current second, sorts after those of existing files.

    TensorBoard reads files in order of names. It takes points out of order for a crash and drops earlier ones.
    """
    newest = max((int(path.name.split(".")[3]) for path in run.glob(_PREFIX + "*")), default=0)
    while int(time.time()) <= newest:
        time.sleep(0.05)


def event_file_sizes(run: Path) -> dict[str, int]:
    """Sizes in bytes of a run's TensorBoard files, by name."""
    return {path.name: path.stat().st_size for path in sorted(run.glob(_PREFIX + "*"))}


def cut_run_files(run: Path, sizes: Mapping[str, int]) -> None:
    """Cut the run's growing files to their sizes at a checkpoint, and remove later files.

    Raises:
        OSError: a file of the checkpoint is shorter now, or missing.
    """
    for path in [*run.glob(_PREFIX + "*"), run / "events.jsonl"]:
        if path.name not in sizes:
            path.unlink(missing_ok=True)
            fault_point("remove later file")
    for name, size in sizes.items():
        if (run / name).is_symlink():
            raise OSError(f"{run / name}: a link to outside of the run: put the file itself there")
        with open(run / name, "r+b") as file:
            if file.seek(0, io.SEEK_END) < size:
                raise OSError(f"{run / name}: shorter than at the checkpoint: resume from an earlier checkpoint")
            file.truncate(size)
            os.fsync(file.fileno())
        fault_point("cut file")
