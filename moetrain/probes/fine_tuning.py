"""Instruction tuning before probing: low-rank adapters (LoRA, 2106.09685) beside a frozen model's projections.

The adapters are peft's, put into our own model in place, so what is probed afterwards is the very model that was tuned.
The loss is that of response tokens alone, the end mark after them included; no balancing loss, as the router is frozen.

Shapes: N tokens of a batch, K response tokens of a batch, D hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
import math
import shutil
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

from moetrain.atomic_io import PARTIAL, write_file
from moetrain.data.instructions import Example
from moetrain.data.tokenizer import Tokenizer
from moetrain.models.loss import cross_entropy
from moetrain.models.transformer import Transformer
from moetrain.probes.requests import Request, batch_hidden_states, make_requests, pack_requests

_LARGEST_GRADIENT = 1.0  # norm, of a step


class FineTuningError(ValueError):
    """A fine-tuning that cannot be done, or that went wrong; one line."""


@dataclass(frozen=True)
class LoraSettings:
    """How a model is tuned: AdamW without weight decay, the learning rate falling linearly to zero.

    Raises:
        FineTuningError: a number out of its range, by name.
    """

    rank: int = 32
    alpha: float = 64.0  # the adapters' product counts alpha / rank times
    dropout: float = 0.1  # of what the adapters read
    modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    learning_rate: float = 5e-5
    epochs: int = 3
    batch_size: int = 8  # examples of a step
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
            raise FineTuningError("modules are none: name at least one, such as q_proj")

    def steps(self, examples: int) -> int:
        """Steps of training on that many examples."""
        return self.epochs * -(-examples // self.batch_size)

    @property
    def keywords(self) -> dict[str, Any]:
        """As peft's ``LoraConfig`` takes them."""
        return {
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "target_modules": list(self.modules),
        }


@dataclass(frozen=True)
class FineTuned:
    """What a fine-tuning did."""

    losses: list[float]  # by step, nats a response token, under dropout
    epochs: int
    parameters: int  # that were trained
    response_tokens: int  # of one epoch

    @property
    def losses_by_epoch(self) -> list[float]:
        """The mean over each epoch's steps."""
        return np.array(self.losses).reshape(self.epochs, -1).mean(1).tolist()


def encode_examples(examples: Sequence[Example], tokenizer: Tokenizer, context_tokens: int) -> list[Request]:
    """Encode examples as probes are encoded, with the end mark after each response, which is learned too.

    Args:
        context_tokens: the longest row that the model is trained on; what is longer is cut from the left.
    """
    requests = make_requests(examples, tokenizer, context_tokens - 1)
    return [replace(each, tokens=np.append(each.tokens, np.int32(tokenizer.end_id))) for each in requests]


def check_adaptable(model: Transformer, settings: LoraSettings) -> None:
    """Raise FineTuningError where `add_adapters` would: a module unknown, adapters already there, peft missing."""
    _import_peft()
    if any(name.endswith("base_layer.weight") for name, _ in model.named_parameters()):
        raise FineTuningError("the model has adapters already: open its checkpoint again")
    known = {name.rpartition(".")[2] for name, each in model.model.named_modules() if isinstance(each, nn.Linear)}
    for name in settings.modules:
        if name not in known:
            raise FineTuningError(f"no module {name!r} to tune: choose of {', '.join(sorted(known))}")


def add_adapters(model: Transformer, settings: LoraSettings) -> Any:
    """Freeze a model and put fresh adapters into it, in place; returns peft's model around it.

    The adapters are a function of the seed. Until they are trained the model computes what it did.

    Raises:
        FineTuningError: as `check_adaptable`.
    """
    check_adaptable(model, settings)
    peft = _import_peft()
    with _seeded(settings.seed, model.lm_head.weight.device):
        return peft.get_peft_model(model, peft.LoraConfig(**settings.keywords))


def fine_tune(
    model: Transformer,
    examples: Sequence[Request],
    settings: LoraSettings,
    padding: int,
    batch_tokens: int,
    tell: Callable[[int, float, int], None] = lambda step, loss, tokens: None,
) -> FineTuned:
    """Train a model's adapters, and leave it in evaluation mode; on CPU to the bit the same for the same seed.

    A step takes ``batch_size`` examples in an order drawn anew each epoch; its loss is the mean over their response
    tokens, whatever number of passes they are read in.

    Args:
        model: from `add_adapters`; all that requires gradients is trained.
        padding: a token id to fill up with.
        batch_tokens: tokens of one forward pass, about.
        tell: told after each step its number, its loss and the tokens it read.

    Raises:
        FineTuningError: the loss is no number any more.
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
            nn.utils.clip_grad_norm_(trained, _LARGEST_GRADIENT)
            optimizer.step()
            optimizer.zero_grad()
            tell(len(losses), losses[-1], sum(each.read for each in members))
    model.eval()
    sizes = sum(parameter.numel() for parameter in trained), sum(_responses(each) for each in examples)
    return FineTuned(losses, settings.epochs, *sizes)


def _batches(examples: int, settings: LoraSettings) -> Iterator[np.ndarray]:
    draw = np.random.default_rng(settings.seed)
    for _ in range(settings.epochs):
        order = draw.permutation(examples)
        yield from (order[start : start + settings.batch_size] for start in range(0, examples, settings.batch_size))


def _backward(model: Transformer, members: Sequence[Request], padding: int, batch_tokens: int) -> float:
    """Add up the gradients of a step; returns its loss, nats a response token."""
    device, count = model.lm_head.weight.device, sum(_responses(each) for each in members)
    loss = 0.0
    for batch in pack_requests(members, padding, batch_tokens):
        moved = batch.to(device)
        hidden_KD = batch_hidden_states(model, moved).index_select(0, moved.scored_K)
        weight_VD = model.lm_head.weight.to(model.dtype)
        loss_sum, _ = cross_entropy(hidden_KD.to(model.dtype), weight_VD, moved.targets_K)
        (loss_sum / count).backward()
        loss += loss_sum.item() / count
    return loss


def _responses(example: Request) -> int:
    return len(example.tokens) - example.first


def save_adapters(adapted: Any, folder: Path) -> None:
    """Write adapters as a folder of peft's form, whole or not at all.

    ``PeftModel.from_pretrained`` loads it onto the exported model as well, since modules are called the same there.

    Raises:
        OSError: the folder is there already, or cannot be written.
    """
    peft = _import_peft()
    refuse_folder(folder)
    config = copy.deepcopy(adapted.peft_config["default"])
    config.inference_mode, config.task_type = True, "CAUSAL_LM"
    weights = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    beside = folder.with_name(folder.name + PARTIAL)
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        content = {name: tensor.cpu().contiguous() for name, tensor in weights.items()}
        write_file(beside / "adapter_model.safetensors", save(content, metadata={"format": "pt"}))
        config.save_pretrained(beside)
        beside.rename(folder)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def refuse_folder(folder: Path) -> None:
    """Raise FileExistsError where there is something to overwrite."""
    if folder.exists():
        raise FileExistsError(f"{folder} exists, and nothing is overwritten: give a new folder")


def _import_peft() -> ModuleType:
    try:
        import peft
    except ImportError as error:
        raise FineTuningError(f"fine-tuning needs peft ({error}): pip install 'moetrain[instruct]'") from None
    return peft


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers by the seed alone; torch's own go on afterwards as if none had been drawn."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
