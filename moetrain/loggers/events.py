"""Events of a run in ``events.jsonl``, one JSON object per line: phases, probes, checkpoints, resumes, incidents."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moetrain.atomic_io import AppendOnlyFile
from moetrain.grokking import PhaseChange


def as_event(change: PhaseChange) -> dict[str, Any]:
    """A change of phase with its evidence; numbers that are not finite become null."""
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
        """Add one event; the next `flush` writes it."""
        self._file.add((json.dumps({"type": type_, "step": step, **fields}, allow_nan=False) + "\n").encode())

    def flush(self, durable: bool = False) -> None:
        """Write the events added so far.

        Raises:
            OSError: the disk is full; they are kept for the next call.
        """
        self._file.write(durable)

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self._file.size

    def cut(self, size: int) -> None:
        """Discard what was written beyond ``size`` bytes, and what is not written yet."""
        self._file.cut(size)
