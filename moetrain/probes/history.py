"""The readings of the probes so far: each task's metrics and each item's answers, for onsets, groups and delays."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from moetrain import grokking
from moetrain.data.errors import DataError
from moetrain.grokking.memorization import MIN_TAIL_IN_RUNS
from moetrain.probes.scoring import Measured, TaskScore
from moetrain.probes.tasks import Task

METRICS = ("accuracy", "accuracy_centred", "accuracy_per_character", "bpb", "soft", "exact_match")


class ProbeHistory:
    """Readings of all tasks in order of time. Shapes: T readings, I items of a task."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.tasks = {task.name: task for task in tasks}
        self._steps: list[int] = []
        self._tokens: list[int] = []
        self._values: dict[str, list[np.ndarray]] = {name: [] for name in self.tasks}  # [METRICS, 2]: value and error
        self._correct: dict[str, list[np.ndarray]] = {name: [] for name in self.tasks}  # bool [I]

    def add(self, step: int, tokens: int, scores: Mapping[str, TaskScore]) -> None:
        """Add a reading of all tasks, taken after ``step`` steps and ``tokens`` tokens of training."""
        self._steps.append(step)
        self._tokens.append(tokens)
        missing = Measured(math.nan, math.nan, 0)
        for name in self.tasks:
            found = [scores[name].metrics.get(metric, missing) for metric in METRICS]
            self._values[name].append(np.array([(each.value, each.error) for each in found]))
            correct = scores[name].correct
            if correct is not None:
                self._correct[name].append(correct)

    @property
    def times(self) -> grokking.ReadingTimes:
        """Steps and tokens of the readings."""
        return grokking.ReadingTimes(tuple(self._steps), tuple(self._tokens))

    def metric(self, task: str, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(values, standard errors) of a metric, float64 [T] each; NaN where the task does not have it."""
        series = np.array(self._values[task]).reshape(len(self._steps), len(METRICS), 2)[:, METRICS.index(name)]
        return series[:, 0], series[:, 1]

    def correct(self, task: str) -> np.ndarray:
        """Whether each item was answered correctly at each reading, bool [I, T]; [I, 0] for a likelihood task."""
        if not self._correct[task]:
            return np.zeros((len(self.tasks[task].items), 0), bool)
        return np.stack(self._correct[task], axis=1)

    def generalized(self, task: str) -> np.ndarray:
        """Reading at which each item is generalized, int64 [I]; -1 where it never is (METRICS, section 4)."""
        correct_IT = self.correct(task)
        if not correct_IT.size:
            return np.full(len(correct_IT), -1)
        return grokking.generalized_onsets(correct_IT, min_tail=MIN_TAIL_IN_RUNS)

    def groups(self, task: str) -> dict[int, np.ndarray]:
        """Groups ``Test@t#``: the items generalized at one reading, by that reading."""
        correct_IT = self.correct(task)
        return grokking.generalized_groups(correct_IT, min_tail=MIN_TAIL_IN_RUNS) if correct_IT.size else {}

    def group_sizes(self, task: str) -> dict[str, int]:
        """Number of items in each group ``Test@t#``, by the step of its reading; for ``summary.json``."""
        return {str(self._steps[reading]): len(items) for reading, items in sorted(self.groups(task).items())}

    def state(self) -> dict[str, torch.Tensor]:
        """All readings, for a checkpoint."""
        if not self._steps:
            return {}
        state = {"steps": torch.tensor(self._steps), "tokens": torch.tensor(self._tokens)}
        for name, task in self.tasks.items():
            state[f"items.{name}"] = _item_hashes(task)
            state[f"values.{name}"] = torch.from_numpy(np.stack(self._values[name]))
            state[f"correct.{name}"] = torch.from_numpy(self.correct(name))
        return state

    def changed_tasks(self, state: Mapping[str, torch.Tensor]) -> set[str]:
        """Names of the tasks whose items are not those of a checkpoint's readings, or that only one of them has."""
        saved = {key.removeprefix("items.") for key in state if key.startswith("items.")}
        changed = saved ^ self.tasks.keys()
        return changed | {
            name for name in saved - changed if not torch.equal(state[f"items.{name}"], _item_hashes(self.tasks[name]))
        }

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore the readings of a checkpoint.

        Raises:
            DataError: the tasks are not those of the readings.
        """
        if not state:
            return
        if changed := self.changed_tasks(state):
            raise DataError(
                f"probes: the items of {min(changed)} are not those that the checkpoint's readings are of: restore its "
                "file and settings, or set train.resume=never"
            )
        self._steps, self._tokens = state["steps"].tolist(), state["tokens"].tolist()
        for name in self.tasks:
            self._values[name] = list(state[f"values.{name}"].numpy().copy())
            self._correct[name] = list(state[f"correct.{name}"].numpy().T.copy())


def _item_hashes(task: Task) -> torch.Tensor:
    """A hash of each item's content, int64 [I]."""
    contents = (repr(sorted(item.items())).encode() for item in task.items)
    hashes = [int.from_bytes(hashlib.blake2b(each, digest_size=8).digest(), "little", signed=True) for each in contents]
    return torch.tensor(hashes)
