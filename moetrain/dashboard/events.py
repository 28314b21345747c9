"""Events of a run, one JSON object a line in ``events.jsonl``: checkpoints, resumes, and what guards met."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class Events:
    """Appends events to a run's ``events.jsonl``."""

    def __init__(self, run: Path) -> None:
        self.path = run / "events.jsonl"
        self.path.touch()

    def write(self, type_: str, step: int, **fields: Any) -> None:
        """Append one event; it is on its way to disk when this returns."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"type": type_, "step": step, **fields}, allow_nan=False) + "\n")

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self.path.stat().st_size

    def cut(self, size: int) -> None:
        """Take back what was written beyond ``size`` bytes."""
        os.truncate(self.path, size)
