"""megablocks' dropless experts, given our router's decision and our weights as they lie.

Its `ParallelDroplessMLP` sorts tokens by expert, and gathers and scatters them in kernels of its own. The products
between, grouped_gemm's, are called from here: megablocks' own gated MLP wants three matrices [E * F, D], so that of
ours one would be split and one transposed at every call (measured on CPU, forward and backward: a transposing cast
takes 18 times a plain one). Called from here they take the checkpoint's layout: nothing is converted or held twice.

megablocks 0.10.0 and grouped-gemm 0.3.0, which compute in bfloat16 on CUDA only (`docker/install_kernels.sh`). They are
imported when first used. The host waits for the device once a layer: grouped_gemm wants the experts' loads on the host.
megablocks' losses are off: they are gathered in a global list that recomputing a layer would fill twice.

Shapes: N tokens, D hidden size, E experts, K experts a token, F width of an expert, M rows sent to experts.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from moetrain.models.elementwise import swiglu


def megablocks_experts(
    x_ND: torch.Tensor,
    index_NK: torch.Tensor,
    weight_NK: torch.Tensor,
    gate_up_E2FD: torch.Tensor,
    down_EDF: torch.Tensor,
) -> torch.Tensor:
    """Each token's experts' outputs, summed by its routing weights, [N, D] in the type of x.

    Raises:
        ImportError: megablocks or grouped_gemm is not installed, or not for this torch.
    """
    num_experts, hidden_size, _ = down_EDF.shape
    module = _module(hidden_size, num_experts, index_NK.shape[1])
    weights = {"mlp.gate_up": gate_up_E2FD.contiguous(), "mlp.down": down_EDF.contiguous()}
    # The scores, its second argument, serve its own loss alone.
    return functional_call(module, weights, (x_ND.contiguous(), weight_NK, weight_NK, index_NK))


@functools.cache
def _module(hidden_size: int, num_experts: int, num_experts_per_tok: int) -> nn.Module:
    """megablocks' module of one shape, without weights: it stands on the meta device and is lent ours at each call."""
    from megablocks.layers.arguments import Arguments
    from megablocks.layers.dmoe import ParallelDroplessMLP

    arguments = Arguments(
        hidden_size=hidden_size,
        ffn_hidden_size=128,  # of its own MLP, which is replaced below; it does not take less
        moe_num_experts=num_experts,
        moe_top_k=num_experts_per_tok,
        mlp_type="glu",
        mlp_impl="grouped",  # its sparse one gives wrong results with triton 3.2 and newer
        activation_fn=F.silu,
        bias=False,
        return_bias=False,
        fp16=False,
        bf16=True,
        device=torch.device("meta"),
        moe_loss_weight=0.0,
        moe_zloss_weight=0.0,
    )
    module = ParallelDroplessMLP(arguments)
    module.mlp = _GroupedSwiGLU()
    return module


class _GroupedSwiGLU(nn.Module):
    """SwiGLU experts on rows sorted by expert, with both projections as they stand in a checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(0, device="meta"))  # [E, 2F, D]
        self.down = nn.Parameter(torch.empty(0, device="meta"))  # [E, D, F]

    def forward(self, sent_MD: torch.Tensor, load_E: torch.Tensor) -> torch.Tensor:
        from grouped_gemm.ops import gmm

        load_E = load_E.to("cpu", torch.int64)
        hidden_MF = swiglu(gmm(sent_MD, self.gate_up, load_E, trans_b=True))
        return gmm(hidden_MF, self.down, load_E, trans_b=True)
