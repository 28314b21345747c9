"""The router: the experts each token is sent to, and the routing statistics of each sample, returned as values.

Nothing is recorded by side effect: recomputing a layer cannot count twice, and an evaluation cannot leak into training
statistics.

Shapes: N tokens (B rows of T), D hidden size, E experts, K experts per token, S samples per row (padded), R = 2S
halves of samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moetrain.config import ModelSettings
from moetrain.model_input import PackedTokens

RecordedWeights = Literal["softmax", "top_k"]


class Decision(NamedTuple):
    """The experts of each token and their routing weights."""

    index_NK: Tensor  # int64
    weight_NK: Tensor  # float32


class LayerRouting(NamedTuple):
    """Routing statistics of one layer, float32. A sample's halves are its even and its odd recorded tokens.

    Of a dense model (`moetrain.models.dense_experts`) probabilities are shares of activation, and the statistics of all
    real tokens are empty.

    A NamedTuple, which is a pytree: `fully_shard` looks for tensors with gradients in the pytree of a module's outputs.
    """

    sums_BRE: Tensor  # routing weights summed over each half of a sample, see `record_weights`; no gradient
    counts_BRE: Tensor  # tokens of each half sent to each expert; no gradient
    probs_E: Tensor  # probabilities summed over all real tokens; with gradient, for the balancing loss
    load_E: Tensor  # real tokens sent to each expert; no gradient
    z: Tensor  # squared logsumexp of the logits, summed over all real tokens; with gradient, for the z loss
    entropy: Tensor  # entropy of the probabilities in nats, summed over all real tokens; no gradient
    inputs_BRD: Tensor  # the router's inputs summed over each half, or empty; no gradient


@dataclass(frozen=True)
class RecordingMasks:
    """The tokens that each statistic counts, float32; built once for all layers of a micro-batch."""

    real_N: Tensor  # 1 for tokens of samples, begin and end marks included; 0 for padding
    halves_BRT: Tensor  # 1 where a token is recorded for half r (sample r // 2, parity r % 2) of its row
    layer_inputs: bool = False  # whether `LayerRouting.inputs_BRD` is computed

    @classmethod
    def make(cls, inputs: PackedTokens, layer_inputs: bool = False) -> RecordingMasks:
        halves = torch.arange(2 * inputs.slots_per_row, device=inputs.recorded_BT.device)
        return cls(
            real_N=(inputs.slots_BT >= 0).flatten().float(),
            halves_BRT=(inputs.recorded_BT[:, None, :] == halves[None, :, None]).float(),
            layer_inputs=layer_inputs,
        )

    @property
    def any_sample(self) -> bool:
        """Whether the pass sums anything per sample."""
        return self.halves_BRT.shape[1] > 0

    def sum_halves(self, x_NX: Tensor) -> Tensor:
        """Sums of a quantity of each token over the halves of samples, [B, R, X].

        One batched matmul: deterministic, which index_add is not on CUDA.
        """
        rows, _, row_length = self.halves_BRT.shape
        return torch.bmm(self.halves_BRT, x_NX.view(rows, row_length, -1))


class Router(nn.Module):
    """Softmax over all experts in float32, then the top k (transformers' OLMoE, `gate`)."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(settings.num_experts, settings.hidden_size))
        self.num_experts_per_tok = settings.num_experts_per_tok
        self.norm_topk_prob = settings.norm_topk_prob
        self.recorded: RecordedWeights = "softmax"
        # Loss-free balancing (DeepSeek-V3, 2412.19437): added for the selection only, not to the routing weights.
        bias = torch.zeros(settings.num_experts) if settings.balancing == "bias" else None
        self.selection_bias: Tensor | None
        self.register_buffer("selection_bias", bias)

    def forward(self, x_ND: Tensor, masks: RecordingMasks) -> tuple[Decision, LayerRouting]:
        logits_NE = F.linear(x_ND.float(), self.weight.float())
        log_sum_N = logits_NE.logsumexp(-1)
        probs_NE = (logits_NE - log_sum_N[:, None]).exp()
        with torch.no_grad():
            scores_NE = probs_NE if self.selection_bias is None else probs_NE + self.selection_bias
            index_NK = scores_NE.topk(self.num_experts_per_tok, dim=-1).indices
        weight_NK = probs_NE.gather(1, index_NK)
        if self.norm_topk_prob:
            weight_NK = weight_NK / weight_NK.sum(-1, keepdim=True)
        routing = self._record(x_ND, logits_NE, log_sum_N, probs_NE, index_NK, masks)
        return Decision(index_NK=index_NK, weight_NK=weight_NK), routing

    def _record(
        self,
        x_ND: Tensor,
        logits_NE: Tensor,
        log_sum_N: Tensor,
        probs_NE: Tensor,
        index_NK: Tensor,
        masks: RecordingMasks,
    ) -> LayerRouting:
        with torch.no_grad():
            sent_NE = torch.zeros_like(probs_NE).scatter_(1, index_NK, 1.0)
            # The entropy of a softmax is its logsumexp minus the expected logit.
            entropy_N = log_sum_N - (probs_NE * logits_NE).sum(-1)
            recorded_NE = probs_NE
            if self.recorded == "top_k":
                recorded_NE = probs_NE * sent_NE
                recorded_NE = recorded_NE / recorded_NE.sum(-1, keepdim=True)
            sums_BRE, counts_BRE = masks.sum_halves(torch.cat([recorded_NE, sent_NE], dim=1)).chunk(2, dim=-1)
            inputs_BRD = masks.sum_halves(x_ND.float()) if masks.layer_inputs else logits_NE.new_zeros(0)
        return LayerRouting(
            sums_BRE=sums_BRE,
            counts_BRE=counts_BRE,
            probs_E=masks.real_N @ probs_NE,
            load_E=masks.real_N @ sent_NE,
            z=masks.real_N @ log_sum_N.square(),
            entropy=masks.real_N @ entropy_N,
            inputs_BRD=inputs_BRD,
        )


def record_weights(model: nn.Module, recorded: RecordedWeights) -> None:
    """Choose which routing weights a model records of its samples; what it computes does not change.

    Args:
        model: whose routers record.
        recorded: ``softmax``, the probabilities of all experts, or ``top_k``, those of the experts that a token is sent
            to, divided by their sum.
    """
    for module in model.modules():
        if isinstance(module, Router):
            module.recorded = recorded
