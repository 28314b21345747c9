"""Measure how long a stopped run takes from its restart to the end of its first step.

    python tools/restart.py                        # the quickstart, three times
    python tools/restart.py mine.yaml --times 5 --json restart.json

This includes process start, imports, data, model, checkpoint (with hashes verified), panel and probes. The data is
prepared in advance, as it is for a restarted run.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from common import QUICKSTART, TRAIN
from common.command_line import make_parser, reports_errors, write_json

from moetrain.distributed.signals import STOPPED_BY_SIGNAL

_LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1"]
_EVENT_FILES = "*/events.out.tfevents.*"
_POLL = 0.01  # seconds


class RunFailedError(Exception):
    """The run did not end with the exit status of a stopped run."""


@reports_errors(RunFailedError)
def main(arguments: list[str] | None = None) -> int:
    """Measure and print; returns the exit status: 0 done, 2 the run failed."""
    parser = make_parser(__doc__)
    parser.add_argument("words", nargs="*", metavar="CONFIG or section.key=value", help="default: the quickstart")
    parser.add_argument("--times", type=int, default=3, help="restarts (default 3)")
    parser.add_argument("--folder", type=Path, help="output folder of the run (default: a temporary one)")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    options = parser.parse_args(arguments)
    words = options.words if any("=" not in word for word in options.words) else [str(QUICKSTART), *options.words]
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        command = [*_LAUNCH, str(TRAIN), *words, f"run.output_dir={folder.resolve()}", "train.log_every=1"]
        if not any(folder.glob("*/checkpoints/step_*")):
            print(f"first start: {_until_first_step(command, folder):.1f} s with preparing the data")
        seconds = [_until_first_step(command, folder) for _ in range(options.times)]
    listed = ", ".join(f"{value:.1f}" for value in seconds)
    print(f"{len(seconds)} restarts, to the end of the first step: {listed} s; median {np.median(seconds):.1f} s")
    write_json(options.json, {"seconds": seconds, "date": time.strftime("%Y-%m-%d")})
    return 0


def _until_first_step(command: list[str], folder: Path) -> float:
    """Start a run, return the seconds until its first step is trained, and stop it.

    Raises:
        RunFailedError: it did not stop as a run does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    before = set(folder.glob(_EVENT_FILES))
    with tempfile.TemporaryFile("w+") as log:
        start = time.monotonic()
        with subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True) as process:
            while process.poll() is None and not _has_trained(set(folder.glob(_EVENT_FILES)) - before):
                time.sleep(_POLL)
            seconds = time.monotonic() - start
            if process.poll() is None:
                for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
                    os.kill(int(child), signal.SIGTERM)  # the launcher does not forward signals
            process.wait(timeout=120)
        log.seek(0)
        output = log.read()
    if f"exit status {STOPPED_BY_SIGNAL}" not in output:
        raise RunFailedError(f"the run failed, or did not stop on SIGTERM:\n{output[-3000:]}")
    return seconds


def _has_trained(event_files: set[Path]) -> bool:
    """Whether a step has been logged: with ``train.log_every=1`` every step is."""
    return any(b"system/tokens_per_second" in path.read_bytes() for path in event_files)


if __name__ == "__main__":
    sys.exit(main())
