"""megablocks' dropless experts, with our router's decision and our weights in their own layout.

megablocks' `ParallelDroplessMLP` sorts, gathers and scatters tokens with its own kernels. Between them, this adapter
calls grouped_gemm's matmuls itself. megablocks' gated MLP wants three matrices [E * F, D]: our gate_up would have to be
split and down transposed at every call (measured on CPU: a transposing cast takes 18 times as long as a plain one).

For megablocks 0.10.0 and grouped-gemm 0.3.0, bfloat16 on CUDA only (`docker/install_kernels.sh`); imported when first
used. grouped_gemm needs the experts' loads on the host, so the host waits for the device once per layer. megablocks'
own losses are off: it collects them in a global list, which recomputing a layer would fill twice.

Shapes: N tokens, D hidden size, E experts, K experts per token, F expert width, M rows sent to experts.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from moetrain.models.compilation import uncompiled
from moetrain.models.elementwise import swiglu


@uncompiled
def megablocks_experts(
    x_ND: Tensor, index_NK: Tensor, weight_NK: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor
) -> Tensor:
    """See `moetrain.models.experts.experts`. Weights of x's dtype.

    Raises:
        ImportError: megablocks or grouped_gemm is not installed, or was built for another torch.
    """
    num_experts, hidden_size, _ = down_EDF.shape
    module = _module(hidden_size, num_experts, index_NK.shape[1])
    weights = {"mlp.gate_up": gate_up_E2FD.contiguous(), "mlp.down": down_EDF.contiguous()}
    # The second argument, the router's scores, is only read by megablocks' own loss.
    return functional_call(module, weights, (x_ND.contiguous(), weight_NK, weight_NK, index_NK))


@functools.cache
def _module(hidden_size: int, num_experts: int, num_experts_per_tok: int) -> nn.Module:
    """megablocks' module for one shape, on the meta device; each call passes it our weights."""
    from megablocks.layers.arguments import Arguments
    from megablocks.layers.dmoe import ParallelDroplessMLP

    arguments = Arguments(
        hidden_size=hidden_size,
        ffn_hidden_size=128,  # of its own MLP, which is replaced below; the smallest allowed
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
    """SwiGLU experts on rows sorted by expert; both projections in the layout of a checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(0, device="meta"))  # [E, 2F, D]
        self.down = nn.Parameter(torch.empty(0, device="meta"))  # [E, D, F]

    def forward(self, sent_MD: Tensor, load_E: Tensor) -> Tensor:
        from grouped_gemm.ops import gmm

        load_E = load_E.to("cpu", torch.int64)
        hidden_MF = swiglu(gmm(sent_MD, self.gate_up, load_E, trans_b=True))
        return gmm(hidden_MF, self.down, load_E, trans_b=True)
