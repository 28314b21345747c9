"""OLMoE's architecture (2409.02060). A forward pass returns the loss per token and the routing per sample as values.

Parameters are named as in transformers' `OlmoeForCausalLM`, so a checkpoint maps onto it name by name.

Shapes: B rows, T tokens per row, N = B * T tokens, D hidden size, H query heads, G key and value heads, d head width,
h = d / 2, L layers, E experts, S samples per row (padded), R = 2S halves of samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from moetrain.config import ModelSettings
from moetrain.model_input import PackedTokens
from moetrain.models.attention import Layout, attention, make_layout
from moetrain.models.backends import Backends, choose_backends
from moetrain.models.dense_experts import record_blocks
from moetrain.models.elementwise import rms_norm, rotate, swiglu
from moetrain.models.experts import Backend, experts
from moetrain.models.experts_exchange import exchanged_experts
from moetrain.models.loss import cross_entropy
from moetrain.models.router import Decision, LayerRouting, RecordingMasks, Router


@dataclass(frozen=True)
class Routing:
    """The routing of one forward pass: `moetrain.models.router.LayerRouting`, layers stacked.

    Of a dense model the four that belong to a router have no elements.
    """

    sums_LBRE: Tensor
    counts_LBRE: Tensor
    probs_LE: Tensor
    load_LE: Tensor
    z_L: Tensor
    entropy_L: Tensor
    inputs_LBRD: Tensor

    @classmethod
    def stack(cls, layers: list[LayerRouting]) -> Routing:
        return cls(
            sums_LBRE=torch.stack([layer.sums_BRE for layer in layers]),
            counts_LBRE=torch.stack([layer.counts_BRE for layer in layers]),
            probs_LE=torch.stack([layer.probs_E for layer in layers]),
            load_LE=torch.stack([layer.load_E for layer in layers]),
            z_L=torch.stack([layer.z for layer in layers]),
            entropy_L=torch.stack([layer.entropy for layer in layers]),
            inputs_LBRD=torch.stack([layer.inputs_BRD for layer in layers]),
        )


@dataclass(frozen=True)
class Output:
    """The result of a forward pass."""

    loss_sum: Tensor  # nats, summed over predicted tokens; with gradient
    loss_BT: Tensor  # nats per token, 0 where nothing is predicted; no gradient
    entropy_BT: Tensor | None  # of the prediction, likewise; None where it was not asked for
    routing: Routing | None  # None for a dense model that is not monitored, or in a pass that records no sample


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Linear(nn.Linear):
    """A matmul, without bias, with a weight that is kept in float32 and cast to the input's dtype."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def reset_parameters(self) -> None:
        """Draw nothing: see `moetrain.models.initialization`."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        """Draw nothing: see `moetrain.models.initialization`."""


@dataclass(frozen=True)
class LayerContext:
    """What a forward pass gives to each of its layers."""

    dtype: torch.dtype  # of matmuls
    cos_N1h: Tensor
    sin_N1h: Tensor
    layout: Layout
    masks: RecordingMasks
    backends: Backends


class Attention(nn.Module):
    """Attention with query and key norms, over the full width or each head, and rotary positions, without biases."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        hidden, heads, groups = settings.hidden_size, settings.num_attention_heads, settings.key_value_heads
        self.head_width = settings.head_width
        self.norm_by_head = settings.qk_norm == "head"
        self.q_proj = Linear(hidden, heads * self.head_width)
        self.k_proj = Linear(hidden, groups * self.head_width)
        self.v_proj = Linear(hidden, groups * self.head_width)
        self.o_proj = Linear(heads * self.head_width, hidden)
        self.q_norm = RMSNorm(self.head_width * (1 if self.norm_by_head else heads), settings.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_width * (1 if self.norm_by_head else groups), settings.rms_norm_eps)

    def forward(self, x_ND: Tensor, context: LayerContext) -> Tensor:
        rotary = context.cos_N1h, context.sin_N1h
        q_NHd = rotate(self._normed_heads(self.q_proj(x_ND), self.q_norm), *rotary).to(x_ND.dtype)
        k_NGd = rotate(self._normed_heads(self.k_proj(x_ND), self.k_norm), *rotary).to(x_ND.dtype)
        v_NGd = self._heads(self.v_proj(x_ND))
        return self.o_proj(attention(q_NHd, k_NGd, v_NGd, context.layout, context.backends.attention).flatten(1))

    def _normed_heads(self, x: Tensor, norm: RMSNorm) -> Tensor:
        return norm(self._heads(x)) if self.norm_by_head else self._heads(norm(x))

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(len(x), -1, self.head_width)


class Experts(nn.Module):
    """A layer's routed experts; weights stacked as transformers 5 does.

    Weights that are DTensors when they are read are split over a group of ranks, between which the tokens travel.
    """

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        count, hidden, width = settings.num_experts, settings.hidden_size, settings.intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(count, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(count, hidden, width))

    def forward(self, x_ND: Tensor, decision: Decision, backend: Backend) -> Tensor:
        gate_up, down = self.gate_up_proj, self.down_proj
        if isinstance(gate_up, DTensor) and isinstance(down, DTensor):
            return exchanged_experts(x_ND, decision.index_NK, decision.weight_NK, gate_up, down, backend)
        return experts(x_ND, decision.index_NK, decision.weight_NK, gate_up, down, backend)


class DenseMLP(nn.Module):
    """A SwiGLU layer: that of the dense twin, as wide as a token's experts together, or the shared expert."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_up_proj = Linear(hidden, 2 * width)
        self.down_proj = Linear(width, hidden)

    def units(self, x_ND: Tensor) -> Tensor:
        """The activations of its hidden units, [N, F]."""
        return swiglu(self.gate_up_proj(x_ND))

    def forward(self, x_ND: Tensor) -> Tensor:
        return self.down_proj(self.units(x_ND))


class MoE(nn.Module):
    """Router, routed experts, and the shared expert if there is one."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.gate = Router(settings)
        self.experts = Experts(settings)
        shared = settings.num_shared_experts * settings.intermediate_size
        self.shared_expert = DenseMLP(settings.hidden_size, shared) if shared else None

    def forward(self, x_ND: Tensor, context: LayerContext) -> tuple[Tensor, LayerRouting]:
        decision, routing = self.gate(x_ND, context.masks)
        x_ND = x_ND.to(context.dtype)
        out_ND = self.experts(x_ND, decision, context.backends.experts)
        if self.shared_expert is not None:
            out_ND = out_ND + self.shared_expert(x_ND)
        return out_ND, routing


class Layer(nn.Module):
    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(settings.hidden_size, settings.rms_norm_eps)
        self.self_attn = Attention(settings)
        self.post_attention_layernorm = RMSNorm(settings.hidden_size, settings.rms_norm_eps)
        dense = settings.experts == "dense"
        self.mlp = DenseMLP(settings.hidden_size, settings.dense_width) if dense else MoE(settings)
        self.dense_experts = settings.dense_experts if dense else 0

    def forward(self, x_ND: Tensor, context: LayerContext) -> tuple[Tensor, LayerRouting | None]:
        """The residual stream, float32, after this layer, and the layer's routing."""
        x_ND = x_ND + self.self_attn(self.input_layernorm(x_ND).to(context.dtype), context)
        # The router reads the norm's float32 output, not its rounding to bf16.
        normed_ND = self.post_attention_layernorm(x_ND)
        if isinstance(self.mlp, MoE):
            out_ND, routing = self.mlp(normed_ND, context)
            return x_ND + out_ND, routing
        units_NF = self.mlp.units(normed_ND.to(context.dtype))
        routing = None
        if self.dense_experts and context.masks.any_sample:
            down_DF = self.mlp.down_proj.weight.to(context.dtype)
            routing = record_blocks(normed_ND, units_NF, down_DF, self.dense_experts, context.masks)
        return x_ND + self.mlp.down_proj(units_NF), routing


class Decoder(nn.Module):
    """transformers' `model`: embeddings, layers, final norm."""

    def __init__(self, settings: ModelSettings, vocab_size: int) -> None:
        super().__init__()
        self.embed_tokens = Embedding(vocab_size, settings.hidden_size)
        self.layers = nn.ModuleList(Layer(settings) for _ in range(settings.num_hidden_layers))
        self.norm = RMSNorm(settings.hidden_size, settings.rms_norm_eps)


class Transformer(nn.Module):
    """A mixture-of-experts language model (OLMoE, 2409.02060) over packed rows.

    Parameters are float32; matmuls run in ``dtype``; the residual stream, norms and the router stay float32. Weights
    are uninitialized: see `moetrain.models.initialization`.
    """

    def __init__(self, settings: ModelSettings, vocab_size: int, dtype: torch.dtype, recompute: bool = False) -> None:
        super().__init__()
        self.settings = settings
        self.dtype = dtype  # of matmuls
        self.recompute = recompute
        self.model = Decoder(settings, vocab_size)
        self.lm_head = Linear(settings.hidden_size, vocab_size)
        if settings.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @classmethod
    def from_state(
        cls, settings: ModelSettings, vocab_size: int, dtype: torch.dtype, state: Mapping[str, Tensor]
    ) -> Transformer:
        """A model in evaluation mode that uses these tensors as its weights, without a copy.

        Raises:
            ValueError: a weight is missing, unknown or of another shape; names it.
        """
        with torch.device("meta"):
            model = cls(settings, vocab_size, dtype)
        expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        given = {name: tuple(value.shape) for name, value in state.items()}
        for name in sorted(expected.keys() | given.keys()):
            if expected.get(name) != given.get(name):
                found, required = given.get(name, "nothing"), expected.get(name, "nothing")
                raise ValueError(f"{name}: found {found}, but the settings and the vocabulary require {required}")
        model.load_state_dict(state, assign=True)
        if settings.tie_word_embeddings:
            model.lm_head.weight = model.model.embed_tokens.weight
        return model.eval()

    def forward(self, inputs: PackedTokens, record_layer_inputs: bool = False, entropy: bool = False) -> Output:
        """Loss and routing of packed rows.

        Args:
            inputs: with targets.
            record_layer_inputs: whether the routing also holds the inputs of each layer's router, summed per sample.
            entropy: whether the output also holds the entropy of each prediction.
        """
        assert inputs.targets_BT is not None
        hidden_ND, routing = self._hidden_states(inputs, record_layer_inputs)
        targets_BT = inputs.targets_BT
        loss_sum, loss_N, entropy_N = cross_entropy(
            hidden_ND.to(self.dtype), self.lm_head.weight, targets_BT.flatten(), entropy
        )
        return Output(
            loss_sum=loss_sum,
            loss_BT=loss_N.view_as(targets_BT),
            entropy_BT=None if entropy_N is None else entropy_N.view_as(targets_BT),
            routing=routing,
        )

    def hidden_states(self, inputs: PackedTokens, record_layer_inputs: bool = False) -> tuple[Tensor, Routing | None]:
        """Final hidden states after the norm, float32 [N, D], and the routing."""
        return self._hidden_states(inputs, record_layer_inputs)

    def _hidden_states(self, inputs: PackedTokens, record_layer_inputs: bool) -> tuple[torch.Tensor, Routing | None]:
        # `forward` calls this, not `hidden_states`, which gathers the weights of a sharded model as `forward` does.
        device = inputs.tokens_BT.device
        backends = self.backends(device)
        cos_N1h, sin_N1h = self._rotary(inputs.positions_BT.flatten())
        context = LayerContext(
            dtype=self.dtype,
            cos_N1h=cos_N1h,
            sin_N1h=sin_N1h,
            layout=make_layout(inputs.spans_N2, backends.attention, device, longest=inputs.tokens_BT.shape[1]),
            masks=RecordingMasks.make(inputs, record_layer_inputs),
            backends=backends,
        )
        x_ND = F.embedding(inputs.tokens_BT.flatten(), self.model.embed_tokens.weight).float()
        layers: list[LayerRouting] = []
        for layer in self.model.layers:
            if self.recompute and torch.is_grad_enabled():
                x_ND, routing = checkpoint(layer, x_ND, context, use_reentrant=False, preserve_rng_state=False)
            else:
                x_ND, routing = layer(x_ND, context)
            if routing is not None:
                layers.append(routing)
        return self.model.norm(x_ND), Routing.stack(layers) if layers else None

    def compile_layers(self, **options: Any) -> None:
        """Compile each layer with torch.compile at its first call, without renaming parameters.

        Layers differ only in their weights, so all share the compiled code. On CUDA a layer is one graph with
        `grouped_mm` and `varlen`. Other backends break it: `moetrain.models.compilation`.
        """
        for layer in self.model.layers:
            # Not `layer.compile`, which also traces the hooks that gather sharded weights, and breaks the graph there.
            layer.forward = torch.compile(layer.forward, **options)

    def backends(self, device: torch.device) -> Backends:
        """The backends of attention and the experts on a device.

        Raises:
            SettingsError: a backend that the settings name does not work there.
        """
        return choose_backends(self.settings, device, self.dtype)

    def _rotary(self, positions_N: Tensor) -> tuple[Tensor, Tensor]:
        width = self.settings.head_width
        exponents = torch.arange(0, width, 2, device=positions_N.device, dtype=torch.float32) / width
        angles_N1h = (positions_N[:, None].float() / self.settings.rope_theta**exponents)[:, None, :]
        return angles_N1h.cos(), angles_N1h.sin()

    def router_weights(self) -> list[Tensor]:
        """The weight [E, D] of each layer's router, float32; none for the dense twin."""
        return [layer.mlp.gate.weight for layer in self.model.layers if isinstance(layer.mlp, MoE)]

    def flops_per_token(self) -> int:
        """FLOPs of training per token: 6 for each active parameter of a matmul (2001.08361).

        These are all but the input embeddings. Attention's matmuls with keys and values are not counted.
        """
        _, active = self.parameter_counts()
        tied = self.settings.tie_word_embeddings
        return 6 * (active if tied else active - self.model.embed_tokens.weight.numel())

    def parameter_counts(self) -> tuple[int, int]:
        """All parameters, and those active for one token, embeddings included."""
        total = sum(p.numel() for p in self.parameters())
        routed = sum(p.numel() for m in self.modules() if isinstance(m, Experts) for p in m.parameters())
        inactive_share = 1 - self.settings.num_experts_per_tok / self.settings.num_experts
        return total, round(total - routed * inactive_share)
