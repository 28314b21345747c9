"""Leave-one-out accuracy: does the routing of the other samples determine a sample's answer? (ours)

The paper's Theorem 4.1 bounds the error of kernel regression with the routing kernel. Here such a regression is
computed, on samples that the model was trained on: each answer token is predicted from the router's probabilities at
the preceding token, by kernel ridge regression on the other samples. Where the model has learned a rule, samples with
like answers are routed alike, so the others predict the answer. Where it has memorized, they do not. No held-out text
is used.

The last third of the layers is excluded: there the router already reflects the token that the model is about to
output, memorized or not.

Suffixes: A answer tokens of all samples, L layers, E experts, P samples with an answer token at one place, V distinct
tokens.
"""

import numpy as np
from scipy.spatial.distance import cdist

from ._arrays import Arrayish, Bools, Floats, Ints, finite
from .estimate import Estimate, share

RIDGE = 0.05
LEAST_ANSWERS = 16  # samples per place that the regression needs


def left_out(routing: Arrayish, sample: Arrayish, place: Arrayish, token: Arrayish, ridge: float = RIDGE) -> Estimate:
    """The share of samples whose whole answer is predicted correctly from the other samples, with Wilson's interval.

    An answer token that no other sample has at that place cannot be predicted. Samples with a token at a place that
    fewer than 16 samples have are excluded and not counted in `samples`.

    Args:
        routing: [A, L, E] router probabilities at the token before each answer token. Only the first L - L // 3 layers
            are used.
        sample: [A] the sample that each answer token belongs to; any integers.
        place: [A] its position in the answer, from 0; at most one token per sample and place.
        token: [A] its token id.
        ridge: penalty of the regression, as a share of the mean eigenvalue of the centred kernel.

    Returns:
        The estimate, from 0 to 1; undefined where no sample is left.

    Raises:
        ValueError: arrays of unequal length, or two tokens of one sample at one place.
    """
    routing_ALE = finite(routing, "routing", "answer tokens, layers, experts")
    sample_A, place_A, token_A = (_labels(x, len(routing_ALE)) for x in (sample, place, token))
    layers = routing_ALE.shape[1]
    routing_ALE = routing_ALE[:, : layers - layers // 3]
    right_A = np.zeros(len(routing_ALE), bool)
    predicted_A = np.zeros(len(routing_ALE), bool)
    for number in np.unique(place_A):
        here = np.flatnonzero(place_A == number)
        if len(np.unique(sample_A[here])) < len(here):
            raise ValueError(f"a sample has two answer tokens at place {number}: number an answer's tokens from 0")
        if len(here) >= LEAST_ANSWERS:
            right_A[here] = _predicts(routing_ALE[here], token_A[here], ridge)
            predicted_A[here] = True
    samples = np.unique(sample_A)
    counted = [predicted_A[sample_A == one].all() for one in samples]
    right = [right_A[sample_A == one].all() for one in samples[counted]]
    return share(sum(right), len(right))


def _labels(values: Arrayish, length: int) -> Ints:
    array = np.asarray(values, dtype=np.int64)
    if array.shape != (length,):
        raise ValueError(f"sample, place and token have shape {array.shape}: pass one of each for {length} tokens")
    return array


def _predicts(routing_PLE: Floats, token_P: Ints, ridge: float) -> Bools:
    """[P] whether each token has the highest leave-one-out prediction; of equal predictions the smallest id counts.

    Ridge regression with an intercept. Leave-one-out predictions need no second fit: the residual without a sample is
    its residual divided by 1 - h, where h is the sample's diagonal element of the hat matrix.
    """
    _, class_P = np.unique(token_P, return_inverse=True)
    target_PV = np.eye(class_P.max() + 1)[class_P]
    count = len(token_P)
    kernel_PP = _kernel(routing_PLE)
    centred_PP = kernel_PP - kernel_PP.mean(0) - kernel_PP.mean(1)[:, None] + kernel_PP.mean()
    penalty = ridge * np.trace(centred_PP) / count
    hat_PP = np.full((count, count), 1 / count)
    if penalty > 0:  # 0 where all samples have the same routing
        hat_PP += np.linalg.solve(centred_PP + penalty * np.eye(count), centred_PP).T
    own_P1 = np.diag(hat_PP)[:, None]
    predicted_PV = (hat_PP @ target_PV - own_P1 * target_PV) / (1 - own_P1)
    # Rounded, so that rounding errors do not decide between equal predictions.
    return predicted_PV.round(12).argmax(1) == class_P


def _kernel(routing_PLE: Floats) -> Floats:
    """[P, P] Gaussian kernel exp(-|x - y|^2 / m), layers concatenated; m: median squared distance of unequal pairs."""
    flat = routing_PLE.reshape(len(routing_PLE), -1)
    squares_PP = cdist(flat, flat, "sqeuclidean")
    distinct = squares_PP[np.triu_indices(len(flat), 1)]
    distinct = distinct[distinct > 0]
    return np.exp(-squares_PP / np.median(distinct)) if len(distinct) else np.ones_like(squares_PP)
