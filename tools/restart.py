"""How long a run that was told to stop takes, when it is started again, until it has trained a step.

    python tools/restart.py                        # the quickstart, three times
    python tools/restart.py mine.yaml --times 5 --json restart.json

From the start of the process to the end of its first step: imports, data, model, checkpoint (each file checked against
its hash), panel and probes. The data is prepared beforehand, as it is when a run is restarted.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

import numpy as np

from moetrain.distributed.signals import STOPPED_BY_SIGNAL

_TRAIN = Path(__file__).parent.parent / "moetrain" / "train.py"
_QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
_LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1"]
_POINTS = "*/events.out.tfevents.*"
_POLL = 0.01  # seconds


class RunFailedError(Exception):
    """The run ended in another way than it was told to."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="CONFIG or section.key=value", help="default: the quickstart")
    parser.add_argument("--times", type=int, default=3, help="restarts (default 3)")
    parser.add_argument("--folder", type=Path, help="run to go on with, or to begin (default: a new one, removed)")
    parser.add_argument("--json", type=Path, help="file for the result")
    options = parser.parse_args(arguments)
    words = options.words if any("=" not in word for word in options.words) else [str(_QUICKSTART), *options.words]
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        command = [str(_TRAIN), *words, f"run.output_dir={folder.resolve()}", "train.log_every=1"]
        try:
            if not any(folder.glob("*/checkpoints/step_*")):
                print(f"begun: {_until_first_step(command, folder):.1f} s with preparing its data")
            seconds = [_until_first_step(command, folder) for _ in range(options.times)]
        except RunFailedError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    told = ", ".join(f"{value:.1f}" for value in seconds)
    print(f"restarted {len(seconds)} times, to the end of its first step: {told} s; median {np.median(seconds):.1f} s")
    if options.json:
        options.json.write_text(json.dumps({"seconds": seconds, "date": time.strftime("%Y-%m-%d")}, indent=1) + "\n")
    return 0


def _until_first_step(command: list[str], folder: Path) -> float:
    """Seconds until a run has trained a step; then it is stopped, and has to end as it should."""
    folder.mkdir(parents=True, exist_ok=True)
    before = set(folder.glob(_POINTS))
    with tempfile.TemporaryFile("w+") as log:
        begin = time.monotonic()
        with subprocess.Popen([*_LAUNCH, *command], stdout=log, stderr=log, start_new_session=True) as process:
            while process.poll() is None and not _has_trained(set(folder.glob(_POINTS)) - before):
                time.sleep(_POLL)
            seconds = time.monotonic() - begin
            for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
                os.kill(int(child), signal.SIGTERM)  # a launcher passes none on
            process.wait(timeout=120)
        said = _read(log)
    if f"exit status {STOPPED_BY_SIGNAL}" not in said:
        raise RunFailedError(f"the run did not stop as it was told to:\n{said[-3000:]}")
    return seconds


def _has_trained(points: set[Path]) -> bool:
    """Whether a point of the training curves stands in a file: with ``train.log_every=1`` each step draws them."""
    return any(b"system/tokens_per_second" in path.read_bytes() for path in points)


def _read(log: IO[str]) -> str:
    log.seek(0)
    return log.read()


if __name__ == "__main__":
    sys.exit(main())
