"""Module names of earlier versions: importing one works for one release, with a warning that names the new module."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

# Old name: new name, both below `moetrain`.
MOVED = {
    "dashboard.charts": "report.charts",
    "dashboard.compare": "report.compare",
    "dashboard.derived": "report.derived",
    "dashboard.events": "loggers.events",
    "dashboard.figures": "loggers.heat_map",
    "dashboard.findings": "report.findings",
    "dashboard.learning_figures": "report.learning_figures",
    "dashboard.open_run": "report.open_run",
    "dashboard.outputs": "loggers.run_logger",
    "dashboard.page": "report.page",
    "dashboard.preview": "loggers.preview",
    "dashboard.report": "report.report",
    "dashboard.routing_figures": "report.routing_figures",
    "dashboard.summary": "loggers.summary",
    "dashboard.tensorboard": "loggers.tensorboard",
    "dashboard.terminal": "loggers.terminal",
    "dashboard.trackers": "loggers.trackers",
    "dashboard.trend": "report.trend",
    "data.builtin.arithmetic_items": "data.builtin.arithmetic",
    "data.builtin.facts": "data.builtin.arithmetic_facts",
    "data.builtin.phrases_steps": "data.builtin.phrases",
    "data.builtin.small_world_items": "data.builtin.small_world_text",
    "data.builtin.spelling": "data.builtin.arithmetic",
    "data.parts": "data.token_shards",
    "data.seen": "data.dedup",
    "durable": "atomic_io",
    "faults": "fault_injection",
    "model.attention": "models.attention",
    "model.backends": "models.backends",
    "model.elementwise": "models.elementwise",
    "model.experts": "models.experts",
    "model.grouped": "models.experts_grouped",
    "model.hf": "models.hf",
    "model.loss": "models.loss",
    "model.megablocks": "models.experts_megablocks",
    "model.router": "models.router",
    "model.tiled": "models.experts_cpu",
    "model.transformer": "models.transformer",
    "model.varlen": "models.attention_varlen",
    "probes.hub_tasks": "probes.hub",
    "probes.items": "probes.tasks",
    "routing.beside": "monitoring.background",
    "routing.monitor": "routing.stream",
    "routing.samples": "routing.sample_store",
    "run.budget": "monitoring.budget",
    "run.delays": "monitoring.delays",
    "run.probing": "probes.probe_monitor",
    "run.replay": "replay",
    "settings.base": "config.base",
    "settings.data": "config.data",
    "settings.monitoring": "config.monitoring",
    "settings.training": "config.training",
    "training.checkpoint": "checkpoint.manager",
    "training.curves": "training.train_metrics",
    "training.heartbeat": "distributed.watchdog",
    "training.optimizer": "optim.builder",
    "training.restore": "checkpoint.restore",
    "training.run_folder": "checkpoint.run_folder",
    "training.schedule": "optim.schedule",
    "training.sharding": "distributed.sharding",
    "training.shards": "checkpoint.sharded_tensors",
    "training.signals": "distributed.signals",
    "training.suspects": "training.incident_samples",
    "transfer": "device_transfer",
}
_OLD_PACKAGES = {old.partition(".")[0] for old in MOVED if "." in old}


class _MovedFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds old names after every other finder has failed, and loads the module that replaced them."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        package, _, old = fullname.partition(".")
        if package != "moetrain" or not (old in MOVED or old in _OLD_PACKAGES):
            return None
        return importlib.util.spec_from_loader(fullname, self, is_package=old in _OLD_PACKAGES)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        old = spec.name.removeprefix("moetrain.")
        if old not in MOVED:
            return None  # an old package: empty, its modules are found one by one
        new = f"moetrain.{MOVED[old]}"
        warnings.warn(f"{spec.name} has moved to {new}: import it from there", DeprecationWarning, stacklevel=2)
        moved = importlib.import_module(new)
        alias = ModuleType(spec.name, moved.__doc__)
        alias.__dict__.update({name: value for name, value in vars(moved).items() if not name.startswith("__")})
        return alias

    def exec_module(self, module: ModuleType) -> None:
        """Nothing is left to execute."""


def install() -> None:
    """Make old module names importable."""
    if not any(isinstance(finder, _MovedFinder) for finder in sys.meta_path):
        sys.meta_path.append(_MovedFinder())
