"""What is measured of a model, in a run and in a replay of saved models: held-out loss, stream, panel, probes.

Every method that reads the model is collective: all ranks must call it. Files, curves and derived metrics are the main
rank's, which has a logger.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import nn

from moetrain.config import Settings
from moetrain.data.corpus import Corpus
from moetrain.data.stream import Stream
from moetrain.distributed.mesh import ParallelLayout
from moetrain.distributed.sharding import evaluation, inner_model
from moetrain.dtensor import full_tensor
from moetrain.grokking import Estimate, gram_blocks
from moetrain.loggers.run_logger import RunLogger
from moetrain.models.dense_experts import block_rows
from moetrain.models.transformer import DenseMLP, Transformer
from moetrain.monitoring.background import BackgroundWorker
from moetrain.monitoring.delays import delays
from moetrain.monitoring.state import MonitorState
from moetrain.optim.builder import Optimizer
from moetrain.probes.embeddings import end_embed, help_embed
from moetrain.probes.probe_monitor import write_scores
from moetrain.probes.scoring import TaskScore, score
from moetrain.routing.claims import panel_claims
from moetrain.routing.panel import read_panel
from moetrain.routing.panel_metrics import panel_metrics
from moetrain.routing.panel_monitor import PanelPoints, memorization_summary
from moetrain.routing.store import StoredReading, TrainingContext, to_stored, write_reading
from moetrain.routing.stream import StreamPoints, stream_points
from moetrain.training.evaluation import heldout_losses
from moetrain.training.incidents import IncidentLog
from moetrain.training.throughput import Clock

CLOCKED = ("record", "stream", "panel", "probes")
"""The clock's entries that are the monitor's overhead."""

_LARGEST_ROUTER_WEIGHT = 1e18  # times sqrt(hidden size): a sum of squares stays finite in float32


class Monitor:
    """Measures a model and hands the results to the state, the files and the logger.

    Args:
        state: what is known so far; updated in place.
        validation: held-out rows per domain.
        panel_domains: names of the domain numbers of the panel's samples.
        clock: what the time is charged to.
    """

    def __init__(
        self,
        settings: Settings,
        corpus: Corpus,
        layout: ParallelLayout,
        state: MonitorState,
        validation: dict[str, Stream],
        panel_domains: list[str],
        clock: Clock,
    ) -> None:
        self.settings, self.corpus, self.state = settings, corpus, state
        self.layout, self.clock = layout, clock
        self.incidents = IncidentLog()
        self.logger: RunLogger | None = None
        self.background: BackgroundWorker[StreamPoints | PanelPoints] = BackgroundWorker(layout.device.type != "cpu")
        self._validation, self._panel_domains = validation, panel_domains
        self._token_bytes = torch.from_numpy(corpus.tokenizer.token_bytes()).long().to(layout.device)
        self._folder = Path()

    def open(self, folder: Path, logger: RunLogger | None) -> None:
        """From now on write to a run's folder; ``logger`` is None on all ranks but the main one."""
        self._folder, self.logger = folder, logger

    def close(self) -> None:
        """Drop what has not been computed, and end the background thread."""
        self.background.close()

    def synchronize(self) -> None:
        """Bring the other ranks' incidents and counts to the main rank; all ranks must call."""
        stream = self.state.stream
        self.incidents.gather(self.layout)
        dropped = sum(self.layout.all_gather_objects(stream.not_finite))
        stream.not_finite = dropped if self.layout.is_main else 0

    def report_incidents(self) -> None:
        """Log the incidents that the main rank knows of."""
        if self.logger is not None:
            self.incidents.report(self.logger.incident)

    def validate(self, model: nn.Module, step: int) -> None:
        """Held-out loss of each domain."""
        if not self._validation:
            return
        with self.clock.measure("validate"), evaluation(model) as transformer:
            losses = heldout_losses(self.layout, transformer, self._validation, self._token_bytes)
        if self.logger is None:
            return
        for domain, heldout in losses.items():
            self.state.latest.set(domain, "validation_loss", heldout.loss, heldout.tokens)
            self.state.latest.set(domain, "bits_per_byte", heldout.bits_per_byte, heldout.tokens)
        self.logger.validation(step, losses)

    def measure_stream(self, model: nn.Module, step: int) -> None:
        """Log the losses by exposure, and have the streaming metrics of routing computed, on CUDA in the background."""
        self._measure_exposures(step)
        if not self.settings.watches_routing:
            return
        with self.clock.measure("stream"):
            rows_LED = self._router_rows(model, step)
            if rows_LED is None:
                return
            snapshot = self.state.stream.snapshot(rows_LED)
            if self.logger is None:
                return
            self.background.submit(stream_points, step, snapshot)
        self.publish()

    def _measure_exposures(self, step: int) -> None:
        exposures = self.state.exposures
        if exposures is None or not self.settings.monitor.enabled:
            return
        with self.clock.measure("stream"):
            metrics = exposures.metrics(after_step=step - self.settings.monitor.every)
        if self.logger is None:
            return
        self.state.latest.set_all(metrics)
        self.logger.metrics(step, metrics)

    def read_panel(self, model: nn.Module, step: int, context: TrainingContext) -> None:
        """Read the panel, store the reading, and have its metrics computed, on CUDA in the background."""
        panel = self.state.panel
        if panel is None:
            return
        with self.clock.measure("panel"):
            rows_LED = self._router_rows(model, step)
            if rows_LED is None:
                return
            panel.begin(step)
            with_claims = panel.due(self.settings.panel.claim_every, step)
            layer_inputs = self.settings.panel.linear_kernel
            stored = self._panel_reading(model, step, rows_LED, context, layer_inputs, with_claims)
            if stored is None:
                return
            panel.initial = stored.initial
            if self.logger is None:
                return
            try:
                write_reading(self._folder, stored)
            except OSError as error:
                self.logger.guard(step, f"the panel reading was not stored ({error}); its metrics are shown")
            self.background.submit(panel.take, stored)
        self.publish()

    def read_added(self, model: nn.Module, step: int) -> None:
        """Read the losses before training of the panel's samples of domains that were added to the run at a step."""
        panel = self.state.panel
        if panel is not None and panel.initial is not None and np.isnan(panel.initial).any():
            with self.clock.measure("panel"), evaluation(model) as transformer:
                reading = read_panel(transformer, panel.panel, step, self.layout)
            if reading is not None:
                panel.initial = np.where(np.isnan(panel.initial), reading.loss, panel.initial)

    def measure_repeats(self, model: nn.Module, optimizer: Optimizer, step: int) -> list[str]:
        """Log what the next pass over each repeated domain is worth, at some readings of the panel.

        Returns:
            The domains with ``repeats: auto`` whose next pass is not worth it, the same on all ranks.
        """
        panel, repeats = self.state.panel, self.state.repeats
        if panel is None or repeats is None or not panel.due(self.settings.panel.repeat_every, step):
            return []
        with self.clock.measure("panel"):
            found = repeats.measure(model, optimizer, step, self.layout)
        data = self.settings.data
        worthless = [
            domain
            for domain, each in found.items()
            if data.domains[domain].repeats == "auto" and each.worth.mean < data.least_worth and each.worth.high < 1
        ]
        worthless = self.layout.broadcast_object(worthless)
        if self.logger is None:
            return worthless
        for domain, each in found.items():
            values = {"passes": Estimate(each.passes, math.nan, math.nan, 0, 0), "worth": each.worth}
            values["budget"] = each.budget
            known = {f"repeat/{name}/{domain}": value for name, value in values.items() if math.isfinite(value.mean)}
            self.state.latest.set_all(known)
            self.logger.metrics(step, known)
            if math.isfinite(each.worth.mean):
                self.logger.repeats(step, domain, each.sentence(domain))
        return worthless

    def run_probes(self, model: nn.Module, step: int, tokens: int) -> None:
        """Score all tasks, store the answers, and correlate accuracy with the router's metrics.

        Args:
            tokens: trained on so far.
        """
        probes, correlations = self.state.probes, self.state.correlations
        if probes is None or correlations is None:
            return
        with self.clock.measure("probes"):
            scores = self._scores(model)
            probes.history.add(step, tokens, scores)
        if self.logger is None:
            return
        self.publish(wait=True)  # which values are the newest must not depend on the background thread's speed
        with self.clock.measure("probes"):
            try:
                write_scores(self._folder, step, scores)
            except OSError as error:
                self.logger.guard(step, f"the answers of the probes were not stored ({error}); their scores are shown")
            self.state.latest.tasks.update({name: scored.summary() for name, scored in scores.items()})
            self.logger.probes(step, scores)
            correlations.add(self.state.latest)
            for domain in correlations.domains:
                self.logger.correlations(step, domain, correlations.rank_correlations(domain))

    def publish(self, wait: bool = False) -> None:
        """Log what the background thread has computed; with ``wait``, everything that was submitted."""
        if self.logger is None:
            return
        with self.clock.measure("panel"), self.layout.progress.busy():  # nobody waits for streaming metrics
            done = self.background.results(wait)
        latest = self.state.latest
        for result in done:
            match result.value:
                case StreamPoints(step, readings):
                    self.clock.add_background("stream", result.seconds)
                    for reading in readings:
                        for metric, estimate in reading.metrics.items():
                            latest.set(reading.domain, f"stream/{metric}", estimate)
                    self.logger.streaming(step, readings)
                case PanelPoints() as points:
                    self.clock.add_background("panel", result.seconds)
                    latest.set_all(points.metrics)
                    for domain, verdict in points.phases.items():
                        latest.domains[domain]["phase"] = verdict.phase.name.lower()
                        latest.domains[domain]["why"] = verdict.why
                    self.logger.panel(points)

    def finish(self, model: Transformer | None, step: int) -> None:
        """Results that only a finished run has: memorized groups, generalized items, correlations, delays.

        Args:
            model: the newest; None where it could not be read.
        """
        if self.logger is None:
            if model is not None:
                help_embed(model, self.corpus.tokenizer, self.layout, self.settings.data.seq_len)
            return
        try:
            self._finish(self.logger, model, step)
        finally:
            end_embed(self.layout)

    def _finish(self, logger: RunLogger, model: Transformer | None, step: int) -> None:
        state = self.state
        domains = state.latest.domains
        if state.panel is not None:
            for domain, memorized in memorization_summary(state.panel).items():
                domains[domain]["memorized"] = memorized
                logger.memorized(step, domain, {"rule": "finished run", **memorized})
        if state.probes is None or state.correlations is None:
            return
        for name, task in state.latest.tasks.items():
            task["generalized"] = state.probes.history.group_sizes(name)
        for domain, found in domains.items():
            found["correlations"] = state.correlations.as_dict(domain)
        for domain, delay in delays(model, state, self.settings, self.corpus, self.layout).items():
            domains[domain]["delay"] = delay.as_dict()
            logger.delay(step, domain, delay.mean.steps if delay.mean else None)

    def overhead(self) -> dict[str, float]:
        """The monitor's share of all measured time, in all and per part, by tag."""
        return {
            "system/monitor_share": self.clock.share(*CLOCKED),
            "system/monitor_panel": self.clock.share("panel"),
            "system/monitor_probes": self.clock.share("probes"),
            "system/monitor_stream": self.clock.share("record", "stream"),
        }

    def time_stream(self, model: nn.Module) -> float:
        """Seconds of one computation of the streaming metrics; nothing is kept."""
        with self.clock.measure("stream trial"):
            if self.settings.watches_routing:
                self.state.stream.measure(router_rows(model))
        return self.clock.pop("stream trial")

    def time_panel(self, model: nn.Module, steps: int) -> float:
        """Seconds of one reading of the panel with its metrics, of a run of ``steps`` steps; nothing is kept.

        The claim ratio and the worth of repeats, which only some readings measure, are added as a mean over readings.
        """
        panel, settings = self.state.panel, self.settings.panel
        assert panel is not None
        with self.clock.measure("panel trial"):
            stored = self._panel_reading(model, 0, router_rows(model), TrainingContext(), False, False)
            if stored is not None:
                panel_metrics(stored, panel.domains, panel.tau, steps, max_pairs=panel.max_pairs)
        reading = seconds = self.clock.pop("panel trial")
        if settings.claim_every:
            with self.clock.measure("panel trial"), evaluation(model) as transformer:
                panel_claims(transformer, panel.panel, steps, self.layout)
            seconds += self.clock.pop("panel trial") / settings.claim_every
        if self.state.repeats is not None and settings.repeat_every:
            seconds += reading * self.state.repeats.cost(self.layout) / settings.repeat_every
        return seconds

    def time_probes(self, model: nn.Module) -> float:
        """Seconds of one reading of the probes; nothing is kept."""
        with self.clock.measure("probes trial"):
            self._scores(model)
        return self.clock.pop("probes trial")

    def _panel_reading(
        self,
        model: nn.Module,
        step: int,
        rows_LED: np.ndarray,
        context: TrainingContext,
        layer_inputs: bool,
        with_claims: bool,
    ) -> StoredReading | None:
        """A reading on the main rank; None on the others."""
        assert self.state.panel is not None
        monitor = self.state.panel
        with evaluation(model) as transformer:
            reading = read_panel(transformer, monitor.panel, step, self.layout, layer_inputs)
            claims = panel_claims(transformer, monitor.panel, step, self.layout) if with_claims else None
        if reading is None:
            return None
        initial = reading.loss if step == 0 else monitor.initial
        blocks = gram_blocks(rows_LED)
        return to_stored(monitor.panel, reading, self._panel_domains, blocks, context, initial, claims)

    def _scores(self, model: nn.Module) -> dict[str, TaskScore]:
        assert self.state.probes is not None
        settings = self.settings.probes
        new_tokens = settings.max_new_tokens if settings.generate else 0
        with evaluation(model) as transformer:
            return score(transformer, self.state.probes.prepared, self.layout, new_tokens)

    def _router_rows(self, model: nn.Module, step: int) -> np.ndarray | None:
        """`router_rows`; None, which is logged, where they are so large that matmuls of them overflow."""
        rows_LED = router_rows(model)
        if np.abs(rows_LED).max() < _LARGEST_ROUTER_WEIGHT / rows_LED.shape[-1] ** 0.5:
            return rows_LED
        if self.logger is not None:
            self.logger.guard(step, "the routers' weights are too large to compare: their metrics are left out")
        return None


def router_rows(model: nn.Module) -> np.ndarray:
    """The routers' weights, float32 [L, E, D], gathered where they are sharded; all ranks must call.

    Of a dense model: see `moetrain.models.dense_experts.block_rows`.
    """
    transformer = inner_model(model)
    if transformer.settings.experts == "dense":
        projections = [each.gate_up_proj for each in transformer.modules() if isinstance(each, DenseMLP)]
        blocks = transformer.settings.dense_experts
        rows = [block_rows(full_tensor(each.weight.detach()), blocks) for each in projections]
    else:
        rows = [full_tensor(weight.detach()) for weight in transformer.router_weights()]
    return np.stack([layer_rows.float().cpu().numpy() for layer_rows in rows])
