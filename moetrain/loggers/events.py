"""Events of a run, one JSON object a line in ``events.jsonl``: checkpoints, resumes, and what guards met."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moetrain.atomic_io import AppendOnlyFile
from moetrain.grokking import PhaseChange


def as_event(change: PhaseChange) -> dict[str, Any]:
    """A change of phase with its evidence, numbers that do not exist as null."""
    verdict = change.verdict
    evidence = [
        {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in asdict(item).items()}
        for item in verdict.evidence
    ]
    return {
        "before": change.before.name.lower(),
        "after": change.after.name.lower(),
        "why": verdict.why,
        "sentence": verdict.sentence,
        "evidence": evidence,
    }


class Events:
    """Appends events to a run's ``events.jsonl``."""

    def __init__(self, run: Path) -> None:
        self.path = run / "events.jsonl"
        self._file = AppendOnlyFile(self.path)

    def write(self, type_: str, step: int, **fields: Any) -> None:
        """Take in one event; the next `flush` writes it."""
        self._file.add((json.dumps({"type": type_, "step": step, **fields}, allow_nan=False) + "\n").encode())

    def flush(self, durable: bool = False) -> None:
        """Write what was taken in.

        Raises:
            OSError: there is no room; it waits for the next call.
        """
        self._file.write(durable)

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self._file.size

    def cut(self, size: int) -> None:
        """Take back what was written beyond ``size`` bytes, and what waits."""
        self._file.cut(size)
