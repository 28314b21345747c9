"""The configurations that benchmarks run: files and overrides as for training, with a default per benchmark."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager

from common import CODE_AND_MATH, QUICKSTART, ROOT

from moetrain.config import Settings, SettingsError, load_settings
from moetrain.trainer import Trainer

KNOWN = {name: ROOT / "tools" / "benchmarks" / f"{name}.yaml" for name in ("peers", "wide_routing", "olmoe_shape")}
KNOWN |= {"quickstart": QUICKSTART, "code_and_math": CODE_AND_MATH}


def add_configs(parser: argparse.ArgumentParser, *defaults: str) -> None:
    """Add the argument for configurations and overrides."""
    shown = " and ".join(str(KNOWN[name].relative_to(ROOT)) for name in defaults)
    help_text = f"configuration and overrides (default {shown})"
    parser.add_argument("config", nargs="*", metavar="CONFIG.yaml | section.key=value", help=help_text)
    parser.set_defaults(default_configs=defaults)


def load_configs(options: argparse.Namespace) -> list[Settings]:
    """The settings named on the command line, or the benchmark's defaults, each with all overrides.

    Raises:
        SettingsError: as `load_settings`.
    """
    overrides = [word for word in options.config if "=" in word]
    paths = [word for word in options.config if "=" not in word] or [KNOWN[name] for name in options.default_configs]
    return [load_settings(path, overrides) for path in paths]


@contextmanager
def open_run(settings: Settings, steps: int) -> Iterator[Trainer]:
    """A run that is ready for its first step, with data for at least ``steps`` steps.

    Raises:
        SettingsError: too little data.
    """
    run = Trainer.build(settings)
    try:
        if run.stream.steps < steps:
            raise SettingsError(
                f"{settings.run.name}: the data suffices for {run.stream.steps} steps, the benchmark takes {steps}: "
                "give more data, or ask for fewer steps"
            )
        yield run
    finally:
        run.close()
