"""Panel readings turned into metrics, over time: the result depends on the readings and their order alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from moetrain import grokking
from moetrain.grokking import Estimate, History, PhaseChange, PhaseThresholds, Verdict
from moetrain.metrics import table
from moetrain.metrics.cell import MODEL
from moetrain.metrics.cell import SEEN as SEEN_CELL
from moetrain.routing.panel import HELDOUT, SEEN, TO_COME, Panel
from moetrain.routing.panel_metrics import Cells, expert_load, expert_load_by_domain, metrics_of, panel_cells
from moetrain.routing.store import StoredReading, TrainingContext

_TOP_LOAD = 2.0  # brightest color of the load's heat maps: twice an even share
_NO_LOSS = np.finfo(np.float32).max
_STATE_NAMES = {"d_path": "by_layer", "d_eff": "dimension_by_layer"}
"""Names in a checkpoint of metrics by layer; another metric's is NAME_by_layer."""


@dataclass(frozen=True)
class HeatMap:
    """A matrix [rows, columns] and the value of the brightest color; the darkest is 0."""

    values: np.ndarray
    top: float


@dataclass(frozen=True)
class PanelPoints:
    """The results of one reading."""

    step: int
    steps: int  # of the run
    metrics: dict[str, Estimate]  # by TensorBoard tag
    verdicts: dict[str, list[Verdict]]  # per domain, at each reading so far
    changes: dict[str, PhaseChange]  # per domain, where this reading changed its phase
    memorized: dict[str, Memorized]  # per domain, where this reading changed which samples count as memorized
    matrices: dict[str, HeatMap]  # by tag
    distributions: dict[str, np.ndarray]  # by tag: one value per sample
    broken: int  # panel samples whose routing or loss is not finite

    @property
    def phases(self) -> dict[str, Verdict]:
        """The verdict per domain at this reading."""
        return {domain: verdicts[-1] for domain, verdicts in self.verdicts.items()}


@dataclass(frozen=True)
class Memorized:
    """Seen samples of a domain, by name, that a reading added to or removed from the memorized, by the online rule."""

    eps: float
    newly: list[str]
    undone: list[str]
    fraction: float  # of the seen samples trained on by now, memorized now


class PanelMonitor:
    """Keeps the panel's losses and metrics over time, computes those of each reading, and judges the domains' phases.

    Args:
        panel: whose readings are taken.
        domains: names by number.
        tau: share of the routing weight that a pathway covers.
        steps: steps of the run.
        eps: loss in nats below which the online rule counts a sample as memorized, per domain; None: taken at each
            reading from the samples not trained on, see `grokking.online_eps`.
        thresholds: of the phase rule.
        delta: nats by which the loss of a memorized sample may differ from its last.
        max_pairs: of samples that a mean distance is taken over; None: all.

    Attributes:
        initial: losses before the first step, float32 [P]; None before they have been read.
    """

    def __init__(
        self,
        panel: Panel,
        domains: Sequence[str],
        tau: float,
        steps: int,
        eps: Mapping[str, float | None],
        thresholds: PhaseThresholds | None = None,
        delta: float = grokking.memorization.DELTA,
        max_pairs: int | None = None,
    ) -> None:
        self.panel = panel
        self.domains = list(domains)
        self.tau = tau
        self.steps = steps
        self.eps = dict(eps)
        self.thresholds = thresholds or PhaseThresholds()
        self.delta = delta
        self.max_pairs = max_pairs
        names = [metric.name for metric in table.evidence()] + list(_COUNTED)
        self._history: dict[str, dict[str, list[tuple[float, float, float]]]] = {
            domain: {name: [] for name in names} for domain in self.domains
        }
        self._by_layer: dict[str, dict[str, list[np.ndarray]]] = {
            domain: {metric.name: [] for metric in table.METRICS if metric.by_layer} for domain in self.domains
        }
        self._tokens: list[int] = []
        self._read_at: list[int] = []
        self._losses: list[np.ndarray] = []
        self.initial: np.ndarray | None = None
        self._begun: list[int] = []

    def losses(self, domain: int) -> tuple[np.ndarray, np.ndarray]:
        """Steps of all readings [T], and the losses of a domain's seen samples [S, T]."""
        members = self.panel.members(domain, SEEN)
        return np.array(self._read_at), np.stack(self._losses, axis=1)[members] if self._losses else np.zeros((0, 0))

    @property
    def times(self) -> grokking.ReadingTimes:
        """Steps and tokens of the readings."""
        return grokking.ReadingTimes(tuple(self._read_at), tuple(self._tokens))

    def state(self) -> dict[str, torch.Tensor]:
        """The readings so far, for a checkpoint."""
        if not self._losses:
            return {}
        state = {
            "steps": torch.tensor(self._read_at),
            "tokens": torch.tensor(self._tokens),
            "losses": torch.from_numpy(np.stack(self._losses)),
        }
        if self.initial is not None:
            state["initial"] = torch.from_numpy(self.initial)
        for domain, history in self._history.items():
            for name, layers in self._by_layer[domain].items():
                if layers:
                    state[f"{_state_name(name)}.{domain}"] = torch.from_numpy(np.stack(layers))
            for name, rows in history.items():
                state[f"{name}.{domain}"] = torch.tensor(rows, dtype=torch.float64)
        return state

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore the readings of a checkpoint; a metric that it does not know has no value at its readings.

        Samples of domains that were added since then come after those of the readings, and have no loss there.
        """
        if state:
            unknown = torch.full((len(state["steps"]), 3), math.nan)
            added = len(self.panel) - state["losses"].shape[1]
            self._read_at = state["steps"].tolist()
            self._tokens = state["tokens"].tolist()
            self._losses = list(np.pad(state["losses"].numpy(), ((0, 0), (0, added)), constant_values=_NO_LOSS))
            initial = state["initial"].numpy() if "initial" in state else None
            self.initial = None if initial is None else np.pad(initial, (0, added), constant_values=math.nan)
            self._begun = list(self._read_at)
            for domain, history in self._history.items():
                for name, layers in self._by_layer[domain].items():
                    if f"{_state_name(name)}.{domain}" in state:
                        layers[:] = state[f"{_state_name(name)}.{domain}"].numpy()
                for name in history:
                    none = unknown if name not in _COUNTED else torch.zeros_like(unknown)
                    history[name] = [tuple(row) for row in state.get(f"{name}.{domain}", none).tolist()]

    def begin(self, step: int) -> None:
        """Count a reading; its metrics may be computed later."""
        self._begun.append(step)

    def due(self, every: int, step: int) -> bool:
        """Whether this step is that of each ``every``-th reading that was begun, or of the run's last; never with 0."""
        if not every or step == 0 or step not in self._begun:
            return False
        return step == self.steps or self._begun.index(step) % every == 0

    def take(self, stored: StoredReading) -> PanelPoints:
        """Add the next reading; returns its results, given those before."""
        self._read_at.append(stored.step)
        self._tokens.append(stored.training_context.tokens)
        # A loss that is not finite counts as the largest float: no sample that has one is memorized.
        self._losses.append(np.where(np.isfinite(stored.loss), stored.loss, _NO_LOSS))
        cells = {domain: panel_cells(stored, domain, self.tau, self.steps, self.max_pairs) for domain in self.domains}
        metrics = metrics_of(cells)
        memorized = {}
        for number, domain in enumerate(self.domains):
            change = self._memorized(number, stored.step, metrics)
            if change is not None:
                memorized[domain] = change
        verdicts, changed = self._judge(metrics, stored.training_context)
        matrices = {
            "experts/load_by_layer": HeatMap(expert_load(stored), _TOP_LOAD),
            "experts/load_by_domain": HeatMap(expert_load_by_domain(stored, self.domains), _TOP_LOAD),
        }
        broken = int((~stored.finite | ~np.isfinite(stored.loss)).sum())
        return PanelPoints(
            step=stored.step,
            steps=self.steps,
            metrics=metrics,
            verdicts=verdicts,
            changes=changed,
            memorized=memorized,
            matrices=matrices | self._layers(cells),
            distributions=_distributions(cells),
            broken=broken,
        )

    def _layers(self, cells: Mapping[str, Cells]) -> dict[str, HeatMap]:
        """Heat maps [L, readings so far] of the metrics by layer, with this reading added."""
        found = {}
        for domain, by_name in cells.items():
            for name, readings in self._by_layer[domain].items():
                metric = table.find(name)
                readings.append(metric.layers(by_name[SEEN_CELL]))
                found[f"{metric.tag}_by_layer/{domain}"] = HeatMap(np.stack(readings, axis=1), metric.top)
        return found

    def online_eps(self, domain: int) -> np.ndarray:
        """The online rule's eps of a domain at each reading [T], nats; NaN where too few samples are unseen."""
        given = self.eps[self.domains[domain]]
        if given is not None:
            return np.full(len(self._read_at), given)
        members = np.concatenate([self.panel.members(domain, cell) for cell in (TO_COME, HELDOUT)])
        first_U1 = self.panel.first_step[members][:, None]
        unseen_UT = (first_U1 == 0) | (first_U1 > np.array(self._read_at))
        return grokking.online_eps(np.stack(self._losses, axis=1)[members], unseen_UT)

    def _memorized(self, number: int, step: int, metrics: dict[str, Estimate]) -> Memorized | None:
        """Add a domain's memorized fraction to the metrics, if there is one; returns what changed, if anything did."""
        steps_T, losses_ST = self.losses(number)
        eps_T = self.online_eps(number)
        members = self.panel.members(number, SEEN)
        first_S = self.panel.first_step[members]
        trained_S, before_S = ((first_S > 0) & (first_S <= by) for by in (step, steps_T[-2:][0]))
        window = grokking.memorization.WINDOW
        if not trained_S.any() or len(eps_T) < window or not np.isfinite(eps_T[-window:]).all():
            return None
        now = grokking.memorized_now(losses_ST, eps_T, self.delta) & trained_S
        fraction = grokking.memorized_fraction(now[trained_S], self.panel.samples.document[members][trained_S])
        metrics[f"memorized/fraction/{self.domains[number]}"] = fraction
        before = grokking.memorized_now(losses_ST[:, :-1], eps_T[:-1], self.delta) & before_S
        if np.array_equal(now, before):
            return None
        newly, undone = (self.panel.names(members[which]) for which in (now & ~before, before & ~now))
        return Memorized(float(eps_T[-1]), newly, undone, fraction.mean)

    def _judge(
        self, metrics: Mapping[str, Estimate], context: TrainingContext
    ) -> tuple[dict[str, list[Verdict]], dict[str, PhaseChange]]:
        verdicts, changed = {}, {}
        for domain, history in self._history.items():
            for metric in table.evidence():
                if MODEL in metric.cells:
                    history[metric.name].append(_number(getattr(context, metric.name)))
                else:
                    history[metric.name].append(_row(metrics.get(f"{metric.tag}/{domain}")))
            for name, tag in _COUNTED.items():
                counted = metrics.get(f"{tag}/{domain}")
                history[name].append(_number(counted.samples if counted else 0))
            curves = {name: grokking.curve(np.array(rows)) for name, rows in history.items() if name not in _COUNTED}
            counts = {name: np.array(history[name], float)[:, 0].astype(np.int64) for name in _COUNTED}
            so_far = History(
                steps=np.array(self._read_at),
                tokens=np.array(self._tokens),
                seen=counts["seen"],
                unseen=counts["unseen"],
                answers=counts["answers"],
                loss_seen=curves.pop("loss_seen"),
                loss_unseen=curves.pop("loss_unseen"),
                share=curves.pop("share"),
                loss_frequencies=curves.pop("loss_frequencies"),
                context=curves,
            )
            judged = grokking.phases(so_far, self.thresholds)
            verdicts[domain] = judged
            if last := [change for change in grokking.changes(judged) if change.verdict is judged[-1]]:
                changed[domain] = last[0]
        return verdicts, changed


_COUNTED = {"seen": "loss/panel_seen", "unseen": "loss/panel_unseen", "answers": "kernel/left_out"}
"""Counts that a verdict rests on, and the tag whose number of samples or documents they are."""


def _distributions(cells: Mapping[str, Cells]) -> dict[str, np.ndarray]:
    return {
        f"{metric.tag}_by_sample/{domain}": metric.by_sample(by_name[SEEN_CELL])
        for domain, by_name in cells.items()
        for metric in table.METRICS
        if metric.by_sample and len(by_name[SEEN_CELL])
    }


def _state_name(metric: str) -> str:
    return _STATE_NAMES.get(metric, f"{metric}_by_layer")


def _row(estimate: Estimate | None) -> tuple[float, float, float]:
    return (math.nan, math.nan, math.nan) if estimate is None else (estimate.mean, estimate.low, estimate.high)


def _number(value: float | None) -> tuple[float, float, float]:
    return (math.nan if value is None else float(value), math.nan, math.nan)


def memorization_summary(monitor: PanelMonitor) -> dict[str, dict[str, object]]:
    """The paper's rule applied to a finished run, per domain: eps, groups Pretrain@t*, agreement of the online rule.

    ``eps`` is None where no threshold gives a fifth of the seen samples an uncensored onset.
    """
    found: dict[str, dict[str, object]] = {}
    for number, domain in enumerate(monitor.domains):
        steps, losses_ST = monitor.losses(number)
        if not losses_ST.size:
            continue
        tail = grokking.memorization.MIN_TAIL_IN_RUNS
        delta = monitor.delta
        eps = grokking.choose_eps(losses_ST, delta=delta, min_tail=tail)
        entry: dict[str, object] = {
            "eps": eps,
            "delta": delta,
            "samples": len(losses_ST),
            "readings": len(steps),
            "too_few": grokking.too_few(len(losses_ST), len(steps)),
        }
        if eps is not None:
            groups = grokking.memorized_groups(losses_ST, eps, delta, tail)
            agreement = grokking.online_agreement(losses_ST, eps, delta, min_tail=tail)
            entry["groups"] = {str(int(steps[onset])): len(members) for onset, members in sorted(groups.items())}
            entry["online_agreement"] = agreement.share
        found[domain] = entry
    return found
