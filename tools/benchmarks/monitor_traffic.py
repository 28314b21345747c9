"""What the monitor adds to a run on many GPUs: bytes that ranks send to the main one, and passes through the model.

A rank sends the main rank the panel samples that it has read, and those of its training samples that are among the
newest of all ranks. So the main rank receives the same from 8 ranks and from 4,096. A test compares the bytes with
those of running ranks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from moetrain.config import Settings
from moetrain.monitoring.exposures import BUCKETS
from moetrain.routing.panel import most_samples

_SAMPLE = 12  # bytes of a panel sample besides its routing: index and loss
_TRAINED = 24  # of a training sample: place in the stream, number, domain
_LOSSES = 56  # of a training sample whose loss is kept: `SampleLosses`
_CLAIMS = 24  # of a panel sample: index, gain, claim
_ORDERS = 40  # rounds of the bisection that finds the newest samples among a trillion


def monitor_bytes(settings: Settings) -> dict[str, int]:
    """Bytes that the main rank receives or, of ``agreement``, that each rank puts into all-reduces, by what for.

    Of one reading of the panel, with and without the claim ratio, and of one measurement of the stream.
    """
    if not settings.watches_routing:
        return dict.fromkeys(("panel", "claims", "stream", "exposures", "agreement"), 0)
    model, domains = settings.model, len(settings.data.domains)
    layers, experts = model.num_hidden_layers, model.recorded_experts
    routing = layers * experts
    inputs = 4 * layers * model.hidden_size if settings.panel.linear_kernel else 0
    members = most_samples(settings.panel.samples) * domains
    losses = settings.monitor.exposure_window * exposure_groups(settings) * domains
    return {
        "panel": members * (_SAMPLE + 10 * routing + inputs),
        "claims": settings.panel.samples * domains * _CLAIMS,
        "stream": settings.monitor.window * domains * (_TRAINED + 12 * routing),
        "exposures": losses * _LOSSES,
        "agreement": 8 * _ORDERS * domains * (1 + BUCKETS),
    }


def exposure_groups(settings: Settings) -> int:
    """Groups of samples by earlier exposures that the domain with the most repeats has."""
    most = max((domain.copies for domain in settings.data.domains.values()), default=1)
    return min(BUCKETS, 1 + (most - 1).bit_length())


def monitor_plan(
    settings: Settings, gpus: int, steps: float, tokens: float, rate: float, bandwidth: float
) -> dict[str, Any]:
    """Bytes and seconds of a run's monitoring.

    Args:
        rate: tokens per second that one GPU trains on; a forward pass takes a third of a step.
        bandwidth: bytes per second into the main rank's GPU.
    """
    received = monitor_bytes(settings)
    seconds = tokens / rate / gpus
    measured = steps / settings.monitor.every
    readings = settings.panel.readings if settings.watches_routing else 0
    with_claims = readings / settings.panel.claim_every if settings.panel.claim_every else 0
    over_run = readings * received["panel"] + with_claims * received["claims"]
    over_run += measured * (received["stream"] + received["exposures"])

    def read_tokens(domains: Iterable[str]) -> int:
        return sum(most_samples(settings.panel.samples) * (settings.panel_tokens(name) + 2) for name in domains)

    read = read_tokens(settings.data.domains)
    repeated = [name for name, domain in settings.data.domains.items() if domain.copies > 1]
    with_repeats = readings / settings.panel.repeat_every if settings.panel.repeat_every and repeated else 0
    again = read_tokens(repeated)
    return {
        "received_bytes": received,
        "received_a_step": over_run / steps,
        "receiving_share": over_run / bandwidth / seconds,
        "panel_seconds": read / 3 / rate / gpus,
        "panel_share": readings * read / 3 / tokens,
        # Four to five passes of all samples of repeated domains, see `RepeatMonitor.cost`. Ranks that share a model all
        # make them; others share the domains.
        "repeats_seconds": [5 * again / 3 / rate / gpus, 5 * again / 3 / rate],
        "repeats_share": [with_repeats * 5 * again / 3 / rate / seconds / each for each in (gpus, 1)],
    }
