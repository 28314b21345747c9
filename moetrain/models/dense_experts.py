"""Routing of a dense model: its hidden units in blocks, each block's share of a token's activation.

A feed-forward layer is a sum over its hidden units, out = sum_u a_u w_u, with a_u the unit's activation and w_u its
column of the output projection. Any partition of the units into blocks makes it a sum of E experts that every token
uses, in unequal parts (MoEfication, 2110.01786). A block's part is its mass, sum_u |a_u| |w_u|, over that of all
blocks: an upper bound of the norm of what it adds to the residual stream. Unlike |a_u| alone it does not change where a
unit's activation is scaled up and its column down. Shares sum to 1 and stand where a router's probabilities stand.

Blocks are of consecutive units: units are exchangeable before training, so no other partition is better by chance, and
this one needs no state, does not change during a run, and is the same on all ranks and after a resume.

Shapes: N tokens (B rows of T), D hidden size, F hidden units, E blocks, R halves of samples.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moetrain.models.router import LayerRouting, RecordingMasks


def block_shares(units_NF: Tensor, down_DF: Tensor, blocks: int) -> Tensor:
    """Each block's share of the mass of a token's activations, float32 [N, E]; 1 / E each where no unit is active.

    Args:
        units_NF: activations of the hidden units.
        down_DF: the output projection.
        blocks: E, a divisor of F.
    """
    length_F = torch.linalg.vector_norm(down_DF, dim=0, dtype=torch.float32)
    mass_NEU = (units_NF.float() * length_F).abs_().view(len(units_NF), blocks, -1)
    mass_NE = mass_NEU.sum(-1) + torch.finfo(torch.float32).tiny
    return mass_NE / mass_NE.sum(-1, keepdim=True)


@torch.no_grad()
def record_blocks(x_ND: Tensor, units_NF: Tensor, down_DF: Tensor, blocks: int, masks: RecordingMasks) -> LayerRouting:
    """A layer's routing over blocks. A token counts for the block with its largest share. Nothing has a gradient.

    What belongs to a router is empty: probabilities and load of all tokens, z, entropy.

    Args:
        x_ND: the layer's inputs.
    """
    shares_NE = block_shares(units_NF, down_DF, blocks)
    largest_NE = torch.zeros_like(shares_NE).scatter_(1, shares_NE.argmax(-1, keepdim=True), 1.0)
    sums_BRE, counts_BRE = masks.sum_halves(torch.cat([shares_NE, largest_NE], dim=1)).chunk(2, dim=-1)
    nothing = shares_NE.new_zeros(0)
    return LayerRouting(
        sums_BRE=sums_BRE,
        counts_BRE=counts_BRE,
        probs_E=nothing,
        load_E=nothing,
        z=nothing,
        entropy=nothing,
        inputs_BRD=masks.sum_halves(x_ND.float()) if masks.layer_inputs else nothing,
    )


def block_rows(gate_up_2FD: Tensor, blocks: int) -> Tensor:
    """What stands for a router's rows: the mean gate row of each block's units, [E, D].

    Its product with a layer's input is the mean of the block's gates before the nonlinearity. MoEfication calls the
    same mean an expert's representation.

    Args:
        gate_up_2FD: the input projection, gate before up.
    """
    gate_FD = gate_up_2FD[: len(gate_up_2FD) // 2]
    return gate_FD.view(blocks, -1, gate_FD.shape[-1]).mean(1)
