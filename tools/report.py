"""Write the report of a run, finished or still training: a single self-contained HTML page.

    python tools/report.py runs/quickstart                     # writes runs/quickstart/report.html
    python tools/report.py runs/quickstart --output page.html

A run writes its own at its end (run.report). It needs pip install 'moetrain[report]'.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from moetrain.loggers.terminal import Terminal
from moetrain.report.open_run import MissingPackageError, RunError
from moetrain.report.report import write_report
from moetrain.routing.store import StoreError


def main(arguments: list[str] | None = None) -> int:
    """Write and say where; returns the exit status: 0 done, 2 a run that cannot be read or a page not written."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a run or of a replay")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="the page (default: report.html in the run's folder)"
    )
    options = parser.parse_args(arguments)
    terminal = Terminal()
    try:
        written = write_report(options.run, options.output, terminal.preparing)
    except (RunError, StoreError, MissingPackageError, OSError) as error:
        terminal.error(str(error))
        return 2
    terminal.note(f"{written}: {written.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
