"""What a watched training reads, and when."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from moetrain.config import Settings
from moetrain.integrations.families import Routers
from moetrain.integrations.rows import MonitorError


@dataclass(frozen=True)
class MonitorOptions:
    """What is read, and when; see `moetrain.integrations.transformers.MonitorCallback`."""

    output_dir: str
    samples: int
    tokens: int
    readings: int
    every: int
    window: int
    tau: float
    batch_rows: int | None
    report: bool

    def settings(self, domains: Sequence[str]) -> Settings:
        """The same as settings of a run of ours.

        Raises:
            MonitorError: a value out of range; names it.
        """
        if self.batch_rows is not None and self.batch_rows < 1:
            raise MonitorError(f"MonitorCallback: batch_rows={self.batch_rows!r}: give at least 1, or None")
        name = re.sub(r"[^A-Za-z0-9._-]", "_", Path(self.output_dir).name).lstrip("._-") or "run"
        tree = {
            "run": {"name": name, "output_dir": str(Path(self.output_dir).parent)},
            "data": {"domains": {name: {"path": "rows of another trainer's data set"} for name in domains}},
            "panel": {"samples": self.samples, "tokens": self.tokens, "readings": self.readings},
            "monitor": {"every": self.every, "window": self.window, "tau": self.tau},
        }
        try:
            return Settings.model_validate(tree)
        except ValidationError as error:
            first = error.errors()[0]
            raise MonitorError(f"MonitorCallback: {first['loc'][-1]}={first['input']!r}: {first['msg']}") from None

    def config(self, copies: Mapping[str, int], routers: Routers) -> str:
        """``config.yaml`` of the run's folder: the settings that apply, and the model's shape.

        Args:
            copies: by domain, of each of its texts in the training data, on average.
        """
        tree = self.settings(list(copies)).model_dump()
        kept: dict[str, Any] = {name: tree[name] for name in ("run", "data", "panel", "monitor", "phase")}
        for domain, count in copies.items():
            kept["data"]["domains"][domain]["repeats"] = count
        kept["model"] = {
            "num_hidden_layers": len(routers.modules),
            "num_experts": routers.experts,
            "num_experts_per_tok": routers.top_k,
        }
        return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)
