"""Left-out accuracy: does the routing of the other samples tell what a sample's answer is? (ours)

The theory behind the routing kernel (the paper's Theorem 4.1) bounds the error of kernel regression on it. Here that
regression is done, on samples the model was trained on: each answer token is predicted from the router's probabilities
at the token it follows, by kernel ridge regression on the other samples, which are trained on too. A rule routes alike
what is answered alike, so that others tell the answer; what is only memorized is routed one by one, and they do not.
It takes the routing and the answers of trained samples, and no held-out text.

The last third of the layers is left out: there a token is routed by the answer it is about to give, memorized or not.

Suffixes: A answer tokens, of all samples; L layers, E experts; P samples with a token at one place; V tokens found.
"""

import numpy as np
from scipy.spatial.distance import cdist

from ._arrays import Arrayish, Bools, Floats, Ints, finite
from .estimate import Estimate, share

RIDGE = 0.05  # the penalty, as a share of the centred kernel's mean eigenvalue
LEAST_ANSWERS = 16  # fewer samples at a place teach nothing about each other


def left_out(routing: Arrayish, sample: Arrayish, place: Arrayish, token: Arrayish, ridge: float = RIDGE) -> Estimate:
    """The share of samples whose whole answer comes out of the other samples' routing, with Wilson's 95% interval.

    Args:
        routing: [A, L, E] router probabilities at the token that each answer token is predicted from; of L layers the
            first L - L // 3 count.
        sample: [A] which sample an answer token belongs to, any integers.
        place: [A] its place in the answer, from 0; each sample has one token at a place.
        token: [A] its id.
        ridge: penalty of the regression, as a share of the centred kernel's mean eigenvalue.

    An answer token that no other sample has at that place cannot come out. Samples with a token at a place that fewer
    than 16 samples have are left out, and not counted in `samples`; the Estimate is all NaN where none is left.
    Raises ValueError for arrays that do not fit together.
    """
    routing_ALE = finite(routing, "routing", "answer tokens, layers, experts")
    sample_A, place_A, token_A = (_labels(x, len(routing_ALE)) for x in (sample, place, token))
    layers = routing_ALE.shape[1]
    routing_ALE = routing_ALE[:, : layers - layers // 3]
    right_A = np.zeros(len(routing_ALE), bool)
    judged_A = np.zeros(len(routing_ALE), bool)
    for number in np.unique(place_A):
        here = np.flatnonzero(place_A == number)
        if len(np.unique(sample_A[here])) < len(here):
            raise ValueError(f"a sample has two answer tokens at place {number}: number an answer's tokens from 0")
        if len(here) >= LEAST_ANSWERS:
            right_A[here] = _predicted(routing_ALE[here], token_A[here], ridge)
            judged_A[here] = True
    samples = np.unique(sample_A)
    judged = [judged_A[sample_A == one].all() for one in samples]
    right = [right_A[sample_A == one].all() for one in samples[judged]]
    return share(sum(right), len(right))


def _labels(values: Arrayish, length: int) -> Ints:
    array = np.asarray(values, dtype=np.int64)
    if array.shape != (length,):
        raise ValueError(f"sample, place and token have shape {array.shape}: pass one of each for {length} tokens")
    return array


def _predicted(routing_PLE: Floats, token_P: Ints, ridge: float) -> Bools:
    """[P] whether each token is the likeliest by the regression on the others; of equal ones the smallest id is taken.

    The regression has a free constant. Leaving a sample out of it needs no second fit: the residual without it is the
    residual with it over 1 - h, h being the sample's weight in its own prediction.
    """
    _, class_P = np.unique(token_P, return_inverse=True)
    target_PV = np.eye(class_P.max() + 1)[class_P]
    count = len(token_P)
    kernel_PP = _kernel(routing_PLE)
    centred_PP = kernel_PP - kernel_PP.mean(0) - kernel_PP.mean(1)[:, None] + kernel_PP.mean()
    penalty = ridge * np.trace(centred_PP) / count
    hat_PP = np.full((count, count), 1 / count)
    if penalty > 0:  # else all are routed alike
        hat_PP += np.linalg.solve(centred_PP + penalty * np.eye(count), centred_PP).T
    own_P1 = np.diag(hat_PP)[:, None]
    predicted_PV = (hat_PP @ target_PV - own_P1 * target_PV) / (1 - own_P1)
    # Rounded so that ties, where nothing tells tokens apart, do not fall to the last bit of a sum.
    return predicted_PV.round(12).argmax(1) == class_P


def _kernel(routing_PLE: Floats) -> Floats:
    """[P, P] Gaussian of the distance between routings, layers side by side; as wide as the median pair is apart."""
    flat = routing_PLE.reshape(len(routing_PLE), -1)
    squares_PP = cdist(flat, flat, "sqeuclidean")
    apart = squares_PP[np.triu_indices(len(flat), 1)]
    apart = apart[apart > 0]
    return np.exp(-squares_PP / np.median(apart)) if len(apart) else np.ones_like(squares_PP)
