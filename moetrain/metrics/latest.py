"""The newest value of every metric of a run, in the form of ``summary.json``.

It is state, not display: checkpoints hold it, correlations read it, and the summary is written from it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from moetrain.grokking import Estimate


def moving_average(before: float | None, value: float) -> float:
    """``train_loss_average`` after one more point, which has a weight of a tenth; None before the first."""
    return 0.9 * (value if before is None else before) + 0.1 * value


def as_metric(value: Estimate | float, n: int | None = None) -> dict[str, float | int | None]:
    """A metric as ``summary.json`` holds it: value, 95% interval (low, high) and sample count n; null where unknown."""
    fields: dict[str, float | int | None]
    if isinstance(value, Estimate):
        fields = {"value": value.mean, "low": value.low, "high": value.high, "n": value.samples}
    else:
        fields = {"value": value, "low": None, "high": None, "n": n}
    return {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in fields.items()}


class LatestMetrics:
    """The newest value of each metric per domain, and of each probe task.

    Attributes:
        domains: per domain ``{"metrics": {NAME: {"value", "low", "high", "n"}}, ...}``; at the end of a run also
            ``phase`` and its reason ``why``, ``memorized``, ``correlations`` and ``delay``.
        tasks: per probe task its metrics and how it was scored.
    """

    def __init__(self, domains: Sequence[str]) -> None:
        self.domains: dict[str, dict[str, Any]] = {name: {"metrics": {}} for name in domains}
        self.tasks: dict[str, dict[str, Any]] = {}

    def set(self, domain: str, metric: str, value: Estimate | float, n: int | None = None) -> None:
        """Replace a metric's value."""
        self.domains[domain]["metrics"][metric] = as_metric(value, n)

    def set_all(self, metrics: Mapping[str, Estimate]) -> None:
        """Replace the values of metrics, each by its TensorBoard tag ``METRIC/DOMAIN``."""
        for tag, estimate in metrics.items():
            metric, _, domain = tag.rpartition("/")
            self.set(domain, metric, estimate)

    def value(self, domain: str, metric: str) -> float:
        """A metric's value; NaN where it has none."""
        found = self.domains[domain]["metrics"].get(metric, {}).get("value")
        return math.nan if found is None else float(found)

    def set_train_loss(self, domain: str, loss: float) -> None:
        """Replace the training loss, nats per predicted token, and update its moving average."""
        self.set(domain, "train_loss", loss)
        before = self.domains[domain]["metrics"].get("train_loss_average", {"value": None})["value"]
        self.set(domain, "train_loss_average", moving_average(before, loss))

    def record(self) -> dict[str, Any]:
        """All values as JSON, for a checkpoint."""
        return {"domains": self.domains, "tasks": self.tasks}

    def load_record(self, record: Mapping[str, Any]) -> None:
        """Restore what `record` returned; domains that the run has had since then keep none."""
        self.domains, self.tasks = self.domains | record["domains"], record["tasks"]
