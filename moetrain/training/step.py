"""One training step: forward and backward over its micro-batches, then the update.

Shapes: B rows, T tokens, D domains, L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from moetrain.config import Settings
from moetrain.data.batch import Batch
from moetrain.data.prefetch import BatchReader
from moetrain.data.stream import Stream
from moetrain.distributed.expert_parallel import reduce_expert_gradients
from moetrain.distributed.mesh import ParallelLayout
from moetrain.distributed.sharding import accumulate
from moetrain.models.transformer import Output
from moetrain.optim.builder import Optimizer
from moetrain.training.balancing import Balancing

ENTROPY_EVERY = 4
"""Steps from one whose predictions' entropy is computed, at the cost of a pass over the logits, to the next."""


@dataclass(frozen=True)
class StepStatistics:
    """Sums over a step, over all ranks. On the model's device: the host has to synchronize to read one."""

    loss_D: torch.Tensor  # nats, float64
    tokens_D: torch.Tensor  # predicted tokens, float64
    balance: torch.Tensor  # the balancing loss of the step's own load
    z: torch.Tensor  # mean squared logsumexp of router logits
    load_LE: torch.Tensor  # tokens sent to each expert, float64
    entropy_L: torch.Tensor  # mean entropy of router probabilities, nats

    @property
    def loss(self) -> torch.Tensor:
        """Mean loss per predicted token, nats."""
        return self.loss_D.sum() / self.tokens_D.sum()


def forward_backward(
    layout: ParallelLayout,
    model: nn.Module,
    stream: Stream,
    step: int,
    balancing: Balancing,
    settings: Settings,
    record: Callable[[Batch, Output], None],
    reader: BatchReader | None = None,
) -> StepStatistics:
    """Gradients and statistics of step ``step`` (0 the first), of which this rank reads its own rows.

    Losses are divided by the token counts of the whole step, over all ranks and micro-batches, so that the split of a
    step changes only rounding (and, with ``balance_scope: micro_batch``, the load that is balanced).

    Args:
        record: called with each micro-batch and the model's output for it.
        reader: reads the micro-batches ahead; None: they are read when needed.
    """
    first, share, micro = step_rows(layout, settings)
    predicted, real = stream.predicted_tokens(step), stream.real_tokens(step)
    entropy = settings.monitor.enabled and step % ENTROPY_EVERY == 0
    sums: list[torch.Tensor] = []
    layout.progress.step = step + 1
    for start in range(first, first + share, micro):
        layout.progress.mark()
        batch = reader.batch(step, start, micro) if reader else stream.batch(step, start, micro).to(layout.device)
        layout.progress.mark()
        with accumulate(model, last=start + micro == first + share):
            output: Output = model(batch.model_input(settings.watches_routing), entropy=entropy)
            loss = part_of_loss(output, balancing, settings, predicted, real)
            # Gradients are averaged over ranks; this loss is already divided by the tokens of all ranks.
            (loss * layout.world_size).backward()
        sums.append(_flat_sums(batch, output, len(settings.data.domains)))
        record(batch, output)
    reduce_expert_gradients(model, layout)
    total = layout.all_reduce_sum(torch.stack(sums).sum(0))
    return _statistics(total, settings, balancing, real)


def step_rows(layout: ParallelLayout, settings: Settings) -> tuple[int, int, int]:
    """This rank's rows of a step, (first, count), and the rows of a micro-batch."""
    first, share = layout.row_range(settings.train.batch_rows)
    return first, share, settings.train.micro_batch_rows or share


def part_of_loss(output: Output, balancing: Balancing, settings: Settings, predicted: int, real: int) -> torch.Tensor:
    """A micro-batch's part of the step's loss, including the router's losses.

    Args:
        predicted, real: predicted tokens and tokens of the whole step.
    """
    loss = output.loss_sum / predicted
    if output.routing is None or not output.routing.z_L.numel():
        return loss  # a dense model
    model = settings.model
    loss = loss + model.router_z_loss_coef * output.routing.z_L.mean() / real
    if model.balancing == "aux":
        loss = loss + model.router_aux_loss_coef * balancing.loss(output.routing, real)
    return loss


def _flat_sums(batch: Batch, output: Output, domains: int) -> torch.Tensor:
    """All that a step sums over micro-batches and ranks in one float64 vector, so that one collective does."""
    numbers = torch.arange(domains, device=batch.domains_BT.device)
    member_DN = (batch.domains_BT.flatten() == numbers[:, None]).double()
    parts = [member_DN @ output.loss_BT.flatten().double(), member_DN.sum(-1)]
    if output.routing is not None:
        routing = output.routing
        parts += [
            x.detach().double().flatten() for x in (routing.z_L, routing.entropy_L, routing.load_LE, routing.probs_LE)
        ]
    return torch.cat(parts)


def _statistics(total: torch.Tensor, settings: Settings, balancing: Balancing, real: int) -> StepStatistics:
    domains = len(settings.data.domains)
    layers, experts = balancing.share_LE.shape
    loss_D, tokens_D, z_L, entropy_L, load, probs = total.split(
        [domains, domains, layers, layers, layers * experts, layers * experts]
    )
    load_LE, probs_LE = load.view(layers, experts), probs.view(layers, experts)
    balance = balancing.value(load_LE / load_LE.sum(-1, keepdim=True), probs_LE, real)
    return StepStatistics(loss_D, tokens_D, balance, z_L.mean() / real, load_LE, entropy_L / real)


@torch.no_grad()
def update(
    layout: ParallelLayout,
    model: nn.Module,
    optimizer: Optimizer,
    learning_rate: float,
    largest_norm: float,
    loss: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clip the gradients, apply the update and drop the gradients.

    Where the loss or the gradient is not finite, the update is skipped. That is decided on the device, inside the
    optimizer's step: the host would have to wait for the whole training step to decide.

    Returns:
        The gradient's norm before clipping, 0 where the update was skipped, and whether it was applied; both [] on the
        device.
    """
    norm = layout.clip_gradients(model.parameters(), largest_norm)
    applied = norm.isfinite() & loss.isfinite()
    optimizer.found_inf = (~applied).float()
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    layout.progress.finish_step()
    return torch.where(applied, norm, 0.0), applied
