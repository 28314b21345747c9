"""The probes of a run: its tasks, prepared for the model, and their readings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from moetrain.config import Settings
from moetrain.data.corpus import Corpus, Progress
from moetrain.probes.history import ProbeHistory
from moetrain.probes.requests import BATCH_TOKENS
from moetrain.probes.scoring import PreparedTasks, TaskScore, prepare
from moetrain.probes.tasks import Tasks, load_tasks
from moetrain.routing.store import FOLDER, write_table

COLUMNS = ("probe", "domain", "items", "of", "in training text", "cut", "chance")


@dataclass
class ProbeMonitor:
    """The tasks of a run and their readings so far."""

    tasks: Tasks
    prepared: PreparedTasks
    history: ProbeHistory

    def rows(self) -> list[list[str]]:
        """A table of the tasks, with the columns `COLUMNS`."""
        rows = []
        for part in self.prepared.parts:
            task = part.task
            size = f"{len(task.items):,}" + (" (too few)" if task.too_few else "")
            numbers = (f"{task.available:,}", f"{task.contaminated:,}", f"{part.cut:,}", f"{task.chance:.1%}")
            rows.append([task.name, task.domain, size, *numbers])
        asked = {task.name for task in self.tasks.tasks}
        for name, count in self.tasks.contamination.tasks.items():
            if name not in asked:
                rows.append([name, "-", "0", f"{count.items:,}", f"{count.contaminated:,}", "-", "-"])
        return rows


def load_probes(settings: Settings, corpus: Corpus, progress: Progress) -> ProbeMonitor | None:
    """The probes of a run; None where no task has items. Raises as `load_tasks`."""
    tasks = load_tasks(settings, corpus, progress)
    if not tasks.tasks:
        return None
    prepared = prepare(tasks.tasks, corpus.tokenizer, settings.data.seq_len, BATCH_TOKENS)
    return ProbeMonitor(tasks, prepared, ProbeHistory(tasks.tasks))


def write_scores(run: Path, step: int, scores: dict[str, TaskScore]) -> Path:
    """Write a reading to the run's folder, one row per item: whether it was correct, log-probabilities of its choices.

    Raises:
        OSError: it could not be written.
    """
    rows: dict[str, list[Any]] = {name: [] for name in ("task", "domain", "item", "correct", "log_probs")}
    for name, scored in scores.items():
        size = len(scored.task.items)
        rows["task"] += [name] * size
        rows["domain"] += [scored.task.domain] * size
        rows["item"] += [str(item["id"]) for item in scored.task.items]
        rows["correct"] += [None] * size if scored.correct is None else scored.correct.tolist()
        rows["log_probs"] += [values.tolist() for values in scored.log_probs]
    columns = {
        "step": np.full(len(rows["task"]), step),
        "task": pa.array(rows["task"]).dictionary_encode(),
        "domain": pa.array(rows["domain"]).dictionary_encode(),
        "item": rows["item"],
        "correct": pa.array(rows["correct"], pa.bool_()),
        "log_probs": pa.array(rows["log_probs"], pa.list_(pa.float64())),
    }
    return write_table(run / FOLDER / f"probe_{step:08d}.parquet", pa.table(columns), {})
