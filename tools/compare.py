"""Compare runs at one number of tokens: what differs in their settings, then losses, routing, phases and probes.

    python tools/compare.py runs/base runs/bias_balancing                    # tables in the terminal
    python tools/compare.py runs/a runs/b runs/c --html compared.html        # a page with overlaid curves
    python tools/compare.py runs/a runs/b --tensorboard compared             # then: tensorboard --logdir compared
    python tools/compare.py runs/a runs/b --exact                            # are two runs equal, bit for bit?

Finished or still training. ≠ marks intervals that do not overlap. It needs pip install 'moetrain[report]'.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from moetrain.atomic_io import write_file
from moetrain.loggers.terminal import Terminal
from moetrain.report.charts import short
from moetrain.report.compare import Comparison, Row, compare, comparison_page, write_overlay
from moetrain.report.exact import compare_exactly
from moetrain.report.open_run import MissingPackageError, RunError, open_run
from moetrain.report.page import in_yaml, within
from moetrain.routing.store import StoreError


def main(arguments: list[str] | None = None) -> int:
    """Compare and print; returns the exit status.

    0: done, or with ``--exact`` equal. 1: with ``--exact`` different. 2: runs that cannot be compared, or a file that
    cannot be written.
    """
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs or replays, two or more")
    parser.add_argument(
        "--at", type=float, metavar="TOKENS", help="when to compare (default: the most that all reached)"
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write a page with tables and curves")
    parser.add_argument("--tensorboard", type=Path, metavar="FOLDER", help="also write the runs' curves by tokens")
    parser.add_argument("--exact", action="store_true", help="compare two runs bit for bit; exit status 1: different")
    options = parser.parse_args(arguments)
    terminal = Terminal()
    try:
        if options.exact:
            return show_exact(options.runs, terminal)
        comparison = compare([open_run(run, terminal.preparing) for run in options.runs], options.at)
        show(comparison, terminal)
        if options.html:
            write_file(options.html, comparison_page(comparison))
            terminal.note(f"page: {options.html}")
        if options.tensorboard:
            write_overlay(comparison, options.tensorboard)
            terminal.note(f"tensorboard --logdir {options.tensorboard}")
    except (RunError, StoreError, MissingPackageError, OSError) as error:
        terminal.error(str(error))
        return 2
    return 0


def show_exact(runs: list[Path], terminal: Terminal, most: int = 5) -> int:
    """Print what was compared bit for bit, and the first differences of each kind; returns 0 equal, 1 different.

    Raises:
        RunError: other than two runs, or one that cannot be read.
    """
    if len(runs) != 2:
        raise RunError(f"--exact: {len(runs)} runs: give two")
    sections = compare_exactly(*runs)
    for section in sections:
        count = len(section.differences)
        terminal.note(f"{section.name}: {section.compared}: {f'{count:,} different' if count else 'equal'}")
        for difference in section.differences[:most]:
            terminal.note(f"  {difference}")
        if count > most:
            terminal.note(f"  and {count - most:,} more")
    different = any(section.differences for section in sections)
    terminal.note("different" if different else "equal but for speed, times, memory and version")
    return int(different)


def show(comparison: Comparison, terminal: Terminal) -> None:
    """Print the settings that differ, and the values per domain."""
    settings = [[each.name, *map(in_yaml, each.values)] for each in comparison.settings]
    if settings:
        terminal.table("settings that differ", ["setting", *comparison.labels], settings)
    else:
        terminal.note("the same settings")
    for domain in dict.fromkeys(row.domain for row in comparison.rows):
        rows = [cells(row, comparison) for row in comparison.rows if row.domain == domain]
        title = f"{domain or 'the whole model'}, at {short(comparison.at)} {comparison.unit}"
        terminal.table(title, ["", *comparison.labels, ""], rows)


def cells(row: Row, comparison: Comparison) -> list[str]:
    """A row of the table in the terminal."""

    def shown() -> Iterator[str]:
        for cell in row.cells:
            late = f" (at {short(cell.at)})" if cell.at < 0.9 * comparison.at else ""
            yield (cell.text or " ".join(filter(None, within(cell.number)))) + late

    return [row.title, *shown(), "≠" if row.different else ""]


if __name__ == "__main__":
    sys.exit(main())
