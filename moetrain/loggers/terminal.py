"""Terminal output of a run: a live display on an interactive terminal, plain lines otherwise."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

_SECONDS_BETWEEN_LINES = 10.0
_LOG_WIDTH = 1000  # characters: the widest table of a log


class Terminal:
    """The terminal of the main rank; with ``speaks=False``, as on other ranks, nothing is printed but errors."""

    def __init__(self, speaks: bool = True) -> None:
        self.console = Console(quiet=not speaks, highlight=False, soft_wrap=True)
        self.live = self.console.is_terminal and speaks
        self._last_line = 0.0
        self._began: dict[str, float] = {}  # when each of the current preparations began
        self._preparing: str | None = None
        self._progress: Progress | None = None
        self._display: Live | None = None
        self._rows: dict[str, dict[str, float]] = {}

    def note(self, text: str) -> None:
        """Print one line."""
        self._end_preparing()
        self.console.print(escape(text))

    def notice(self, text: str) -> None:
        """Print one line from any thread, beside what is shown."""
        self.console.print(escape(text))

    @property
    def doing(self) -> str:
        """The preparation that is shown; empty where none is."""
        return self._preparing or ""

    def error(self, text: str) -> None:
        """Print one line about an error to stderr."""
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"[bold red]error:[/] {escape(text)}")

    def preparing(self, what: str, done: int, total: int | None) -> None:
        """Show the progress of a preparation; matches `moetrain.data.corpus.Progress`."""
        if self.live:
            if self._preparing is None:
                columns = (
                    TextColumn("{task.description}"),
                    BarColumn(),
                    TextColumn("{task.completed:,.0f}"),
                    TimeElapsedColumn(),
                    TextColumn("left"),
                    TimeRemainingColumn(),
                )
                self._progress = Progress(*columns, console=self.console, transient=True)
                self._progress.start()
            assert self._progress is not None
            if what != self._preparing:
                for task in self._progress.task_ids:
                    self._progress.remove_task(task)
                self._progress.add_task(what, total=total)
            self._progress.update(self._progress.task_ids[-1], completed=done, total=total)
        elif what not in self._began:  # one may begin inside of another, which then goes on
            self.console.print(what)
            self._began[what] = self._last_line = time.monotonic()
        elif done and total and time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            left = (self._last_line - self._began[what]) * (total - done) / done
            self.console.print(f"{what}: {done / total:.0%}, about {left:,.0f} s left")
        self._preparing = what

    def _end_preparing(self) -> None:
        if self._progress is not None and self._preparing is not None:
            self._progress.stop()
            self._progress = None
        self._preparing = None
        self._began.clear()

    def set_steps(self, steps: int) -> None:
        """The run has another number of steps than it began with."""
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], total=steps)

    def start_training(self, step: int, steps: int) -> None:
        """Start to show the progress of training."""
        self._end_preparing()
        self._last_line = time.monotonic()
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self._progress.add_task("", total=steps, completed=step, shown="")
        if self.live:
            self._display = Live(self._render(), console=self.console, refresh_per_second=4)
            self._display.start()

    def values(self, domain: str, values: Mapping[str, float]) -> None:
        """Set numbers of a domain for the next point; its other numbers stay."""
        self._rows.setdefault(domain, {}).update(values)

    def training(
        self, step: int, loss: float, tokens_per_second: float, domains: Mapping[str, Mapping[str, float]]
    ) -> None:
        """Show a point of the training curves, with values per domain."""
        assert self._progress is not None
        for name, values in domains.items():
            self.values(name, values)
        task = self._progress.tasks[0]
        shown = f"loss {loss:.3f}  {tokens_per_second:,.0f} tokens/s"
        self._progress.update(task.id, completed=step, shown=shown)
        if self._display is not None:
            self._display.update(self._render())
        elif time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES or step == task.total:
            self._last_line = time.monotonic()
            left = "" if task.time_remaining is None else f"  {task.time_remaining:.0f} s left"
            by_domain = "  ".join(f"{name} {row['loss']:.3f}" for name, row in self._rows.items() if "loss" in row)
            by_domain = f"  ({by_domain})" if by_domain else ""
            self.console.print(f"step {step}/{task.total:.0f}  {shown}{by_domain}{left}")

    def _render(self) -> Group:
        assert self._progress is not None
        return Group(self._progress, number_table(self._rows)) if self._rows else Group(self._progress)

    def end_training(self) -> None:
        """End the display of training."""
        if self._display is not None:
            self._display.update(self._render())
            self._display.stop()
        self._display = self._progress = None

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table; the first column is left-aligned text. Nothing is cut off: a log is as wide as it needs."""
        self._end_preparing()
        table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
        for number, column in enumerate(columns):
            table.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
        for row in rows:
            table.add_row(*map(escape, row))
        if not self.live:
            wide = self.console.options.update(width=_LOG_WIDTH)
            needed = Measurement.get(self.console, wide, table).maximum
            self.console.width = max(self.console.width, needed)
        self.console.print(table, soft_wrap=False)


def number_table(rows: Mapping[str, Mapping[str, float]]) -> Table:
    """A table of numbers by row and column; a missing one is a dash."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    table = Table(box=None, pad_edge=False)
    table.add_column("domain")
    for column in columns:
        table.add_column(column, justify="right")
    for name, row in rows.items():
        table.add_row(name, *(number(row[column]) if column in row else "-" for column in columns))
    return table


def number(value: float) -> str:
    """A number with three decimals, or, below a tenth, with three digits that count: a spread of .00042 is not 0."""
    return f"{value:.3f}" if abs(value) >= 0.1 or value == 0 else f"{value:.3g}"
