"""What a run will cost, measured on the run itself before it starts: the dry run, and ``monitor.budget: auto``."""

from __future__ import annotations

import yaml

from moetrain.atomic_io import write_file
from moetrain.checkpoint.run_folder import RunFolder
from moetrain.monitoring.budget import LEAST, Cost, Readings
from moetrain.trainer import Trainer
from moetrain.training.step import forward_backward
from moetrain.training.throughput import peak_memory


def dry_run(trainer: Trainer) -> None:
    """Train a few steps, time them, and print what the whole run will take; nothing is kept."""
    clock, settings, terminal = trainer.clock, trainer.settings, trainer.terminal
    steps = min(3, trainer.stream.steps)
    for step in range(1, steps + 1):
        clock.seconds.clear()  # the first steps warm up: only the last one counts
        trainer.train_step(step)
        clock.settle()
    seconds = clock.spent("train")
    streaming = trainer.monitor.time_stream(trainer.model)
    monitored = clock.spent("record") + streaming / settings.monitor.every
    tokens = trainer.stream.real_tokens(steps - 1)
    terminal.note(
        f"one step: {seconds:.2f} s, {tokens / seconds:,.0f} tokens/s; all {trainer.steps:,} steps: "
        f"about {trainer.steps * seconds / 60:.1f} min without validation; "
        f"recording and streaming metrics: about {monitored / (seconds + monitored):.1%} of it; "
        f"memory so far {peak_memory(trainer.layout.device) / 2**30:.2f} GiB"
    )
    for cost in measure_costs(trainer, seconds):
        auto = settings.monitor.budget == "auto"
        readings = max(LEAST, cost.affordable) if auto else getattr(settings, cost.what).readings
        readings = min(readings, trainer.steps + 1)  # step 0 and every step
        terminal.note(cost.line(readings))


def choose_readings(trainer: Trainer, folder: RunFolder) -> Readings:
    """How often to read panel and probes: as set, or with ``monitor.budget: auto`` as measured; all ranks must call.

    Measured numbers are written into the run's config.yaml, from which a resumed run takes them.
    """
    settings = trainer.settings
    as_set = Readings(settings.panel.readings, settings.probes.readings)
    if settings.monitor.budget != "auto":
        return as_set
    path = folder.path / "config.yaml"
    if folder.checkpoint is not None:
        written = yaml.safe_load(path.read_text(encoding="utf-8"))
        return Readings(written["panel"]["readings"], written["probes"]["readings"])
    costs = trainer.layout.broadcast_object(measure_costs(trainer, step_seconds(trainer)))
    chosen = {cost.what: max(LEAST, cost.affordable) for cost in costs}
    for cost in costs:
        trainer.terminal.note(f"monitor.budget: {cost.line(chosen[cost.what])}")
    if trainer.layout.is_main:
        sections = {what: getattr(settings, what).model_copy(update={"readings": n}) for what, n in chosen.items()}
        write_file(path, settings.model_copy(update=sections).to_yaml())
    return Readings(chosen.get("panel", as_set.panel), chosen.get("probes", as_set.probes))


def measure_costs(trainer: Trainer, step: float) -> list[Cost]:
    """What one reading of the panel and of the probes costs beside all steps; training is left as it was.

    Args:
        step: seconds of one step.
    """
    training = trainer.steps * step
    costs = []
    if trainer.state.monitor.panel is not None:
        costs.append(Cost("panel", trainer.monitor.time_panel(trainer.model, trainer.steps), training))
    if trainer.state.monitor.probes is not None:
        costs.append(Cost("probes", trainer.monitor.time_probes(trainer.model), training))
    return costs


def step_seconds(trainer: Trainer) -> float:
    """Seconds of a forward and backward pass over a step's rows, the second of two; nothing is updated."""
    clock = trainer.clock
    for _ in range(2):
        clock.pop("step trial")
        with clock.measure("step trial"):
            forward_backward(
                trainer.layout,
                trainer.model,
                trainer.stream,
                0,
                trainer.state.balancing,
                trainer.settings,
                lambda batch, output: None,
            )
        trainer.optimizer.zero_grad(set_to_none=True)
    return clock.pop("step trial")
