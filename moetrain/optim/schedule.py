"""The learning rate as a function of the step alone."""

from __future__ import annotations

import math

from moetrain.config import OptimSettings


def warmup_warning(steps: int, settings: OptimSettings) -> str | None:
    """A line for the user where the warm-up takes the whole run of ``steps``, else None."""
    if settings.warmup_steps < steps:
        return None
    return (
        f"optim.warmup_steps={settings.warmup_steps}, but the run has {steps} {'step' if steps == 1 else 'steps'}: "
        "the learning rate hardly reaches its peak; set a smaller optim.warmup_steps"
    )


def learning_rate(step: int, steps: int, settings: OptimSettings) -> float:
    """The learning rate of update ``step`` (1 the first) of ``steps``.

    Linear warm-up to the peak, then by ``schedule``: ``cosine`` decays to the final rate; ``wsd`` stays at the peak and
    decays linearly over the last ``decay_share`` of the run; ``constant`` stays. The last update has the final rate. In
    a run no longer than its warm-up, that takes all steps but the last.
    """
    peak, final = settings.learning_rate, settings.learning_rate * settings.min_learning_rate_ratio
    warmup = min(settings.warmup_steps, steps - 1)
    if step <= warmup:
        return peak * step / (warmup + 1)
    if settings.schedule == "constant":
        return peak
    begin = warmup if settings.schedule == "cosine" else max(warmup, round(steps * (1 - settings.decay_share)))
    done = min(1.0, max(0.0, (step - begin) / max(1, steps - begin)))
    if settings.schedule == "cosine":
        return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * done))
    return peak + (final - peak) * done


def rate_after_jump(before: float, step: int, steps: int, settings: OptimSettings) -> float | None:
    """The rate of update ``step + 1`` where it is off the rate ``before`` of update ``step`` by more than the schedule
    of ``steps`` changes in that step; else None."""
    planned, after = (learning_rate(each, steps, settings) for each in (step, step + 1))
    return after if abs(after - before) > abs(after - planned) + 1e-6 * before else None
