"""What ``summary.json`` holds of a finished run, and of a replay."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from moetrain.config import Settings
from moetrain.data.corpus import Corpus
from moetrain.data.stream import Stream
from moetrain.grokking.paper import CORRELATIONS
from moetrain.loggers.preview import data_summary
from moetrain.metrics.latest import LatestMetrics
from moetrain.run_state import RunState
from moetrain.version import __version__


@dataclass(frozen=True)
class Speed:
    """What a run took, since its start or, where it was resumed, since then.

    Attributes:
        measured_tokens: of text and marks, trained on in this time.
        tokens_per_second: of the time spent training alone.
        monitor_share: share of all measured time spent on monitoring.
        seconds: per purpose.
    """

    measured_tokens: int
    tokens_per_second: float
    monitor_share: float
    peak_memory_bytes: int
    seconds: dict[str, float]


def metrics_summary(latest: LatestMetrics) -> dict[str, Any]:
    """The newest values per domain and per probe, with the paper's correlations to compare with."""
    return {"domains": latest.domains, "probes": latest.tasks, "correlations_of_the_paper": CORRELATIONS}


def run_summary(
    state: RunState,
    corpus: Corpus,
    stream: Stream,
    steps: int,
    settings: Settings,
    parameters: tuple[int, int],
    speed: Speed,
) -> dict[str, Any]:
    """All of ``summary.json`` of a finished run; ``parameters``: all, and active for one token.

    ``tokens`` are those of text and the marks of beginning and end, ``text_tokens`` those of text alone.
    """
    data = data_summary(corpus, stream, steps, settings)
    return {
        **metrics_summary(state.monitor.latest),
        "data": data,
        "steps": steps,
        "tokens": state.tokens_trained,
        "text_tokens": sum(int(domain["met_tokens"]) for domain in data.values()),
        "parameters": dict(zip(("all", "active"), parameters, strict=True)),
        "rows_full": stream.fullness(),
        "skipped_updates": state.guards.skipped,
        "samples_not_finite": state.monitor.stream.not_finite,
        **asdict(speed),
        "version": __version__,
    }
