"""How long training waits for data: a rank's micro-batches read ahead as on a GPU, with a simulated GPU as consumer.

    python tools/bench.py reading
    MOETRAIN_DATA=/data python tools/bench.py reading configs/four_domains.yaml data.seq_len=4096 \\
        train.batch_rows=1024 train.micro_batch_rows=4 tokenizer.vocab_size=50304 --gpus 8

For each micro-batch the consumer takes as long as a GPU of the given throughput. It sleeps, as a training loop that
waits for its GPU; or it computes in Python all the time, which slows the reading thread down as far as a training loop
can. The copy to a GPU is not part of it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.configs import add_configs, load_configs
from benchmarks.timing import repeat
from moetrain.config import Settings, SettingsError
from moetrain.data.corpus import prepare_corpus
from moetrain.data.prefetch import BatchReader
from moetrain.data.stream import Stream, training_stream
from moetrain.distributed.mesh import ParallelLayout
from moetrain.training.step import step_rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_configs(parser, "olmoe_shape")
    parser.add_argument(
        "--tokens-per-second",
        type=float,
        default=23_600,
        metavar="RATE",
        help="throughput of the simulated GPU (default %(default)s: published for OLMoE-1B-7B on an H100)",
    )
    parser.add_argument("--gpus", type=int, default=1, help="ranks that share a step; one of them reads (default 1)")
    parser.add_argument("--seconds", type=float, default=30, help="for which each consumer reads (default 30)")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds that each kind of consumer waits, and their share of the time.

    Raises:
        SettingsError: the rows of a step do not split over the ranks, or the data is too short.
    """
    settings = load_configs(options)[0]
    if options.gpus < 1 or options.tokens_per_second <= 0:
        raise SettingsError("reading: --gpus and --tokens-per-second must be positive")
    layout = ParallelLayout(world_size=options.gpus)
    first, share, micro = step_rows(layout, settings)
    if settings.train.batch_rows % (options.gpus * micro):
        raise SettingsError(
            f"reading: train.batch_rows {settings.train.batch_rows} does not split over {options.gpus} GPUs into "
            f"micro-batches of {micro} rows: change --gpus or train.batch_rows"
        )
    tokens = micro * settings.data.seq_len
    busy = tokens / options.tokens_per_second
    steps = max(1, round(options.seconds / busy * micro / share))
    stream = training_stream(prepare_corpus(settings), settings)
    if stream.steps < steps:
        raise SettingsError(
            f"reading: the data suffices for {stream.steps} steps, {options.seconds:g} s take {steps}: "
            "lower --seconds, or give more data"
        )
    return {
        "tokens_a_micro_batch": tokens,
        "seconds_a_micro_batch": busy,
        "micro_batches": steps * share // micro,
        "steps": steps,
        "samples_a_row": len(stream.rows.samples) / len(stream.rows),
        "building": repeat(lambda: stream.batch(0, first, micro)).summary(),
        "consumers": {
            "sleeping": consume(stream, steps, settings, layout, partial(time.sleep, busy)),
            "computing": consume(stream, steps, settings, layout, partial(compute, busy)),
        },
    }


def compute(seconds: float) -> None:
    """Compute in Python: other threads run only when the interpreter switches to them."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def consume(
    stream: Stream, steps: int, settings: Settings, layout: ParallelLayout, work: Callable[[], object]
) -> dict[str, float]:
    """Read the micro-batches of some steps as `moetrain.training.step.forward_backward` does.

    Returns:
        ``first``, seconds spent waiting for the first micro-batch, which is not read ahead; ``waited``, for all others;
        ``counted``, seconds spent counting the steps' tokens; ``seconds`` in all. ``share`` is that of ``waited`` and
        ``counted`` in the time after the first; ``share_with_first`` is of all, as in a run of this length.
    """
    first, share, micro = step_rows(layout, settings)
    reader = BatchReader(stream, first, share, micro, layout.device, ahead=True)
    counted, waits, begin = 0.0, [], time.perf_counter()
    for step in range(steps):
        before = time.perf_counter()
        stream.predicted_tokens(step)
        stream.real_tokens(step)
        counted += time.perf_counter() - before
        for start in range(first, first + share, micro):
            before = reader.seconds_waited
            reader.batch(step, start, micro)
            waits.append(reader.seconds_waited - before)
            work()
    seconds = time.perf_counter() - begin
    reader.close()
    waited = sum(waits[1:])
    return {
        "first": waits[0],
        "waited": waited,
        "counted": counted,
        "seconds": seconds,
        "share": (waited + counted) / (seconds - waits[0]),
        "share_with_first": (waits[0] + waited + counted) / seconds,
    }


def tables(result: dict[str, Any]) -> Iterator[Table]:
    """Seconds waited and their share, by consumer."""
    built, busy = result["building"]["seconds"], result["seconds_a_micro_batch"]
    title = (
        f"{result['micro_batches']} micro-batches of {result['tokens_a_micro_batch']:,} tokens, each built in "
        f"{built * 1e3:.1f} ms and consumed in {busy * 1e3:.0f} ms"
    )
    table = Table("consumer", "first, s", "others, s", "counting, s", "of, s", "share", "with the first", title=title)
    for name, found in result["consumers"].items():
        seconds = [f"{found[part]:.4f}" for part in ("first", "waited", "counted")]
        shares = [f"{found[part]:.3%}" for part in ("share", "share_with_first")]
        table.add_row(name, *seconds, f"{found['seconds']:.1f}", *shares)
    yield table


def draw(result: dict[str, Any], path: Path) -> None:
    """Nothing to draw.

    Raises:
        SettingsError: always.
    """
    raise SettingsError(f"{path}: reading has no figure: leave --figure out")
