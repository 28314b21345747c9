"""How long training waits for a checkpoint: written at once, and by a thread from a copy; the two in turns.

    python tools/bench.py saving
    python tools/bench.py saving train.sharding=fsdp train.expert_parallel=2 --ranks 4

The state is that of the configuration's model and its optimizer, with random values, split over the ranks as a run
splits it. ``pause`` is what the training loop of the slowest rank waits for, ``written`` the time until the checkpoint
is on disk. The first checkpoint of a thread, which also allocates the copy, is reported apart.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from benchmarks.configs import add_configs, load_configs
from moetrain.checkpoint.background import CheckpointWriter
from moetrain.checkpoint.manager import State, save_checkpoint
from moetrain.config import Settings, SettingsError
from moetrain.distributed.launch import end_processes, start_ranks
from moetrain.distributed.mesh import ParallelLayout
from moetrain.distributed.sharding import materialize, parallelize
from moetrain.dtensor import local_tensor
from moetrain.models.initialization import initial_weights
from moetrain.models.transformer import Transformer
from moetrain.optim.builder import initial_optimizer_state, make_optimizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_configs(parser, "peers")
    parser.add_argument("--turns", type=int, default=5, help="checkpoints of each kind (default 5)")
    parser.add_argument("--ranks", type=int, default=1, help="ranks on this machine (default 1)")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each checkpoint of each kind.

    Raises:
        SettingsError: the settings name a tokenizer's file, or do not fit so many ranks.
        OSError: a checkpoint could not be written.
    """
    settings = load_configs(options)[0]
    if settings.tokenizer.model is not None:
        raise SettingsError("saving: give tokenizer.vocab_size instead of tokenizer.model")
    if options.ranks < 1:
        raise SettingsError(f"saving: --ranks {options.ranks}: give at least 1")
    if torch.cuda.is_available() and options.ranks > torch.cuda.device_count():
        raise SettingsError(f"saving: --ranks {options.ranks}: give at most {torch.cuda.device_count()}, one per GPU")
    with tempfile.TemporaryDirectory() as place:
        if options.ranks == 1:
            return measure(settings, options.turns, Path(place))
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=options.ranks,
            run_id="saving",
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
        )
        found = elastic_launch(config, measure_on_rank)(settings, options.turns, Path(place))[0]
    if isinstance(found, Exception):
        raise found
    return found


def measure_on_rank(settings: Settings, turns: int, place: Path) -> dict[str, Any] | Exception:
    """`measure` on one of several ranks; an error that all ranks raise is returned."""
    try:
        found = measure(settings, turns, place)
    except (SettingsError, OSError) as error:
        return error
    end_processes()
    return found


def measure(settings: Settings, turns: int, place: Path) -> dict[str, Any]:
    """Seconds of each checkpoint of each kind, of the slowest rank. All ranks must call this.

    Raises:
        SettingsError: the settings do not fit the number of ranks.
        OSError: a checkpoint could not be written.
    """
    layout = start_ranks(settings)
    states = random_states(settings, layout)
    sides = {background: CheckpointWriter(layout, background) for background in (False, True)}
    found: dict[str, dict[str, list[float]]] = {}
    first = None
    for turn in range(turns + 1):
        for background, writer in sides.items():
            pause, written = _save(writer, states, place, layout)
            if turn:  # the first is a warm-up
                side = found.setdefault("thread" if background else "at once", {"pause": [], "written": []})
                side["pause"].append(pause)
                side["written"].append(written)
            elif background:
                first = pause
    for writer in sides.values():
        writer.close()
    ratios = [a / b for a, b in zip(found["thread"]["pause"], found["at once"]["pause"], strict=True)]
    tensors = [tensor for state in states.values() for tensor in state.values()]
    return {
        "ranks": layout.world_size,
        "sharding": settings.train.sharding,
        "expert_parallel": settings.train.expert_parallel,
        "threads_of_a_rank": torch.get_num_threads(),
        "bytes": sum(tensor.numel() * tensor.itemsize for tensor in tensors),
        "bytes_of_rank_0": sum(local_tensor(tensor).nbytes for tensor in tensors),
        "first_pause": first,
        "sides": found,
        "pause_ratio": {"median": statistics.median(ratios), "each": ratios},
    }


def random_states(settings: Settings, layout: ParallelLayout) -> dict[str, State]:
    """A model's weights and its optimizer's state, as a checkpoint holds them: this rank's part, of random values."""
    torch.manual_seed(settings.run.seed)
    vocabulary = settings.tokenizer.vocab_size
    with torch.device("meta"):
        model = Transformer(settings.model, vocabulary, torch.float32)
    parallelize(model, layout)
    materialize(model, layout.device, initial_weights(settings.model, vocabulary))
    states: dict[str, State] = {
        "model": model.state_dict(),
        "optimizer": initial_optimizer_state(model, make_optimizer(model, settings.optim)),
    }
    with torch.no_grad():
        for tensor in states["optimizer"].values():
            local_tensor(tensor).normal_()
    return states


def _save(
    writer: CheckpointWriter, states: Mapping[str, State], place: Path, layout: ParallelLayout
) -> tuple[float, float]:
    """Seconds that the slowest rank's training waits, and seconds until all of the checkpoint is on disk."""

    def write(tensors: Mapping[str, State], layout: ParallelLayout) -> list[str]:
        save_checkpoint(place, 1, tensors, {}, {}, layout)
        return []

    layout.barrier()
    begin = time.perf_counter()
    writer.write(1, states, write if layout.is_main else None)
    pause = time.perf_counter() - begin
    outcome = writer.finish()
    written = time.perf_counter() - begin
    assert outcome is not None
    pauses, times, outcomes = zip(*layout.all_gather_objects((pause, written, outcome)), strict=True)
    if not outcomes[0].saved:
        raise OSError(outcomes[0].problem)
    if layout.is_main:
        shutil.rmtree(place / "checkpoints")
    return max(pauses), max(times)


def tables(result: dict[str, Any]) -> Iterator[Table]:
    """Medians of both kinds."""
    ratio = result["pause_ratio"]["median"]
    title = (
        f"a checkpoint of {result['bytes'] / 1e6:.0f} MB, ranks: {result['ranks']}, sharding: {result['sharding']}, "
        f"expert_parallel: {result['expert_parallel']}: the thread's pause is {ratio:.2f} of the other"
    )
    table = Table("written", "pause, s (median)", "smallest to largest", "until written, s (median)", title=title)
    for name, seconds in result["sides"].items():
        pause = seconds["pause"]
        spread = f"{min(pause):.2f} to {max(pause):.2f}"
        table.add_row(name, f"{statistics.median(pause):.2f}", spread, f"{statistics.median(seconds['written']):.2f}")
    yield table


def draw(result: dict[str, Any], path: Path) -> None:
    """Nothing to draw.

    Raises:
        SettingsError: always.
    """
    raise SettingsError(f"{path}: saving has no figure: leave --figure out")
