"""Cross-entropy of the output layer in chunks: all logits are never held at once.

Shapes: N tokens, D hidden size, V vocabulary, C tokens of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch

# Logits held at once. On CPU a chunk has to stay in the heap: larger blocks are mapped and zeroed anew each time,
# which costs more than the softmax. On CUDA it has to be large enough to fill the device.
_LOGITS_HELD_ON_CPU, _LOGITS_HELD = 2**21, 2**27


def cross_entropy(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, target_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The summed loss, which carries the gradient, and the loss by token [N] in nats, which does not; float32.

    Targets below zero are ignored: their loss is 0. Gradients of hidden states and weight are formed with the loss,
    chunk by chunk, so backward recomputes nothing; a frozen weight's is not formed.
    """
    # Asked here: inside the function gradients are always off.
    return _ChunkedCrossEntropy.apply(hidden_ND, weight_VD, target_N, torch.is_grad_enabled())


def _chunk(weight_VD: torch.Tensor) -> int:
    """Rows of logits that are held at once."""
    held = _LOGITS_HELD_ON_CPU if weight_VD.device.type == "cpu" else _LOGITS_HELD
    return max(64, held // len(weight_VD))


@torch.no_grad()
def log_probabilities(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, target_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each target in nats, float32 [N], and whether it is the likeliest token, bool [N].

    Without gradient, in the same chunks; where two tokens are likeliest, the first counts.
    """
    chunk = _chunk(weight_VD)
    found = []
    for start in range(0, len(hidden_ND), chunk):
        target_C = target_N[start : start + chunk]
        logits_CV = (hidden_ND[start : start + chunk] @ weight_VD.T).float()
        likeliest_C = logits_CV.argmax(-1)
        found.append((logits_CV.log_softmax(-1).gather(1, target_C[:, None])[:, 0], likeliest_C == target_C))
    log_probs, likeliest = zip(*found, strict=True)
    return torch.cat(log_probs), torch.cat(likeliest)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: torch.Tensor, weight_VD: torch.Tensor, target_N: torch.Tensor, gradients: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wanted = gradients and any(ctx.needs_input_grad[:2])
        losses, grad_hidden = [], torch.empty_like(hidden_ND) if wanted else None
        grad_weight = None
        if wanted and ctx.needs_input_grad[1]:
            grad_weight = torch.zeros(weight_VD.shape, dtype=torch.float32, device=weight_VD.device)
        chunk = _chunk(weight_VD)
        for start in range(0, len(hidden_ND), chunk):
            here = slice(start, start + chunk)
            target_C = target_N[here]
            kept_C = target_C >= 0
            # log_softmax is one fused pass on CPU; logsumexp takes five over memory.
            log_probs_CV = (hidden_ND[here] @ weight_VD.T).float().log_softmax(-1)
            safe_C1 = target_C.clamp(min=0)[:, None]
            losses.append(torch.where(kept_C, -log_probs_CV.gather(1, safe_C1)[:, 0], 0.0))
            if grad_hidden is None:
                continue
            probs_CV = log_probs_CV.exp_()
            probs_CV.scatter_add_(1, safe_C1, torch.full_like(probs_CV[:, :1], -1.0))
            grad_CV = probs_CV.mul_(kept_C[:, None]).to(hidden_ND.dtype)
            grad_hidden[here] = grad_CV @ weight_VD
            if grad_weight is not None:
                grad_weight += grad_CV.T @ hidden_ND[here]
        loss_N = torch.cat(losses)
        if grad_hidden is not None:
            ctx.save_for_backward(grad_hidden, grad_weight)
            ctx.weight_dtype = weight_VD.dtype
        ctx.mark_non_differentiable(loss_N)
        return loss_N.sum(), loss_N

    @staticmethod
    def backward(
        ctx: Any, grad_sum: torch.Tensor, grad_loss_N: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_sum).to(ctx.weight_dtype)
        return grad_hidden * grad_sum.to(grad_hidden.dtype), grad_weight, None, None
