"""The configurations that benchmarks run: files and overrides as for training, with a default per benchmark."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch.distributed as dist
from common import CODE_AND_MATH, QUICKSTART, ROOT

from moetrain.config import Settings, SettingsError, load_settings
from moetrain.distributed.launch import start_ranks
from moetrain.distributed.mesh import ParallelLayout, make_mesh
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
def mesh_of_one(settings: Settings) -> Iterator[ParallelLayout]:
    """One rank that shards the model over itself, so that all of FSDP2 runs on a single device.

    The process must not be in a process group; it is in one within the block.
    """
    layout = start_ranks(settings)
    backend = "nccl" if layout.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield replace(layout, mesh=make_mesh("fsdp", 1, 1, layout.device))
    finally:
        dist.destroy_process_group()


@contextmanager
def open_run(settings: Settings, steps: int, layout: ParallelLayout | None = None) -> Iterator[Trainer]:
    """A run that is ready for its first step, with data for at least ``steps`` steps.

    Args:
        layout: of ranks that were started; None: they are started as for training.

    Raises:
        SettingsError: too little data.
    """
    run = Trainer.build(settings, layout)
    try:
        if run.stream.steps < steps:
            raise SettingsError(
                f"{settings.run.name}: the data suffices for {run.stream.steps} steps, the benchmark takes {steps}: "
                "give more data, or ask for fewer steps"
            )
        yield run
    finally:
        run.close()
