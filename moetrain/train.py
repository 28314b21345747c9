"""The command line of a training run: ``accelerate launch moetrain/train.py CONFIG``."""

from __future__ import annotations

import sys
from pathlib import Path

from moetrain.calibration import choose_readings, dry_run
from moetrain.checkpoint.manager import CheckpointError
from moetrain.checkpoint.run_folder import claim_run_folder
from moetrain.config import Settings, SettingsError, describe_settings, load_settings
from moetrain.data.errors import DataError
from moetrain.data.split import split_domains
from moetrain.distributed.launch import end_processes, leave, start_ranks
from moetrain.distributed.watchdog import watchdog
from moetrain.loggers.terminal import Terminal
from moetrain.loggers.trackers import check_trackers
from moetrain.trainer import Trainer
from moetrain.training.divergence import TrainingDivergedError

USAGE = """usage: accelerate launch moetrain/train.py [CONFIG.yaml] [section.key=value ...] [--check] [--help]

Pretrains a mixture-of-experts language model and monitors its routing by sample and domain.
Without CONFIG: configs/quickstart.yaml. Watch it with: tensorboard --logdir runs

  --check   stop before step 1 and print what will happen
  --help    this text, and every setting with its default and meaning

settings:
"""
_QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    0: finished; 1: training failed; 2: settings or data cannot be used; 75: saved and stopped by a signal; 130:
    interrupted outside of the steps.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    terminal = Terminal()
    if "--help" in arguments or "-h" in arguments:
        terminal.console.print(USAGE, markup=False, end="")
        for setting in describe_settings():
            shown = f"  {setting.key} ({setting.type_name}; default {setting.default})\n      {setting.description}"
            terminal.console.print(shown, markup=False)
        return 0
    try:
        settings, check = _parse(arguments)
        status = train(split_domains(settings), check)
        end_processes()
        return status
    except (SettingsError, DataError, CheckpointError) as error:
        terminal.error(str(error))
        return 2
    except (TrainingDivergedError, OSError) as error:
        terminal.error(str(error))
        return 1
    except KeyboardInterrupt:
        terminal.error("interrupted: checkpoints are kept; run the same command again to resume")
        return 130


def _parse(arguments: list[str]) -> tuple[Settings, bool]:
    flags = [argument for argument in arguments if argument.startswith("-")]
    unknown = [flag for flag in flags if flag != "--check"]
    if unknown:
        raise SettingsError(f"command line {unknown[0]!r}: unknown option: --check or --help")
    words = [argument for argument in arguments if not argument.startswith("-")]
    configs = [word for word in words if "=" not in word]
    if len(configs) > 1:
        raise SettingsError(f"command line {configs[1]!r}: a second configuration: give one, and section.key=value")
    config = configs[0] if configs else _QUICKSTART
    return load_settings(config, [word for word in words if "=" in word]), "--check" in flags


def train(settings: Settings, check: bool = False) -> int:
    """Train one run, from its data to its summary; with ``check``, stop before step 1 and print what will happen.

    Returns the exit status: 0, or 75 for a run that was saved because a signal told it to stop.

    Raises:
        SettingsError, DataError, CheckpointError: the run cannot start, in one line.
        TrainingDivergedError: the loss stays not finite.
        OSError: the last checkpoint cannot be written.
    """
    check_trackers(settings.run.trackers)
    layout = start_ranks(settings)
    with watchdog(layout, preparing=True):
        trainer = Trainer.build(settings, layout)
        trainer.describe()
        if check:
            dry_run(trainer)
            return 0
        folder = claim_run_folder(settings, layout)
    for note in folder.notes:
        trainer.terminal.note(note)
    try:
        with watchdog(layout):
            return trainer.fit(folder, choose_readings(trainer, folder))
    finally:
        trainer.close()
        if layout.is_main:
            folder.release()


if __name__ == "__main__":
    leave(main())
