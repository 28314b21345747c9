"""Output layer and cross-entropy in chunks of tokens: the logits of all tokens are never in memory at once.

Shapes: N tokens, D hidden size, V vocabulary, C tokens of a chunk, P tokens of a part of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Logits in memory at once: of a chunk, in the matmuls' dtype, and of the part of it that is in float32. On CPU a part
# must fit a core's cache (measured: passes over memory take five times as long), and larger chunks mean fewer additions
# to the weight's gradient. On CUDA both must be large enough to occupy the device.
_CHUNK_LOGITS_CPU, _CHUNK_LOGITS = 2**23, 2**27
_FLOAT32_LOGITS_CPU, _FLOAT32_LOGITS = 2**18, 2**27


def cross_entropy(
    hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, entropy: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The summed loss, with gradient; the loss and the entropy of the prediction per token [N], without; float32, nats.

    Without ``entropy``, which takes one more pass over the logits, the third is None. Negative targets are ignored:
    their loss and entropy are 0. Matmuls run in the dtype of the hidden states; the weight and its
    gradient may be wider. Gradients are computed with the loss, chunk by chunk, so backward recomputes nothing. A
    frozen weight gets none.
    """
    # Read here: inside an autograd function gradients are always disabled.
    gradients = torch.is_grad_enabled()
    loss_sum, loss_N, entropy_N = _ChunkedCrossEntropy.apply(hidden_ND, weight_VD, target_N, gradients, entropy)
    return loss_sum, loss_N, entropy_N if entropy else None


def _chunk(weight_VD: Tensor) -> int:
    """Tokens of a chunk."""
    return max(64, (_CHUNK_LOGITS_CPU if weight_VD.device.type == "cpu" else _CHUNK_LOGITS) // len(weight_VD))


def _part(logits_CV: Tensor) -> int:
    """Tokens of a chunk whose logits are in float32 at once."""
    return max(1, (_FLOAT32_LOGITS_CPU if logits_CV.device.type == "cpu" else _FLOAT32_LOGITS) // logits_CV.shape[1])


@torch.no_grad()
def log_probabilities(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each target in nats, float32 [N], and whether it is the greedy choice, bool [N].

    Without gradient, in the same chunks. Of equally likely tokens the first is the greedy choice.
    """
    chunk = _chunk(weight_VD)
    log_probs, greedy = [], []
    for hidden_CD, target_C in zip(hidden_ND.split(chunk), target_N.split(chunk), strict=True):
        logits_CV = (hidden_CD @ weight_VD.T).float()
        greedy.append(logits_CV.argmax(-1) == target_C)
        log_probs.append(logits_CV.log_softmax(-1).gather(1, target_C[:, None])[:, 0])
    return torch.cat(log_probs), torch.cat(greedy)


def prediction_statistics(hidden_ND: Tensor, weight_VD: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the log-probability of a token drawn from each prediction, nats, float32 [N].

    The mean is minus the entropy. Without gradient, in the same chunks.
    """
    means, deviations = [], []
    for hidden_CD in hidden_ND.split(_chunk(weight_VD)):
        log_probs_CV = (hidden_CD @ weight_VD.T).float().log_softmax(-1)
        probs_CV = log_probs_CV.exp()
        means.append((probs_CV * log_probs_CV).sum(-1))
        deviations.append((probs_CV * (log_probs_CV - means[-1][:, None]).square()).sum(-1).sqrt())
    return torch.cat(means), torch.cat(deviations)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, gradients: bool, entropy: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        wanted = gradients and any(ctx.needs_input_grad[:2])
        parts, grad_hidden = [], torch.empty_like(hidden_ND) if wanted else None
        ctx.weight_dtype, weight_VD = weight_VD.dtype, weight_VD.to(hidden_ND.dtype)
        grad_weight = None
        if wanted and ctx.needs_input_grad[1]:
            grad_weight = torch.zeros(weight_VD.shape, dtype=torch.float32, device=weight_VD.device)
        chunk = _chunk(weight_VD)
        # One buffer for the logits of all chunks: the system hands out new memory page by page.
        buffer_CV = hidden_ND.new_empty(min(chunk, len(hidden_ND)), len(weight_VD))
        for start in range(0, len(hidden_ND), chunk):
            tokens = slice(start, start + chunk)
            logits_CV = torch.mm(hidden_ND[tokens], weight_VD.T, out=buffer_CV[: len(hidden_ND) - start])
            parts.append(_losses(logits_CV, target_N[tokens], wanted, entropy))
            if grad_hidden is None:
                continue
            torch.mm(logits_CV, weight_VD, out=grad_hidden[tokens])
            if grad_weight is not None:
                grad_weight += logits_CV.T @ hidden_ND[tokens]
        loss_N, entropy_N = torch.cat(parts, dim=1)
        if grad_hidden is not None:
            ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(loss_N, entropy_N)
        return loss_N.sum(), loss_N, entropy_N

    @staticmethod
    def backward(
        ctx: Any, grad_sum: Tensor, grad_loss_N: Tensor, grad_entropy_N: Tensor
    ) -> tuple[Tensor, Tensor | None, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_sum).to(ctx.weight_dtype)
        return grad_hidden * grad_sum.to(grad_hidden.dtype), grad_weight, None, None, None


def _losses(logits_CV: Tensor, target_C: Tensor, gradients: bool, entropy: bool) -> Tensor:
    """Loss and, if asked for, entropy of each token, float32 [2, C]; with ``gradients``, the logits are overwritten."""
    found = []
    part = _part(logits_CV)
    for logits_PV, target_P in zip(logits_CV.split(part), target_C.split(part), strict=True):
        predicted_P, index_P1 = target_P >= 0, target_P.clamp(min=0)[:, None]
        wide_PV = logits_PV.float()
        probs_PV = wide_PV.softmax(-1)
        # The largest probability is 1 / sum(exp(logit - largest logit)): logsumexp without another pass.
        log_sum_P = wide_PV.amax(-1) - probs_PV.amax(-1).log()
        loss_P = log_sum_P - wide_PV.gather(1, index_P1)[:, 0]
        # The entropy of a softmax is its logsumexp minus the expected logit.
        entropy_P = log_sum_P - (probs_PV * wide_PV).sum(-1) if entropy else torch.zeros_like(loss_P)
        found.append(torch.where(predicted_P, torch.stack([loss_P, entropy_P]), 0.0))
        if gradients:
            probs_PV.scatter_add_(1, index_P1, torch.full_like(probs_PV[:, :1], -1.0))
            logits_PV.copy_(probs_PV.mul_(predicted_P[:, None]))
    return torch.cat(found, dim=1)
