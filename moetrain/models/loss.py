"""Cross-entropy of the output layer in chunks: all logits are never held at once.

Shapes: N tokens, D hidden size, V vocabulary, C tokens of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch

# Logits held at once, in the type of the products, and widened to float32. On CPU what is widened has to stay in a
# core's cache through the passes over it (measured: they take five times as long out of memory), and a new piece of
# the weight's gradient is added to it the more rarely the better. On CUDA both have to be large enough to fill the
# device.
_HELD_ON_CPU, _HELD = 2**23, 2**27
_WIDENED_ON_CPU, _WIDENED = 2**18, 2**27


def cross_entropy(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, target_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The summed loss, which carries the gradient, and the loss by token [N] in nats, which does not; float32.

    Targets below zero are ignored: their loss is 0. Products run in the type of the hidden states; the weight, and its
    gradient, may be wider. Gradients are formed with the loss, chunk by chunk, so backward recomputes nothing; a frozen
    weight's is not formed.
    """
    # Asked here: inside the function gradients are always off.
    return _ChunkedCrossEntropy.apply(hidden_ND, weight_VD, target_N, torch.is_grad_enabled())


def _chunk(weight_VD: torch.Tensor) -> int:
    """Rows of logits that are held at once."""
    return max(64, (_HELD_ON_CPU if weight_VD.device.type == "cpu" else _HELD) // len(weight_VD))


def _piece(logits_CV: torch.Tensor) -> int:
    """Rows of logits that are widened at once."""
    return max(1, (_WIDENED_ON_CPU if logits_CV.device.type == "cpu" else _WIDENED) // logits_CV.shape[1])


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
        ctx.weight_dtype, weight_VD = weight_VD.dtype, weight_VD.to(hidden_ND.dtype)
        grad_weight = None
        if wanted and ctx.needs_input_grad[1]:
            grad_weight = torch.zeros(weight_VD.shape, dtype=torch.float32, device=weight_VD.device)
        chunk = _chunk(weight_VD)
        # One buffer for the logits of all chunks: fresh memory comes from the system page by page.
        held_CV = hidden_ND.new_empty(min(chunk, len(hidden_ND)), len(weight_VD))
        for start in range(0, len(hidden_ND), chunk):
            here = slice(start, start + chunk)
            logits_CV = torch.mm(hidden_ND[here], weight_VD.T, out=held_CV[: len(hidden_ND) - start])
            losses.append(_losses(logits_CV, target_N[here], wanted))
            if grad_hidden is None:
                continue
            torch.mm(logits_CV, weight_VD, out=grad_hidden[here])
            if grad_weight is not None:
                grad_weight += logits_CV.T @ hidden_ND[here]
        loss_N = torch.cat(losses)
        if grad_hidden is not None:
            ctx.save_for_backward(grad_hidden, grad_weight)
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


def _losses(logits_CV: torch.Tensor, target_C: torch.Tensor, gradients: bool) -> torch.Tensor:
    """The loss of each row [C], float32; with ``gradients``, that by the logits is put in their place."""
    losses = []
    piece = _piece(logits_CV)
    for logits_PV, target_P in zip(logits_CV.split(piece), target_C.split(piece), strict=True):
        kept_P, safe_P1 = target_P >= 0, target_P.clamp(min=0)[:, None]
        wide_PV = logits_PV.float()
        probs_PV = wide_PV.softmax(-1)
        # The largest probability is 1 over the sum of exponentials: so their logarithm is known without another pass.
        log_sum_P = wide_PV.amax(-1) - probs_PV.amax(-1).log()
        losses.append(torch.where(kept_P, log_sum_P - wide_PV.gather(1, safe_P1)[:, 0], 0.0))
        if gradients:
            probs_PV.scatter_add_(1, safe_P1, torch.full_like(probs_PV[:, :1], -1.0))
            logits_PV.copy_(probs_PV.mul_(kept_P[:, None]))
    return torch.cat(losses)
