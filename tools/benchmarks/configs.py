"""The configurations that benchmarks run: files and overrides as in a training run, a default for each benchmark."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moetrain.config import Settings, SettingsError, load_settings
from moetrain.trainer import Trainer

_ROOT = Path(__file__).parents[2]
KNOWN = {
    "quickstart": _ROOT / "configs" / "quickstart.yaml",
    "peers": Path(__file__).parent / "peers.yaml",
    "wide_routing": Path(__file__).parent / "wide_routing.yaml",
    "olmoe_shape": Path(__file__).parent / "olmoe_shape.yaml",
}


def add_configs(parser: argparse.ArgumentParser, *defaults: str) -> None:
    """Let a benchmark take configurations and overrides as a training run does."""
    shown = " and ".join(str(KNOWN[name].relative_to(_ROOT)) for name in defaults)
    parser.add_argument(
        "config", nargs="*", metavar="CONFIG.yaml | section.key=value", help=f"what to run (default {shown})"
    )
    parser.set_defaults(default_configs=defaults)


def load_configs(options: argparse.Namespace) -> list[Settings]:
    """The settings that the command line names, or the benchmark's own, each with all overrides.

    Raises:
        SettingsError: as `load_settings`.
    """
    overrides = [word for word in options.config if "=" in word]
    paths = [word for word in options.config if "=" not in word] or [KNOWN[name] for name in options.default_configs]
    return [load_settings(path, overrides) for path in paths]


@contextmanager
def open_run(settings: Settings, steps: int) -> Iterator[Trainer]:
    """A run that is ready for its first step, of data enough for ``steps`` of them.

    Raises:
        SettingsError: data for fewer steps.
    """
    run = Trainer.build(settings)
    try:
        if run.stream.steps < steps:
            raise SettingsError(
                f"{settings.run.name}: the data is enough for {run.stream.steps} steps, the benchmark takes {steps}: "
                "give more data, or ask for fewer steps"
            )
        yield run
    finally:
        run.close()
