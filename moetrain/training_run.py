"""A training run from its settings: ranks, data, model, then all steps. Imports torch and all that trains."""

from __future__ import annotations

from moetrain.calibration import choose_readings, dry_run
from moetrain.checkpoint.extension import check_extension, extended_settings
from moetrain.checkpoint.run_folder import claim_run_folder, may_differ
from moetrain.config import Settings, unused_settings
from moetrain.data.split import split_domains
from moetrain.distributed.launch import start_ranks
from moetrain.distributed.mesh import ParallelLayout
from moetrain.distributed.signals import SignalNotice
from moetrain.distributed.watchdog import watchdog
from moetrain.loggers.terminal import Terminal
from moetrain.loggers.trackers import check_trackers
from moetrain.trainer import Trainer
from moetrain.training_loop import fit


def run(settings: Settings, check: bool = False) -> int:
    """What `moetrain.train.train` does, see there."""
    check_trackers(settings.run.trackers)
    unused = list(unused_settings(settings))  # as given: a run that goes on from another gets more of them
    settings = split_domains(settings)
    settings = extended_settings(settings, may_differ(settings))
    layout = start_ranks(settings)
    terminal = Terminal(speaks=layout.is_main)
    for line in unused:
        terminal.note(line)
    with SignalNotice(terminal.notice, lambda: terminal.doing):
        return _run(settings, layout, terminal, check)


def _run(settings: Settings, layout: ParallelLayout, terminal: Terminal, check: bool) -> int:
    with watchdog(layout, preparing=True):
        trainer = Trainer.build(settings, layout, terminal)
        drop = check_extension(settings, trainer.corpus, trainer.steps)
        trainer.describe()
        if drop:
            terminal.note(drop)
        if check:
            dry_run(trainer)
            return 0
        folder = claim_run_folder(settings, layout)
    for note in folder.notes:
        terminal.note(note)
    try:
        with watchdog(layout):
            return fit(trainer, folder, choose_readings(trainer, folder))
    finally:
        trainer.close()
        if layout.is_main:
            folder.release()
