"""OLMoE's architecture under transformers' names, returning loss by token and routing by sample as values.

Parameters are named as in transformers' `OlmoeForCausalLM`, so a checkpoint maps onto it name by name.

Shapes: B rows, T tokens a row, N = B * T tokens, D hidden size, H query heads, G key and value heads, d head width,
L layers, E experts, S samples a row (padded), R = 2S halves of samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from moetrain.config import ModelSettings
from moetrain.model_input import PackedTokens
from moetrain.models import attention as attention_backends
from moetrain.models import experts as expert_backends
from moetrain.models.attention import Layout, attention, make_layout
from moetrain.models.backends import Backends, call_uncompiled, choose_backends
from moetrain.models.elementwise import rms_norm, rotate, swiglu
from moetrain.models.experts import experts
from moetrain.models.loss import cross_entropy
from moetrain.models.router import LayerRouting, RecordingMasks, Router


@dataclass(frozen=True)
class Routing:
    """The routing of one forward pass, layers stacked; see `moetrain.models.router.LayerRouting`. Float32."""

    sums_LBRE: torch.Tensor
    counts_LBRE: torch.Tensor
    probs_LE: torch.Tensor
    load_LE: torch.Tensor
    z_L: torch.Tensor
    entropy_L: torch.Tensor
    inputs_LBRD: torch.Tensor

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
    """What a forward pass gives. ``routing`` is None for the dense twin, which has no router."""

    loss_sum: torch.Tensor  # nats summed over predicted tokens; carries the gradient
    loss_BT: torch.Tensor  # nats by token, 0 where nothing is predicted; no gradient
    routing: Routing | None


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)


class Linear(nn.Linear):
    """A product with a weight that is kept in float32 and cast to the type of its input when used."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def reset_parameters(self) -> None:
        """Draw nothing: see `moetrain.models.initialization`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Embedding(nn.Embedding):
    """Input embeddings."""

    def reset_parameters(self) -> None:
        """Draw nothing: see `moetrain.models.initialization`."""


class Attention(nn.Module):
    """Query and key norms over the full width, rotary positions, no biases."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        hidden, self.heads, self.groups = (
            settings.hidden_size,
            settings.num_attention_heads,
            settings.key_value_heads,
        )
        self.width = hidden // self.heads
        self.q_proj = Linear(hidden, self.heads * self.width)
        self.k_proj = Linear(hidden, self.groups * self.width)
        self.v_proj = Linear(hidden, self.groups * self.width)
        self.o_proj = Linear(self.heads * self.width, hidden)
        self.q_norm = RMSNorm(self.heads * self.width, settings.rms_norm_eps)
        self.k_norm = RMSNorm(self.groups * self.width, settings.rms_norm_eps)

    def forward(
        self,
        x_ND: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        layout: Layout,
        backend: attention_backends.Backend,
    ) -> torch.Tensor:
        q_NHd = rotate(self.q_norm(self.q_proj(x_ND)).view(-1, self.heads, self.width), *rotary).to(x_ND.dtype)
        k_NGd = rotate(self.k_norm(self.k_proj(x_ND)).view(-1, self.groups, self.width), *rotary).to(x_ND.dtype)
        v_NGd = self.v_proj(x_ND).view(-1, self.groups, self.width)
        return self.o_proj(attention(q_NHd, k_NGd, v_NGd, layout, backend).flatten(1))


class Experts(nn.Module):
    """Weights of all routed experts of a layer, in transformers' stacked form."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        count, hidden, width = settings.num_experts, settings.hidden_size, settings.intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(count, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(count, hidden, width))


class DenseMLP(nn.Module):
    """A SwiGLU layer: the dense twin's, of the width a token's experts have together, and the shared expert's."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_up_proj = Linear(hidden, 2 * width)
        self.down_proj = Linear(width, hidden)

    def forward(self, x_ND: torch.Tensor) -> torch.Tensor:
        return self.down_proj(swiglu(self.gate_up_proj(x_ND)))


class MoE(nn.Module):
    """Router, routed experts, and the shared expert where there is one."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.gate = Router(
            settings.hidden_size,
            settings.num_experts,
            settings.num_experts_per_tok,
            settings.norm_topk_prob,
            selection_bias=settings.balancing == "bias",
        )
        self.experts = Experts(settings)
        shared = settings.num_shared_experts * settings.intermediate_size
        self.shared_expert = DenseMLP(settings.hidden_size, shared) if shared else None

    def forward(
        self, x_ND: torch.Tensor, dtype: torch.dtype, masks: RecordingMasks, backend: expert_backends.Backend
    ) -> tuple[torch.Tensor, LayerRouting]:
        decision, routing = self.gate(x_ND, masks)
        x_ND = x_ND.to(dtype)
        gate_up, down = self.experts.gate_up_proj, self.experts.down_proj
        out_ND = experts(x_ND, decision.index_NK, decision.weight_NK, gate_up, down, backend)
        if self.shared_expert is not None:
            out_ND = out_ND + self.shared_expert(x_ND)
        return out_ND, routing


class Layer(nn.Module):
    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(settings.hidden_size, settings.rms_norm_eps)
        self.self_attn = Attention(settings)
        self.post_attention_layernorm = RMSNorm(settings.hidden_size, settings.rms_norm_eps)
        width = (settings.num_experts_per_tok + settings.num_shared_experts) * settings.intermediate_size
        self.mlp = DenseMLP(settings.hidden_size, width) if settings.experts == "dense" else MoE(settings)

    def forward(
        self,
        x_ND: torch.Tensor,
        dtype: torch.dtype,
        rotary: tuple[torch.Tensor, torch.Tensor],
        layout: Layout,
        masks: RecordingMasks,
        backends: Backends,
    ) -> tuple[torch.Tensor, LayerRouting | None]:
        """The residual stream, float32, after this layer, and how its router decided."""
        attended_ND = self.self_attn(self.input_layernorm(x_ND).to(dtype), rotary, layout, backends.attention)
        x_ND = x_ND + attended_ND
        # The router reads the norm's float32 output, not its rounding to bf16.
        normed_ND = self.post_attention_layernorm(x_ND)
        if isinstance(self.mlp, MoE):
            out_ND, routing = self.mlp(normed_ND, dtype, masks, backends.experts)
            return x_ND + out_ND, routing
        return x_ND + self.mlp(normed_ND.to(dtype)), None


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
        self.dtype = dtype
        self.recompute = recompute
        self.model = Decoder(settings, vocab_size)
        self.lm_head = Linear(settings.hidden_size, vocab_size)
        if settings.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @classmethod
    def from_state(
        cls, settings: ModelSettings, vocab_size: int, dtype: torch.dtype, state: Mapping[str, torch.Tensor]
    ) -> Transformer:
        """The model that has these weights, which it takes over as they are, in evaluation mode.

        Raises:
            ValueError: a weight that is missing, unknown or of another shape, by name.
        """
        with torch.device("meta"):
            model = cls(settings, vocab_size, dtype)
        expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        given = {name: tuple(value.shape) for name, value in state.items()}
        for name in sorted(expected.keys() | given.keys()):
            if expected.get(name) != given.get(name):
                shapes = [shape if shape is not None else "absent" for shape in (given.get(name), expected.get(name))]
                raise ValueError(f"{name} is {shapes[0]}, settings and vocabulary make it {shapes[1]}")
        model.load_state_dict(state, assign=True)
        if settings.tie_word_embeddings:
            model.lm_head.weight = model.model.embed_tokens.weight
        return model.eval()

    def forward(
        self,
        inputs: PackedTokens,
        record_layer_inputs: bool = False,
    ) -> Output:
        """Loss and routing of packed rows.

        Args:
            inputs: with targets.
            record_layer_inputs: whether the routing also holds the inputs of each layer's router, summed per sample.
        """
        assert inputs.targets_BT is not None
        hidden_ND, routing = self.hidden_states(inputs, record_layer_inputs)
        loss_sum, loss_N = cross_entropy(hidden_ND.to(self.dtype), self.lm_head.weight, inputs.targets_BT.flatten())
        return Output(loss_sum, loss_N.view_as(inputs.targets_BT), routing)

    def hidden_states(
        self, inputs: PackedTokens, record_layer_inputs: bool = False
    ) -> tuple[torch.Tensor, Routing | None]:
        """Final hidden states after the norm, float32 [N, D], and the routing."""
        device = inputs.tokens_BT.device
        backends = self.backends(device)
        layout = make_layout(inputs.spans_N2, backends.attention, device, longest=inputs.tokens_BT.shape[1])
        masks = RecordingMasks.make(inputs, record_layer_inputs)
        rotary = self._rotary(inputs.positions_BT.flatten())
        x_ND = F.embedding(inputs.tokens_BT.flatten(), self.model.embed_tokens.weight).float()
        layers: list[LayerRouting] = []
        for layer in self.model.layers:
            if self.recompute and torch.is_grad_enabled():
                x_ND, routing = checkpoint(
                    layer,
                    x_ND,
                    self.dtype,
                    rotary,
                    layout,
                    masks,
                    backends,
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
            else:
                x_ND, routing = layer(x_ND, self.dtype, rotary, layout, masks, backends)
            if routing is not None:
                layers.append(routing)
        return self.model.norm(x_ND), Routing.stack(layers) if layers else None

    def compile_layers(self, **options: Any) -> None:
        """Have torch.compile take each layer when it is first called; names of parameters stay as they are.

        Layers differ in their weights alone, so what is compiled for one serves all. On CUDA a layer is one graph with
        `grouped_mm` and `varlen`; other backends' kernels are called between graphs.
        """
        call_uncompiled()
        for layer in self.model.layers:
            layer.compile(**options)

    def backends(self, device: torch.device) -> Backends:
        """How experts and attention are computed on a device.

        Raises:
            SettingsError: a backend that is named by the settings does not work there.
        """
        return choose_backends(self.settings, device, self.dtype)

    def _rotary(self, positions_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        width = self.settings.hidden_size // self.settings.num_attention_heads
        exponents = torch.arange(0, width, 2, device=positions_N.device, dtype=torch.float32) / width
        angles_N1h = (positions_N[:, None].float() / self.settings.rope_theta**exponents)[:, None, :]
        return angles_N1h.cos(), angles_N1h.sin()

    def operations_a_token(self) -> int:
        """Floating-point operations of training on a token: 6 for each active parameter that takes part in products.

        Those are all but the input embeddings, which are looked up (2001.08361). Attention's products with keys and
        values, which no parameter counts, are not among them.
        """
        _, active = self.parameter_counts()
        tied = self.settings.tie_word_embeddings
        return 6 * (active if tied else active - self.model.embed_tokens.weight.numel())

    def parameter_counts(self) -> tuple[int, int]:
        """(all, active for one token) parameters; embeddings count as active."""
        every = sum(p.numel() for p in self.parameters())
        routed = sum(
            p.numel()
            for layer in self.model.layers
            if isinstance(layer.mlp, MoE)
            for p in layer.mlp.experts.parameters()
        )
        idle = 1 - self.settings.num_experts_per_tok / self.settings.num_experts
        return every, round(every - routed * idle)
