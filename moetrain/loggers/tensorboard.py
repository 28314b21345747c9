"""What a run shows, into TensorBoard under the fixed tag names; and where a resumed run takes its files up again."""

from __future__ import annotations

import io
import os
import re
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.scalar.metadata import create_summary_metadata
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import custom_scalars, histogram, image

from moetrain import grokking
from moetrain.atomic_io import AppendOnlyFile
from moetrain.fault_injection import fault_point

_PREFIX = "events.out.tfevents."
_BINS = 30  # of a distribution: as many as TensorBoard shows

# What describes itself; the pathway metrics are described by grokking's README.
_DESCRIPTIONS = {
    "loss/train": "Training loss, nats a predicted token, before the update, over the steps since the last point.",
    "loss/balance": "Load-balancing loss by layer, averaged; 1 where every expert gets the same load.",
    "loss/z": "Mean squared logsumexp of the router's logits (router z loss).",
    "loss/validation": "Loss on held-out text, nats a predicted token.",
    "loss/validation_bpb": "Loss on held-out text in bits per byte of text, which no tokenizer changes.",
    "loss/panel_seen": "Loss of the panel's samples that the run has trained on, over their first panel tokens, nats.",
    "loss/panel_to_come": "Loss of the panel's samples that the run first meets in its last tenth, nats.",
    "loss/panel_heldout": "Loss of the panel's samples that the run never meets, nats.",
    "optim/learning_rate": "Learning rate of the update.",
    "optim/grad_norm": "Norm of the gradient before clipping.",
    "data/tokens": "Text tokens of the domain trained on so far.",
    "experts/load_cv": "Standard deviation of the experts' load over its mean; 0 is perfect balance.",
    "experts/entropy": "Entropy of the experts' load as a share of its maximum; 1 is perfect balance.",
    "experts/dead": "Experts of a layer that got no token since the last point.",
    "system/tokens_per_second": "Text and mark tokens trained on each second, time spent training alone.",
    "system/mfu": "Share of the machine's matrix rate, measured at the start, that training reaches: 6 operations for "
    "each token and active parameter; attention's own products are not counted.",
    "system/memory": "Largest memory held so far, bytes: the device's on CUDA, else the process's.",
    "system/monitor_share": "Share of the run's time spent on monitoring.",
    "system/monitor_panel": "Share of the run's time spent on reading the panel and on its metrics.",
    "system/monitor_probes": "Share of the run's time spent on reading the probes.",
    "system/monitor_stream": "Share of the run's time spent on recording and the streaming metrics.",
}


_PROBE_DESCRIPTIONS = {
    "accuracy": "Share of the task's items answered right: the right choice has the largest log-probability, or the "
    "likeliest answer is the target.",
    "accuracy_per_character": "Share of items whose right choice has the largest log-probability a character.",
    "accuracy_centred": "Accuracy on a scale where chance is 0 and all right is 1.",
    "bpb": "Bits per byte of the right answer, given the question: falls long before accuracy rises.",
    "soft": "Probability of the right choice among the choices, mean over items: steadier than accuracy.",
    "exact_match": "Share of items whose generated answer is the target.",
}


# The charts of the monitor's page, in reading order; a tag stands for one curve a domain.
_MONITOR_PAGE = {
    "phase: 1 learning, 2 memorizing, 3 generalizing, 4 settled": ["phase"],
    "leave-one-out accuracy (answers told by the routing of other samples)": ["kernel/left_out"],
    "training loss": ["loss/train"],
    "panel loss: seen": ["loss/panel_seen"],
    "panel loss: held out": ["loss/panel_heldout"],
    "gap of samples to come over samples seen": ["memorized/gap"],
    "gap of held-out samples over samples seen": ["memorized/gap_heldout"],
    "pathway distance, normalised": ["pathway/d_path_norm"],
    "spread of routing": ["pathway/spread"],
    "effective rank": ["kernel/effective_rank"],
    "agreement of consecutive layers (CKA)": ["pathway/layer_cka"],
    "cosine of consecutive layers": ["pathway/cosine"],
    "effective dimension of the routing kernel": ["kernel/d_eff"],
    "control: pathway distance of held-out samples": ["pathway_heldout/d_path_norm"],
    "control: individuality (above 0 where samples differ)": ["pathway/individuality"],
    "control: sharing (closer than to other domains)": ["pathway/sharing"],
    "control: load of the experts": ["experts/load_cv", "experts/entropy"],
}
_WHOLE = ("experts/load_cv", "experts/entropy")  # curves of the whole model


class TensorBoard:
    """Scalars, images and distributions of a run, in a file of its folder; `flush` writes what was taken in."""

    def __init__(self, run: Path, purge_step: int | None = None) -> None:
        _wait_for_a_later_name(run)
        # The name that TensorBoard looks for; the second it was made in orders a run's files.
        self._file = AppendOnlyFile(run / f"{_PREFIX}{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.0")
        self._described: set[str] = set()
        self._add(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if purge_step is not None:
            start = SessionLog(status=SessionLog.START)
            self._add(Event(wall_time=time.time(), step=purge_step, session_log=start))

    def lay_out(self, domains: Sequence[str], tasks: Sequence[str] = (), trained_tasks: Sequence[str] = ()) -> None:
        """The custom-scalars page ``Grokking monitor``: loss against routing by domain, with the controls beside.

        Args:
            tasks, trained_tasks: probes, and those among them that ask for trained facts.
        """
        charts = {
            title: [tag if tag in _WHOLE else f"{tag}/{domain}" for tag in tags for domain in domains]
            for title, tags in _MONITOR_PAGE.items()
        }
        heldout = [task for task in tasks if task not in trained_tasks]
        if heldout:
            charts["probes: accuracy above chance (0) to all right (1)"] = [
                f"probe/{task}/accuracy_centred" for task in heldout
            ]
            charts["probes: bits per byte of the right answer"] = [f"probe/{task}/bpb" for task in heldout]
        if trained_tasks:
            charts["probes of trained facts: accuracy"] = [f"probe/{task}/accuracy" for task in trained_tasks]
        self.lay_out_charts({"Grokking monitor": charts})

    def lay_out_charts(self, pages: Mapping[str, Mapping[str, Sequence[str]]]) -> None:
        """Pages of custom scalars by title, each with its charts by title, each with the tags that it shows."""
        patterns = {  # TensorBoard takes patterns
            page: {
                title: ["Multiline", [f"^{re.escape(tag)}$" for tag in dict.fromkeys(shown)]]
                for title, shown in charts.items()
            }
            for page, charts in pages.items()
        }
        self._add(Event(wall_time=time.time(), summary=custom_scalars(patterns)))

    def scalar(self, tag: str, value: float, step: int, remark: str = "") -> None:
        """One point. A tag's first point brings its description along, and with it the remark."""
        metadata = None
        if tag not in self._described:
            self._described.add(tag)
            metadata = create_summary_metadata(display_name=tag, description=f"{describe_tag(tag)} {remark}".strip())
        self._show(Summary(value=[Summary.Value(tag=tag, simple_value=value, metadata=metadata)]), step)

    def scalars(self, points: Mapping[str, float], step: int) -> None:
        for tag, value in points.items():
            self.scalar(tag, value, step)

    def image(self, tag: str, pixels_HW3: np.ndarray, step: int) -> None:
        """A picture, uint8 [H, W, 3]."""
        self._show(image(tag, pixels_HW3, dataformats="HWC"), step)

    def histogram(self, tag: str, values: np.ndarray, step: int) -> None:
        """A distribution; nothing where there are no values."""
        if len(values):
            self._show(histogram(tag, values, bins=_BINS), step)

    def flush(self, durable: bool = False) -> None:
        """Write what was taken in.

        Raises:
            OSError: there is no room; it waits for the next call.
        """
        self._file.write(durable)

    def _show(self, summary: Summary, step: int) -> None:
        self._add(Event(wall_time=time.time(), step=step, summary=summary))

    def _add(self, event: Event) -> None:
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        self._file.add(record.getvalue())


def describe_tag(tag: str) -> str:
    """What a tag shows, how to read it and what it does not mean."""
    parts = tag.split("/")
    if parts[0] == "probe":
        return _PROBE_DESCRIPTIONS[parts[-1]]
    for length in range(len(parts), 0, -1):
        known = _DESCRIPTIONS.get("/".join(parts[:length]))
        if known:
            return known
    return grokking.describe(tag)


def _wait_for_a_later_name(run: Path) -> None:
    """Until a new file's name, which begins with the second it was made in, sorts after those that are there.

    TensorBoard reads files by name and takes points that come out of order for a crash, dropping what came before.
    """
    newest = max((int(path.name.split(".")[3]) for path in run.glob(_PREFIX + "*")), default=0)
    while int(time.time()) <= newest:
        time.sleep(0.05)


def event_file_sizes(run: Path) -> dict[str, int]:
    """Bytes of each TensorBoard file of a run, by name."""
    return {path.name: path.stat().st_size for path in sorted(run.glob(_PREFIX + "*"))}


def cut_run_files(run: Path, sizes: Mapping[str, int]) -> None:
    """Take the run's growing files back to what a checkpoint found: cut to size, later ones removed.

    Raises:
        OSError: a file that the checkpoint knew is shorter now or gone.
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
