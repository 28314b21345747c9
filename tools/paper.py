"""The paper's figures and tables, each by one command, on a run, on a replay, or on a run's checkpoints.

    python tools/paper.py list                                   # what each holds, needs, and does differently
    python tools/paper.py figure4 runs/grokking_demo
    python tools/paper.py figure9 runs/grokking_demo --domain add --tau 0.5 0.6 0.7 0.8
    python tools/paper.py table1 runs/mine --instructions math=metamath.jsonl.gz alpaca.jsonl.gz
    python tools/paper.py all runs/grokking_demo                 # all that need no fine-tuning

Each writes NAME.png, NAME.json and NAME.csv to RUN/paper or to --output. Readings of OLMoE's checkpoints come from
tools/replay.py, whose output folder is given as RUN.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import theory_toy
from common.command_line import make_parser, reports_errors

from moetrain.checkpoint.manager import CheckpointError
from moetrain.config import SettingsError
from moetrain.data.errors import DataError
from moetrain.data.instructions import Example, read_instructions
from moetrain.data.sources.files import named_files
from moetrain.loggers.terminal import Terminal
from moetrain.paper import correlations, dynamics, learning, norms, pathways, robustness, tables
from moetrain.paper.catalogue import ENTRIES, UNPUBLISHED, find
from moetrain.paper.instructed import EVERY_DOMAIN, Protocol, examples_from
from moetrain.paper.results import PaperError, Result
from moetrain.probes.fine_tuning import FineTuningError, LoraSettings
from moetrain.probes.tasks import read_entries, tasks_of
from moetrain.report.open_run import MissingPackageError, OpenedRun, RunError, open_run
from moetrain.routing.store import StoreError
from moetrain.version import __version__

TUNED = ("table1", "table4")
_NO_RUN = ("figure8",)
_DISTANCE, _CONSISTENCY = dynamics.distance(), dynamics.INCONSISTENCY

Compute = Callable[[OpenedRun, argparse.Namespace, Terminal], Result]

# fmt: off
COMPUTE: dict[str, Compute] = {
    "figure1": lambda run, given, _: learning.memorized_and_accuracy(run, given.domain),
    "figure2": lambda run, given, _: learning.paired_groups(run, one(given.domain)),
    "figure3": lambda run, given, _: pathways.two_pathways(run, one(given.domain)),
    "figure4": lambda run, given, _: dynamics.dynamics(
        run, "figure4", "Figure 4: pathway distance of memorization groups", _DISTANCE, given.domain),
    "figure5": lambda run, given, _: robustness.by_layer(run, one(given.domain)),
    "figure6": lambda run, given, _: dynamics.dynamics(
        run, "figure6", "Figure 6: pathway consistency of memorization groups", _CONSISTENCY, given.domain),
    "figure7": lambda run, given, _: correlations.scatter(run, one(given.domain)),
    "figure9": lambda run, given, _: robustness.by_tau(run, one(given.domain), given.tau or robustness.TAUS),
    "figure10": lambda run, given, _: robustness.by_eps(run, one(given.domain), given.eps),
    "figure11": lambda run, given, _: robustness.by_delta(
        run, one(given.domain), given.delta or robustness.DELTAS, given.eps[0] if given.eps else None),
    "figure12": lambda run, given, _: robustness.across_domains(run, given.domain),
    "figure13": lambda run, given, _: pathways.entropy_and_distance(run, given.domain, given.pairs),
    "figure14": lambda run, given, _: dynamics.dynamics(
        run, "figure14", f"Figure 14: pathway distance, {run.name}", _DISTANCE, given.domain),
    "figure15": lambda run, given, _: dynamics.dynamics(
        run, "figure15", f"Figure 15: pathway consistency, {run.name}", _CONSISTENCY, given.domain),
    "table1": lambda run, given, terminal: tables.after_tuning(*tuned(run, given, terminal), terminal),
    "table2": lambda run, given, _: tables.data_sets(run),
    "table3": lambda run, given, _: norms.parameter_norms(run.path),
    "table4": lambda run, given, terminal: tables.by_rank(
        *tuned(run, given, terminal), terminal, given.rank or (32, 64), one(given.domain)),
    "table5": lambda run, given, _: tables.zero_shot(run, given.task),
}
# fmt: on


def one(domains: list[str] | None) -> str | None:
    """The only domain of a figure of one; None lets it choose."""
    if domains and len(domains) > 1:
        raise SettingsError(f"--domain {' '.join(domains)}: this figure is of one domain: give one")
    return domains[0] if domains else None


def tuned(run: OpenedRun, given: argparse.Namespace, terminal: Terminal) -> tuple[OpenedRun, Path, Protocol, Path]:
    """The readings, the run's folder, what to fine-tune on and to ask, and the folder of the scores."""
    own = [] if given.task and given.instructions else tables.own_tasks(run.path, terminal)
    tasks = [task for task in own if not task.trained and task.kind != "likelihood"]
    if given.task:
        asked = tasks_of(read_entries(given.task, ".", "--task"), given.limit, run.setting("run.seed"))
        tasks = [task for task in asked if task.kind != "likelihood"]
    instructions = read_instruction_files(given.instructions) if given.instructions else examples_from(own)
    rank = (given.rank or [32])[0]
    lora = LoraSettings(
        rank=rank, alpha=2.0 * rank, learning_rate=given.learning_rate, epochs=given.epochs, batch_size=given.batch_size
    )
    readings = open_run(given.readings, terminal.preparing) if given.readings else run
    return readings, run.path, Protocol(tasks, instructions, lora, given.removed), output_folder(run.path, given)


def read_instruction_files(words: list[str]) -> dict[str, list[Example]]:
    """Examples by domain: DOMAIN=FILE for one, FILE for all without their own."""
    paths: dict[str, list[Path]] = {}
    for word in words:
        domain, _, pattern = word.rpartition("=")
        paths.setdefault(domain or EVERY_DOMAIN, []).extend(named_files(pattern, "--instructions"))
    return {domain: read_instructions(files) for domain, files in paths.items()}


def output_folder(run: Path, given: argparse.Namespace) -> Path:
    folder: Path | None = given.output
    return folder or run / "paper"


def show_list(terminal: Terminal) -> None:
    """Print the catalogue."""
    for entry in ENTRIES:
        print(f"{entry.name}: {entry.content}")
        print(f"    command: {entry.command}")
        print(f"    needs: {entry.needs}")
        print(f"    differs: {entry.differs}")
    for sentence in UNPUBLISHED:
        terminal.note(f"not published: {sentence}")


def compute(name: str, run: OpenedRun, given: argparse.Namespace, terminal: Terminal) -> None:
    """Compute one figure or table, write it and print its notes."""
    result = COMPUTE[name](run, given, terminal)
    paths = result.write(output_folder(run.path, given), {"run": run.name, "version": __version__})
    terminal.note(f"{name}: {paths[-1]}, {paths[0].name}, {paths[1].name}")
    for note in result.notes:
        terminal.note(f"  {note}")


@reports_errors(
    SettingsError, DataError, CheckpointError, FineTuningError, PaperError, RunError, StoreError, MissingPackageError,
    OSError,
)  # fmt: skip
def main(arguments: list[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 0 done, 2 what is missing or unusable, in one line."""
    parser = _parser()
    given = parser.parse_args(arguments)
    terminal = Terminal()
    if given.figure == "list":
        show_list(terminal)
        return 0
    if given.figure in _NO_RUN:
        return theory_toy.main(["--output", str((given.output or Path(".")) / "figure8")])
    if given.figure != "all" and find(given.figure) is None:
        raise SettingsError(f"{given.figure}: no such figure or table: python tools/paper.py list")
    if given.run is None:
        raise SettingsError(f"{given.figure}: give RUN, the folder of a run or of a replay")
    run = open_run(given.run, terminal.preparing)
    if given.figure != "all":
        compute(given.figure, run, given, terminal)
        return 0
    for name in [name for name in COMPUTE if name not in TUNED]:
        try:
            compute(name, run, given, terminal)
        except PaperError as error:
            terminal.note(f"{name}: left out: {error}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("figure", metavar="FIGURE", help="figure1 ... figure15, table1 ... table5, list, or all")
    add("run", nargs="?", type=Path, metavar="RUN", help="folder of a run or of a replay")
    add("--output", type=Path, metavar="FOLDER", help="where the files go (default RUN/paper)")
    add("--domain", nargs="+", metavar="D", help="domains to show (default: all, or the first that has what is shown)")
    add("--tau", nargs="+", type=_share, metavar="T", help="thresholds of figure9 (default 0.5 0.6 0.7 0.8)")
    add(
        "--eps",
        nargs="+",
        type=_positive,
        metavar="E",
        help="of figure10, and one of figure11 (default: around the rule's)",
    )
    add("--delta", nargs="+", type=_positive, metavar="X", help="of figure11 (default 0.03 0.04 0.05)")
    add("--pairs", type=_count, default=pathways.PAIRS, metavar="N", help="of figure13 (default 141530)")
    add(
        "--task",
        nargs="+",
        metavar="FILE",
        help="table1, table4: files of items (default: the run's own); table5: names",
    )
    tuning = parser.add_argument_group("table1 and table4")
    add = tuning.add_argument
    add("--instructions", nargs="+", metavar="[DOMAIN=]FILE", help="to fine-tune on (default: the run's trained facts)")
    add("--readings", type=Path, metavar="REPLAY", help="readings of the panel at the checkpoints (default: the run's)")
    add("--limit", type=_count, metavar="N", help="items of each task given with --task (all)")
    add("--rank", nargs="+", type=_count, metavar="N", help="of the adapters (default 32; table4: 32 64)")
    add(
        "--removed", type=_share, default=0.1, metavar="S", help="share of each task's items removed by Min-K%%++ (0.1)"
    )
    add("--learning-rate", type=_positive, default=5e-5, metavar="R", help="(default 5e-5)")
    add("--epochs", type=_count, default=3, metavar="N", help="(default 3)")
    add("--batch-size", type=_count, default=4, metavar="N", help="examples per step (default 4)")
    return parser


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("1 or more")
    return number


def _positive(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError("a number above 0")
    return number


def _share(text: str) -> float:
    number = float(text)
    if not 0 <= number < 1:
        raise argparse.ArgumentTypeError("from 0 to below 1")
    return number


if __name__ == "__main__":
    sys.exit(main())
