"""The learning rate as a function of the step alone."""

from __future__ import annotations

import math

from moetrain.config import OptimSettings


def learning_rate(step: int, steps: int, settings: OptimSettings) -> float:
    """The learning rate of update ``step`` (1 the first) of ``steps``.

    Linear warm-up, then: ``cosine`` to the final rate; ``wsd`` stays at the peak and falls linearly over the last
    ``decay_share`` of the run; ``constant`` stays. The last update takes the final rate.
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
