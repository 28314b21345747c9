"""Pretrain mixture-of-experts language models and monitor memorization and generalization in training.

``moetrain.open_run(path)`` gives all records of a run as data frames: settings, scalars, events, summary, panel,
probes, samples, and what follows from them. ``path`` is the folder of a run, finished or not. It raises RunError for
another folder, and MissingPackageError without pandas; see `moetrain.report.open_run`.
"""

from __future__ import annotations

import importlib
from typing import Any

from moetrain import _moved
from moetrain.version import __version__ as __version__

_moved.install()


def __getattr__(name: str) -> Any:
    """`open_run`, imported when it is first used: it would add seconds to `import moetrain`."""
    if name == "open_run":
        return importlib.import_module("moetrain.report.open_run").open_run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), "open_run"]
