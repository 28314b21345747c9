"""Instruction tuning before probing: low-rank adapters (LoRA, arXiv 2106.09685) on the projections of a frozen model.

The adapters are peft's, added to our own model in place, so the model that is probed afterwards is the tuned one. The
loss is taken over response tokens and the end mark after them. There is no balancing loss: the router is frozen.

Shapes: K response tokens of a batch, D hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import nn

from moetrain.atomic_io import new_folder, write_file
from moetrain.data.instructions import Example
from moetrain.data.tokenizer import Tokenizer
from moetrain.models.loss import cross_entropy
from moetrain.models.transformer import Transformer
from moetrain.probes.requests import Request, make_requests, pack_requests, scored_hidden_states

_MAX_GRAD_NORM = 1.0


class FineTuningError(ValueError):
    """Fine-tuning is not possible, or its loss diverged; one line."""


@dataclass(frozen=True)
class LoraSettings:
    """Settings of the adapters and their training: AdamW without weight decay, learning rate falling linearly to 0.

    Raises:
        FineTuningError: a number out of its range.
    """

    rank: int = 32
    alpha: float = 64.0  # the adapters' output is scaled by alpha / rank
    dropout: float = 0.1  # on the adapters' input
    modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    learning_rate: float = 5e-5
    epochs: int = 3
    batch_size: int = 8  # examples per step
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rank", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise FineTuningError(f"{name} is {getattr(self, name)}: give 1 or more")
        for name in ("alpha", "learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise FineTuningError(f"{name} is {getattr(self, name)}: give a number above 0")
        if not 0 <= self.dropout < 1:
            raise FineTuningError(f"dropout is {self.dropout}: give a number from 0 to below 1")
        if not self.modules:
            raise FineTuningError("modules is empty: name at least one, such as q_proj")

    def steps(self, examples: int) -> int:
        """Number of training steps for that many examples."""
        return self.epochs * -(-examples // self.batch_size)


@dataclass(frozen=True)
class FineTuned:
    """The result of fine-tuning."""

    losses: list[float]  # of each step, nats per response token, with dropout
    epochs: int
    parameters: int  # trained
    response_tokens: int  # of one epoch

    @property
    def losses_by_epoch(self) -> list[float]:
        """Mean loss over the steps of each epoch."""
        return np.array(self.losses).reshape(self.epochs, -1).mean(1).tolist()


def encode_examples(examples: Sequence[Example], tokenizer: Tokenizer, context_tokens: int) -> list[Request]:
    """Encode examples as probes are encoded, with the end mark after each response as one more token to learn.

    Args:
        context_tokens: the longest sample that the model is trained on. Longer examples are cut from the left.
    """
    requests = make_requests(examples, tokenizer, context_tokens - 1)
    return [replace(each, tokens=np.append(each.tokens, np.int32(tokenizer.end_id))) for each in requests]


def check_adaptable(model: Transformer, settings: LoraSettings) -> None:
    """Raise FineTuningError if peft is missing, the model has adapters already, or it lacks one of the modules."""
    _import_peft()
    if any(name.endswith("base_layer.weight") for name, _ in model.named_parameters()):
        raise FineTuningError("the model has adapters already: open its checkpoint again")
    known = {name.rpartition(".")[2] for name, each in model.model.named_modules() if isinstance(each, nn.Linear)}
    for name in settings.modules:
        if name not in known:
            raise FineTuningError(f"no module {name!r} to tune: choose of {', '.join(sorted(known))}")


def add_adapters(model: Transformer, settings: LoraSettings) -> Any:
    """Freeze a model and add new adapters to it, in place; returns peft's wrapper of the model.

    The adapters are determined by the seed. Until they are trained they do not change the model's output.

    Raises:
        FineTuningError: as `check_adaptable`.
    """
    check_adaptable(model, settings)
    peft = _import_peft()
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(settings.modules),
    )
    with _seeded(settings.seed, model.lm_head.weight.device):
        return peft.get_peft_model(model, config)


def fine_tune(
    model: Transformer,
    examples: Sequence[Request],
    settings: LoraSettings,
    padding: int,
    batch_tokens: int,
    on_step: Callable[[int, float, int], None] = lambda step, loss, tokens: None,
) -> FineTuned:
    """Train a model's adapters and leave it in evaluation mode. On CPU, equal seeds give equal bits.

    Each step takes ``batch_size`` examples, in an order drawn anew each epoch. Its loss is the mean over their response
    tokens, whatever the number of forward passes.

    Args:
        model: from `add_adapters`; all parameters that require gradients are trained.
        padding: a token id for padding.
        batch_tokens: approximate tokens of one forward pass.
        on_step: called after each step with its number, its loss and the tokens it read.

    Raises:
        FineTuningError: the loss is not finite.
    """
    device = model.lm_head.weight.device
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=0.0)
    steps = settings.steps(len(examples))
    losses: list[float] = []
    model.train()
    with _seeded(settings.seed, device):
        for chosen in _batches(len(examples), settings):
            optimizer.param_groups[0]["lr"] = settings.learning_rate * (1 - len(losses) / steps)
            members = [examples[number] for number in chosen]
            losses.append(_backward(model, members, padding, batch_tokens))
            if not math.isfinite(losses[-1]):
                raise FineTuningError(f"the loss of step {len(losses)} is {losses[-1]}: lower the learning rate")
            nn.utils.clip_grad_norm_(trained, _MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad()
            on_step(len(losses), losses[-1], sum(each.read for each in members))
    model.eval()
    return FineTuned(
        losses,
        settings.epochs,
        parameters=sum(parameter.numel() for parameter in trained),
        response_tokens=sum(each.scored for each in examples),
    )


def _batches(examples: int, settings: LoraSettings) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(settings.seed)
    for _ in range(settings.epochs):
        order = rng.permutation(examples)
        yield from (order[start : start + settings.batch_size] for start in range(0, examples, settings.batch_size))


def _backward(model: Transformer, members: Sequence[Request], padding: int, batch_tokens: int) -> float:
    """Accumulate the gradients of a step; returns its loss in nats per response token."""
    device, count = model.lm_head.weight.device, sum(each.scored for each in members)
    loss = 0.0
    for batch in pack_requests(members, padding, batch_tokens):
        moved = batch.to(device)
        hidden_KD = scored_hidden_states(model, moved).to(model.dtype)
        loss_sum, *_ = cross_entropy(hidden_KD, model.lm_head.weight.to(model.dtype), moved.targets_K)
        (loss_sum / count).backward()
        loss += loss_sum.item() / count
    return loss


def save_adapters(adapted: Any, folder: Path) -> None:
    """Write adapters atomically, as a folder in peft's format.

    ``PeftModel.from_pretrained`` also loads it onto the exported model, whose modules have the same names.

    Raises:
        OSError: the folder exists already, or cannot be written.
    """
    peft = _import_peft()
    config = copy.deepcopy(adapted.peft_config["default"])
    config.inference_mode, config.task_type = True, "CAUSAL_LM"
    weights = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    content = {name: tensor.cpu().contiguous() for name, tensor in weights.items()}
    with new_folder(folder) as partial:
        write_file(partial / "adapter_model.safetensors", save(content, metadata={"format": "pt"}))
        config.save_pretrained(partial)


def _import_peft() -> ModuleType:
    try:
        import peft
    except ImportError as error:
        raise FineTuningError(f"fine-tuning needs peft ({error}): pip install 'moetrain[instruct]'") from None
    return peft


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's generators inside the block, and restore them after it."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
