"""transformers' OLMoE, and its dense model of equal active size, with our training recipe: the baselines of `peers`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moetrain.config import Settings, SettingsError
from moetrain.data.batch import Batch

EXPERTS = ("eager", "grouped_mm", "batched_mm")
ATTENTION = ("sdpa", "eager")
DENSE = "dense"


@dataclass(frozen=True)
class Variant:
    """One configuration of transformers' model."""

    experts: str  # one of EXPERTS, or DENSE
    attention: str
    weights: str  # "float32" (with autocast where we compute in bf16) or "bfloat16" (weights and optimizer state)

    @property
    def name(self) -> str:
        return f"transformers {self.experts}, {self.attention} attention, {self.weights} weights"


def variants(dtype: torch.dtype, dense: bool) -> list[Variant]:
    """All variants for a dtype of computation."""
    weights = ("float32", "bfloat16") if dtype == torch.bfloat16 else ("float32",)
    experts = (DENSE,) if dense else EXPERTS
    return [Variant(e, a, w) for e in experts for a in ATTENTION for w in weights]


class Peer:
    """A model of transformers with its optimizer."""

    def __init__(self, variant: Variant, settings: Settings, vocab_size: int, device: torch.device) -> None:
        self.settings, self.device = settings, device
        self.model = make_model(variant, settings, vocab_size).to(device)
        self.autocast = variant.weights == "float32" and settings.train.precision != "fp32"
        if variant.weights == "bfloat16":
            self.model = self.model.to(torch.bfloat16)
        optim = settings.optim
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=optim.learning_rate,
            betas=(optim.beta1, optim.beta2),
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            fused=True,
        )

    def step(self, batch: Batch) -> float:
        """One training step: forward with all losses, backward, clipping, update; returns the loss."""
        tokens_BT = batch.tokens_BT.to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            loss = self.model(input_ids=tokens_BT, labels=tokens_BT).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.optim.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())


def make_model(variant: Variant, settings: Settings, vocab_size: int) -> nn.Module:
    """A model with our settings' shape and balancing loss, or the dense one of equal active size.

    Raises:
        SettingsError: transformers is not installed.
    """
    try:
        import transformers
    except ImportError as missing:
        raise SettingsError("the comparison needs transformers: pip install 'moetrain[hf]'") from missing
    transformers.logging.set_verbosity_error()
    model = settings.model
    common: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_hidden_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.key_value_heads,
        "max_position_embeddings": settings.data.seq_len,
        "initializer_range": model.initializer_range,
        "rms_norm_eps": model.rms_norm_eps,
        "tie_word_embeddings": model.tie_word_embeddings,
        "use_cache": False,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
        "attn_implementation": variant.attention,
    }
    torch.manual_seed(settings.run.seed)
    if variant.experts == DENSE:
        # Llama's layers with query and key norm, as OLMoE has.
        width = model.num_experts_per_tok * model.intermediate_size
        return transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**common, intermediate_size=width))
    config = transformers.OlmoeConfig(
        **common,
        intermediate_size=model.intermediate_size,
        num_experts=model.num_experts,
        num_experts_per_tok=model.num_experts_per_tok,
        norm_topk_prob=model.norm_topk_prob,
        output_router_logits=True,  # otherwise there is no balancing loss
        router_aux_loss_coef=model.router_aux_loss_coef,
        experts_implementation=variant.experts,
    )
    return transformers.OlmoeForCausalLM(config)


def memory_refusal(variant: Variant, settings: Settings, device: torch.device) -> str | None:
    """Why a variant does not fit into memory, or None: batched_mm keeps a copy of every token's expert weights."""
    if variant.experts != "batched_mm":
        return None
    model = settings.model
    copies = settings.train.batch_rows * settings.data.seq_len * model.num_experts_per_tok
    width = 2 if variant.weights == "bfloat16" else 4
    needed = model.num_hidden_layers * copies * 3 * model.hidden_size * model.intermediate_size * width
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _free_memory()
    if needed < free / 2:
        return None
    return f"would keep about {needed / 2**30:.0f} GiB of copied weights; {free / 2**30:.0f} GiB are free"


def _free_memory() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
