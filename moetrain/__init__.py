"""Pretrain mixture-of-experts language models and watch memorization turn into generalization from the router alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from moetrain import _moved

if TYPE_CHECKING:
    from moetrain.report.open_run import OpenedRun

__version__ = "0.1.0"

_moved.install()


def open_run(path: str | Path) -> OpenedRun:
    """All of a run as data frames: settings, scalars, events, summary, panel, probes, samples, and what follows.

    path: the folder of a run, finished or not. Raises RunError where it is none, MissingPackageError without pandas.
    """
    from moetrain.report import open_run as module  # imported here: it would add seconds to `import moetrain`

    return module.open_run(path)
