"""A run's folder as data frames, of a finished run or of one that is still training or was interrupted.

    run = moetrain.open_run("runs/quickstart")
    run.scalars.query("tag == 'loss/train'").plot("tokens", "value")

Each frame is read when it is first accessed, and is tidy: one observation per row.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from moetrain.grokking import Estimate
from moetrain.metrics import table
from moetrain.report import derived
from moetrain.report.records import MissingPackageError, Progress, Records, RunError, frame, need

if TYPE_CHECKING:
    import pandas as pd

_CURVE = ["domain", "metric", "step", "tokens", "value", "low", "high", "n"]

__all__ = ["MissingPackageError", "OpenedRun", "Progress", "RunError", "need", "open_run"]


def open_run(path: str | Path, progress: Progress = lambda what, done, total: None) -> OpenedRun:
    """A run, or a replay of one, as data frames.

    Args:
        path: folder of the run.
        progress: called while something slow is computed.

    Raises:
        RunError: the folder is not that of a run.
        MissingPackageError: pandas is not installed.
    """
    folder = Path(path).expanduser()
    if not (folder / "config.yaml").is_file():
        raise RunError(f"{folder}: no config.yaml there: give the folder of a run, such as runs/quickstart")
    need("pandas", "open_run")
    return OpenedRun(folder, progress)


class OpenedRun(Records):
    """The records of a run, and what follows from them by the functions that computed it during training.

    Attributes:
        path: the run's folder.
        progress: called while something slow is computed.
    """

    def __init__(self, path: Path, progress: Progress) -> None:
        super().__init__(path, progress)
        self._metrics: dict[int, dict[str, Estimate]] = {}

    @cached_property
    def summary(self) -> pd.DataFrame:
        """domain, task, metric, value, low, high, n: the newest value of each metric with its 95% interval.

        ``task`` is empty except for probes. For an unfinished run it is computed from its records so far: the intervals
        of the panel's metrics from its readings.
        """
        found = self.outcome.get("domains") or derived.newest_metrics(self, self.metrics_at)
        rows = [
            (domain, "", metric, *(each[key] for key in ("value", "low", "high", "n")))
            for domain, one in found.items()
            for metric, each in one["metrics"].items()
        ]
        tasks = self.outcome.get("probes") or {event["task"]: event for event in self.events_of("probe")}
        rows += [
            (one["domain"], task, metric, *(each[key] for key in ("value", "low", "high", "n")))
            for task, one in tasks.items()
            for metric, each in one["metrics"].items()
        ]
        numbers = ["value", "low", "high", "n"]
        return frame(rows, ["domain", "task", "metric", *numbers]).astype(dict.fromkeys(numbers, "float64"))

    def metrics_at(self, step: int) -> dict[str, Estimate]:
        """The panel metrics at a reading by TensorBoard tag, with intervals, computed from the stored reading."""
        if step not in self._metrics:
            self._metrics[step] = derived.metrics_at(self, step)
        return self._metrics[step]

    @cached_property
    def by_layer(self) -> pd.DataFrame:
        """domain, step, tokens, layer, d_path (normalised), d_eff: of panel samples trained on, from the readings."""
        return frame(derived.by_layer(self), ["domain", "step", "tokens", "layer", *derived.layer_columns()])

    @cached_property
    def onsets(self) -> pd.DataFrame:
        """domain, document, piece, eps, step, tokens: when each seen panel sample was memorized, by the paper's rule.

        ``step`` is -1 for a sample that was not; ``eps`` is NaN, and no sample memorized, where no threshold gives a
        fifth of a domain's samples an onset. For an unfinished run: as if it had ended at its newest reading.
        """
        return frame(derived.onsets(self), ["domain", "document", "piece", "eps", "step", "tokens"])

    @cached_property
    def accuracy(self) -> pd.DataFrame:
        """domain, trained, step, tokens, accuracy, low, high, items, chance: over all items of a domain's tasks.

        Only tasks answered correctly or not; those of trained facts by themselves. Wilson's 95% interval.
        """
        columns = ["domain", "trained", "step", "tokens", "accuracy", "low", "high", "items", "chance"]
        return frame(derived.accuracy(self), columns).astype({"trained": bool})

    @cached_property
    def predictors(self) -> pd.DataFrame:
        """As `accuracy` without trained facts, with the newest value of each predictor at that reading."""
        columns = [*self.accuracy.columns.drop("trained"), *table.predictors()]
        return frame(derived.predictors(self, self.accuracy), columns)

    @cached_property
    def loss_curves(self) -> pd.DataFrame:
        """domain, metric, step, tokens, value, low, high, n: losses of the panel's cells, and the gaps between them.

        The curves ``loss/panel_*``, ``memorized/gap*`` and ``memorized/share`` of TensorBoard with their intervals,
        from the readings.
        """
        losses = ("loss_seen", "loss_to_come", "loss_heldout", "loss_unseen", "loss_frequencies")
        names = (*losses, "gap", "gap_heldout", "share")
        return frame(derived.panel_curves(self, names), _CURVE)

    @cached_property
    def left_out(self) -> pd.DataFrame:
        """domain, step, tokens, value, low, high, n: leave-one-out accuracy, ``kernel/left_out``, from the readings."""
        found = frame(derived.panel_curves(self, ["left_out"]), _CURVE).drop(columns="metric")
        return found.sort_values("domain", kind="stable", ignore_index=True)

    @cached_property
    def correlations(self) -> pd.DataFrame:
        """domain, predictor, series, method, value, low, high, p, n, note: of accuracy with each predictor.

        A domain without correlations has one row with the reason. For an unfinished run: of its readings so far.
        """
        columns = ["domain", "predictor", "series", "method", "value", "low", "high", "p", "n", "note"]
        return frame(derived.correlation_rows(self, self.predictors), columns)

    @cached_property
    def delays(self) -> pd.DataFrame:
        """domain, memorized_step, generalized_step, similarity, samples, items, delay and resolution in steps and in
        tokens, note: groups of seen samples with the groups of probe items they are paired with.

        A domain without pairs has one row with the reason. Groups are paired at the end of a run.
        """
        return frame(derived.delays(self), derived.DELAY_COLUMNS)
