"""Peak memory per rank of a sharded run by phase: building the model, training steps, held-out loss, panel. Linux only.

    torchrun --nproc_per_node 4 tools/sharded_memory.py CONFIG.yaml train.sharding=fsdp

tools/results/sharding.md has the measured numbers.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from common.command_line import make_parser, reports_errors

from moetrain.config import SettingsError, load_settings
from moetrain.data.errors import DataError
from moetrain.distributed.exit import leave
from moetrain.distributed.launch import end_processes, start_ranks
from moetrain.distributed.mesh import ParallelLayout
from moetrain.trainer import Trainer


class Peak:
    """The peak memory since the last call in MiB, of the process on CPU, of the device on CUDA."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.take()

    def take(self) -> float:
        """Return the peak, and reset it to the current memory."""
        if self._device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self._device) / 2**20
            torch.cuda.reset_peak_memory_stats(self._device)
            return peak
        found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
        assert found is not None
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        return int(found[1]) / 2**10


def measure(config: str, overrides: list[str]) -> tuple[ParallelLayout, dict[str, float]]:
    """Peak MiB of this rank by phase."""
    settings = load_settings(config, overrides)
    layout = start_ranks(settings)
    peak = Peak(layout.device)
    trainer = Trainer.build(settings, layout)
    found = {"build": peak.take()}
    trainer.monitor.validate(trainer.model, 0)
    found["held-out loss before step 1"] = peak.take()
    for step in (1, 2):
        trainer.train_step(step)
    found["two steps"] = peak.take()
    trainer.monitor.validate(trainer.model, 2)
    found["held-out loss"] = peak.take()
    trainer.monitor.read_panel(trainer.model, 2, trainer.context)
    found["panel"] = peak.take()
    trainer.close()
    return layout, found


@reports_errors(SettingsError, DataError)
def main(arguments: list[str] | None = None) -> int:
    """Measure and print the peaks of all ranks; returns the exit status: 0 done, 2 invalid settings or data."""
    parser = make_parser(__doc__)
    parser.add_argument("config", metavar="CONFIG.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_args(arguments)
    layout, own = measure(options.config, options.overrides)
    ranks = layout.all_gather_objects(own)
    if layout.is_main:
        for phase in own:
            print(f"{phase}: {', '.join(f'{peaks[phase]:,.0f}' for peaks in ranks)} MiB")
    end_processes()
    return 0


if __name__ == "__main__":
    leave(main())
