"""What the next pass over a repeated domain is worth, measured at the weights of a run (ours).

Unseen texts of the domain are split into two halves. The gradient of one half, in the optimizer's direction, is the
change of the weights that helps it most. How fast the loss of any other text falls along this direction is, to first
order, how much training on that text helps the half. So the same derivative of texts trained on before and of the
other half, which is fresh text, gives the worth of a repeat. Both halves take both roles. The derivative is a central
difference: forward passes alone, at weights moved by so little that the half's own loss would fall by 0.02 nats.

Everything is restored bit for bit, so training with and without it is the same. Shapes: S samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from moetrain import grokking
from moetrain.data.stream import Stream
from moetrain.distributed.expert_parallel import expert_modules
from moetrain.distributed.mesh import ParallelLayout
from moetrain.distributed.sharding import evaluation, inner_model
from moetrain.dtensor import full_tensor
from moetrain.grokking import Estimate
from moetrain.optim.builder import Optimizer
from moetrain.routing.panel import HELDOUT, SEEN, TO_COME, Panel

LEAST_DOCUMENTS = 8  # repeated ones, and fresh ones in each half
_MOVE = 0.02  # nats that the loss of a half would fall by, to first order, along its direction


@dataclass(frozen=True)
class Repeats:
    """A domain's repeats at one step."""

    passes: float  # tokens trained on, over the tokens of all its distinct texts
    worth: Estimate  # of the next pass; undefined where it could not be measured
    budget: Estimate  # passes after which the next is worth half of fresh text

    def sentence(self, domain: str) -> str:
        """In words, with numbers."""
        worth, budget = self.worth, self.budget
        ends = f"{_two(worth.low)} to {_two(worth.high)}, n={worth.samples} documents"
        text = f"{domain}: {self.passes:.1f} passes; the next is worth {_two(worth.mean)} of fresh text ({ends})"
        if not np.isfinite(budget.mean):
            return text
        high = f"{budget.high:.1f}" if np.isfinite(budget.high) else "more than can be told"
        half = "half of it after" if budget.mean >= self.passes else "it was worth half of that after"
        return f"{text}; {half} {budget.mean:.1f} passes ({budget.low:.1f} to {high})"


def _two(number: float) -> str:
    """A number with two decimals, without a sign where they are 0."""
    return f"{round(number, 2) + 0.0:.2f}"


class RepeatMonitor:
    """Measures the worth of the next pass for each domain that the stream repeats, and keeps the measurements.

    Args:
        panel: whose samples are read; their first panel tokens, or their answers.
        stream: the training stream.
        domains: names by number.
    """

    def __init__(self, panel: Panel, stream: Stream, domains: Sequence[str]) -> None:
        self._panel, self._stream, self._domains = panel, stream, list(domains)
        repeated = np.bincount(stream.samples.domain[stream.exposures > 0], minlength=len(self._domains)) > 0
        self.repeated = np.flatnonzero(repeated).tolist()
        self._rows: dict[str, list[tuple[float, ...]]] = {self._domains[number]: [] for number in self.repeated}

    def measure(self, model: nn.Module, optimizer: Optimizer, step: int, layout: ParallelLayout) -> dict[str, Repeats]:
        """The worth of the next pass per domain after ``step`` steps; all ranks must call.

        Ranks that hold the whole model share the domains. Where ranks share a model, all of them read the same rows.
        """
        measured: dict[int, Estimate] = {}
        for number in self._measured_by(layout.rank, layout):
            layout.progress.mark()
            measured[number] = self._worth(model, optimizer, number, step, layout)
        if not layout.passes_together:
            parts = layout.all_gather_objects(measured)
            measured = {number: worth for part in parts for number, worth in part.items()}
        found = {}
        for number in self.repeated:
            domain, worth = self._domains[number], measured[number]
            passes, rows = self._passes(number, step), self._rows[domain]
            rows.append((float(step), passes, worth.mean, worth.low, worth.high))
            _, passes_T, worth_T, _, high_T = np.array(rows).T
            found[domain] = Repeats(passes, worth, grokking.repeat_budget(passes_T, worth_T, high_T - worth_T))
        return found

    def cost(self, layout: ParallelLayout) -> float:
        """Seconds of a measurement over those of a reading of the whole panel, by the tokens that pass the model.

        Each unseen text passes forward and backward once, which costs three forward passes, and forward twice as fresh
        text; each text trained on passes forward four times. A reading is shared by all ranks, a measurement as
        `measure` says; it takes as long as the rank with the most tokens needs.
        """
        panel = self._panel
        length = panel.samples.length
        passed = np.where(panel.cell == SEEN, 4, 5) * length
        passed_D = np.bincount(panel.samples.domain, passed, minlength=len(self._domains))
        most = max(passed_D[self._measured_by(rank, layout)].sum() for rank in range(layout.world_size))
        return float(most * layout.world_size / length.sum())

    def state(self) -> dict[str, torch.Tensor]:
        """The measurements so far, for a checkpoint."""
        return {domain: torch.tensor(rows, dtype=torch.float64) for domain, rows in self._rows.items() if rows}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore what `state` returned."""
        for domain, rows in self._rows.items():
            rows[:] = [tuple(row) for row in state[domain].tolist()] if domain in state else []

    def _measured_by(self, rank: int, layout: ParallelLayout) -> list[int]:
        """The domains that a rank measures."""
        return self.repeated if layout.passes_together else self.repeated[rank :: layout.world_size]

    def _passes(self, number: int, step: int) -> float:
        stream = self._stream
        trained = stream.rows.samples[: stream.rows.starts[min(step * stream.batch_rows, len(stream.rows))]]
        length = np.where(stream.samples.domain == number, stream.samples.length, 0)
        return float(length[trained].sum() / length[self._one_of_each_text].sum())

    @cached_property
    def _one_of_each_text(self) -> np.ndarray:
        """A sample of each distinct text of the stream, which a stop of repeats does not change."""
        return np.unique(self._stream.text_of_sample, return_index=True)[1]

    def _worth(
        self, model: nn.Module, optimizer: Optimizer, number: int, step: int, layout: ParallelLayout
    ) -> Estimate:
        panel, documents = self._panel, self._panel.samples.document
        seen = panel.members(number, SEEN, seen_by=step)
        to_come = panel.members(number, TO_COME)
        unseen = np.concatenate([panel.members(number, HELDOUT), to_come[panel.first_step[to_come] > step]])
        names, place = np.unique(documents[unseen], return_inverse=True)
        if len(np.unique(documents[seen])) < LEAST_DOCUMENTS or len(names) < 2 * LEAST_DOCUMENTS:
            return Estimate.undefined(len(names))
        halves = unseen[place % 2 == 0], unseen[place % 2 == 1]
        repeated = np.zeros(len(seen))
        fresh: list[np.ndarray] = []
        for half, other in (halves, halves[::-1]):
            along = _falls(model, optimizer, panel, half, (seen, other), layout)
            if along is None:
                return Estimate.undefined(len(names))
            repeated += along[0] / 2
            fresh.append(along[1])
        others = np.concatenate([halves[1], halves[0]])
        return grokking.repeat_worth(repeated, np.concatenate(fresh), documents[seen], documents[others])


def _falls(
    model: nn.Module,
    optimizer: Optimizer,
    panel: Panel,
    half: np.ndarray,
    groups: Sequence[np.ndarray],
    layout: ParallelLayout,
) -> list[np.ndarray] | None:
    """How fast the loss of each sample of some groups falls along the direction of a half, [S] each; None if unknown.

    In nats per token, for a move along which the half's own loss would fall by one nat to first order.
    """
    parameters = [parameter for parameter in inner_model(model).parameters() if parameter.requires_grad]
    try:
        _gradient(model, panel, half, layout)
        directions = [
            optimizer.direction(parameter, parameter.grad) if parameter.grad is not None else None
            for parameter in parameters
        ]
        own = 0.0
        for parameter, direction in zip(parameters, directions, strict=True):
            if direction is not None and parameter.grad is not None:
                own += float(full_tensor((parameter.grad * direction).sum(dtype=torch.float64)))
    finally:
        for parameter in parameters:
            parameter.grad = None
    if not (np.isfinite(own) and own > 0):
        return None
    before = [parameter.detach().clone() for parameter in parameters]
    moved: list[list[np.ndarray]] = []
    try:
        for sign in (1.0, -1.0):
            with torch.no_grad():
                for parameter, weight, direction in zip(parameters, before, directions, strict=True):
                    if direction is not None:
                        parameter.copy_(weight.add(direction, alpha=-sign * _MOVE / own))
            loss = _losses(model, panel, np.concatenate(groups), layout)
            moved.append(np.split(loss, np.cumsum([len(group) for group in groups])[:-1]))
    finally:
        with torch.no_grad():
            for parameter, weight in zip(parameters, before, strict=True):
                parameter.copy_(weight)
    falls = [(behind - ahead) / (2 * _MOVE) for ahead, behind in zip(*moved, strict=True)]
    return falls if all(np.isfinite(fall).all() for fall in falls) else None


def _gradient(model: nn.Module, panel: Panel, members: np.ndarray, layout: ParallelLayout) -> None:
    """Set each parameter's gradient to that of the mean loss of some samples."""
    stream = panel.stream.select(members)
    tokens = sum(stream.predicted_tokens(step) for step in range(stream.steps))
    for step in range(stream.steps):
        layout.progress.mark()
        batch = stream.batch(step, 0, stream.full_rows(step)).to(layout.device)
        with torch.enable_grad():
            loss = inner_model(model)(batch.model_input(by_sample=False)).loss_sum / tokens
        if isinstance(model, FSDPModule):
            loss.backward()  # averaged over ranks, which all read the same rows
            continue
        # Not backward(): it would call the hooks of DDP, which has seen no forward pass.
        parameters = [parameter for parameter in inner_model(model).parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
    if not isinstance(model, FSDPModule) and layout.expert_ranks > 1:
        for experts in expert_modules(model):
            for parameter in experts.parameters():
                assert parameter.grad is not None
                parameter.grad /= layout.expert_ranks  # they got the same rows from every rank of their group


@torch.no_grad()
def _losses(model: nn.Module, panel: Panel, members: np.ndarray, layout: ParallelLayout) -> np.ndarray:
    """Mean loss per predicted token of some panel samples, nats, float64 [S]."""
    stream = panel.stream.select(members)
    found = np.zeros(len(members))
    with evaluation(model) as transformer:
        for step in range(stream.steps):
            layout.progress.mark()
            batch = stream.batch(step, 0, stream.full_rows(step))
            output = transformer(batch.to(layout.device).model_input(by_sample=False))
            sums, tokens = batch.sum_by_sample(output.loss_BT.double().cpu().numpy())
            there = batch.samples_BS.numpy() >= 0
            found[batch.samples_BS.numpy()[there]] = sums[there] / tokens[there]
    return found
