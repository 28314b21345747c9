"""The routing kernel, its effective dimension (paper, Theorem 4.1), and three measures of how routing weights vary.

All in float64. Suffixes: S samples, L MoE layers, E experts per layer, D hidden size, F the weights of all layers.
"""

from dataclasses import dataclass

import numpy as np

from ._arrays import Arrayish, Floats, finite, routing_weights
from .estimate import Estimate, jackknife

SAMPLES = 64
RIDGE = 0.01


@dataclass(frozen=True, slots=True)
class RiskBound:
    """The two terms of the bound of Theorem 4.1, in squared units of the targets."""

    bias: float
    variance: float

    @property
    def total(self) -> float:
        return self.bias + self.variance


def routing_kernel(weights: Arrayish, features: Arrayish | None = None) -> Floats:
    """[S, S] kernel `H_ij = sum_l sum_e g_l,e(x_i) g_l,e(x_j) K_l(x_i, x_j)` (paper, Theorem 4.1, summed over layers).

    Symmetric and positive semidefinite, in squared units of the features.

    Args:
        weights: [S, L, E] routing weights.
        features: [S, L, D] inputs of each MoE layer, averaged over tokens: linear experts, K_l = <x_i, x_j>. None for
            K = 1: routing alone.

    Raises:
        ValueError: input that is empty, not finite or of the wrong shape, or negative weights.
    """
    weights_LSE = routing_weights(weights).transpose(1, 0, 2)
    kernels_LSS = weights_LSE @ weights_LSE.transpose(0, 2, 1)
    if features is not None:
        features_LSD = finite(features, "features", "samples, layers, hidden").transpose(1, 0, 2)
        if features_LSD.shape[:2] != weights_LSE.shape[:2]:
            raise ValueError(
                f"features has {features_LSD.shape[1]} samples and {features_LSD.shape[0]} layers, weights "
                f"{weights_LSE.shape[1]} and {weights_LSE.shape[0]}: pass one vector for each sample and layer"
            )
        kernels_LSS = kernels_LSS * (features_LSD @ features_LSD.transpose(0, 2, 1))
    return kernels_LSS.sum(axis=0)


def effective_dimension(kernel: Arrayish, lam: float) -> float:
    """`Tr(H (H + lam I)^-1)` of a kernel [S, S]: from 0 to its rank (paper, Theorem 4.1).

    Args:
        lam: above 0, in the units of the kernel.

    Raises:
        ValueError: a kernel that is not square, symmetric and finite, or lam that is not positive.
    """
    eigenvalues_S = _eigenvalues(kernel, lam)
    return float((eigenvalues_S / (eigenvalues_S + lam)).sum())


def d_eff(weights: Arrayish, features: Arrayish | None = None) -> float:
    """`effective_dimension` as it is logged: of the first 64 samples, at lam = 0.01 Tr(H) / 64.

    From 0 to 64. NaN below 64 samples, since values compare only at one number of samples, and for a kernel of zeros.
    Arguments and errors as `routing_kernel`.
    """
    weights_SLE, features_SLD = _first_samples(weights, features)
    return _dimension(weights_SLE, features_SLD) if len(weights_SLE) == SAMPLES else float("nan")


def d_eff_estimate(
    weights: Arrayish, features: Arrayish | None = None, documents: np.ndarray | None = None
) -> Estimate:
    """`d_eff` with its interval by `jackknife`, over documents [S] where they are given. Otherwise as `d_eff`."""
    weights_SLE, features_SLD = _first_samples(weights, features)
    if len(weights_SLE) < SAMPLES:
        return Estimate.undefined(len(weights_SLE))
    return jackknife(
        lambda which: _dimension(weights_SLE[which], None if features_SLD is None else features_SLD[which]),
        SAMPLES,
        documents=None if documents is None else documents[:SAMPLES],
    )


def d_eff_by_layer(weights: Arrayish, features: Arrayish | None = None) -> Floats:
    """[L] `d_eff` of each layer's own kernel, with its own lam. Arguments and errors as `d_eff`."""
    weights_SLE, features_SLD = _first_samples(weights, features)

    def of_layer(layer: int) -> float:
        return d_eff(weights_SLE[:, [layer]], None if features_SLD is None else features_SLD[:, [layer]])

    return np.array([of_layer(layer) for layer in range(weights_SLE.shape[1])])


def risk_bound(
    kernel: Arrayish,
    targets: Arrayish,
    lam: float,
    noise: float = 1.0,
    delta: float = 0.05,
    c1: float = 1.0,
    c2: float = 1.0,
) -> RiskBound:
    """The bound of Theorem 4.1: `c1 lam^2/n y^T (H + lam I)^-2 y  +  c2 noise^2 (d_eff(lam) + log(1/delta))/n`.

    It holds with probability 1 - delta. The paper does not give c1 and c2: compare only values with equal constants.

    Args:
        kernel: [S, S].
        targets: [S].
        noise: standard deviation of the labels.

    Raises:
        ValueError: as `effective_dimension`, for targets of another length, and for delta outside (0, 1].
    """
    if not 0 < delta <= 1:
        raise ValueError(f"delta is {delta}: a probability above 0 and up to 1")
    dimension = effective_dimension(kernel, lam)
    targets_S = finite(targets, "targets", "samples")
    kernel_SS = finite(kernel, "kernel", "samples, samples")
    samples = len(targets_S)
    if samples != len(kernel_SS):
        raise ValueError(f"targets has {samples} values for a kernel of {len(kernel_SS)} samples: pass one per sample")
    solved_S = np.linalg.solve(kernel_SS + lam * np.eye(samples), targets_S)
    return RiskBound(
        bias=float(c1 * lam**2 / samples * (solved_S @ solved_S)),
        variance=float(c2 * noise**2 * (dimension + np.log(1 / delta)) / samples),
    )


def spread(weights: Arrayish) -> float:
    """Variance of routing weights over samples, summed over experts, mean over layers: from 0 to 1.

    The variance has denominator S. In squared units of probability. NaN for one sample.

    Args:
        weights: [S, L, E].

    Raises:
        ValueError: input that is empty, not finite, negative or of the wrong shape.
    """
    weights_SLE = routing_weights(weights)
    if len(weights_SLE) < 2:
        return float("nan")
    return float(weights_SLE.var(axis=0).sum(axis=-1).mean())


def effective_rank(weights: Arrayish) -> float:
    """exp of the entropy of the normalized eigenvalues of the Gram matrix of centred weights, layers concatenated.

    A number of directions, from 1 to S - 1. NaN where the samples do not differ (or there is one). Weights [S, L, E];
    errors as `spread`.
    """
    centred_SLE = _centred(routing_weights(weights))
    rows_SF = centred_SLE.reshape(len(centred_SLE), -1)
    # Both products have the same eigenvalues above 0: take the smaller matrix.
    gram = rows_SF @ rows_SF.T if len(rows_SF) <= rows_SF.shape[1] else rows_SF.T @ rows_SF
    eigenvalues_S = np.maximum(np.linalg.eigvalsh(gram), 0.0)
    if eigenvalues_S.sum() == 0:
        return float("nan")
    shares = eigenvalues_S[eigenvalues_S > 0] / eigenvalues_S.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def layer_cka(weights: Arrayish) -> float:
    """Linear CKA of the centred routing weights of consecutive layers, mean over layers: from 0 to 1.

    `CKA(X, Y) = |X^T Y|^2 / (|X^T X| |Y^T Y|)` in Frobenius norms (Kornblith et al. 2019), X and Y [S, E]. Pairs with a
    layer in which the samples do not differ are excluded; NaN where no pair is left, as for one layer or one sample.
    Weights [S, L, E]; errors as `spread`.
    """
    centred_LSE = _centred(routing_weights(weights)).transpose(1, 0, 2)
    centred_LES = centred_LSE.transpose(0, 2, 1)
    own_L = np.linalg.norm(centred_LES @ centred_LSE, axis=(1, 2))
    cross_L = np.linalg.norm(centred_LES[:-1] @ centred_LSE[1:], axis=(1, 2))
    defined_L = (own_L[:-1] > 0) & (own_L[1:] > 0)
    if not defined_L.any():
        return float("nan")
    return float((cross_L[defined_L] ** 2 / (own_L[:-1] * own_L[1:])[defined_L]).mean())


def _first_samples(weights: Arrayish, features: Arrayish | None) -> tuple[Floats, Floats | None]:
    """The first 64 samples, of which `d_eff` is taken."""
    weights_SLE = routing_weights(weights)[:SAMPLES]
    if features is None:
        return weights_SLE, None
    return weights_SLE, finite(features, "features", "samples, layers, hidden")[:SAMPLES]


def _dimension(weights_SLE: Floats, features_SLD: Floats | None) -> float:
    """Effective dimension at lam = 0.01 Tr(H) / S; NaN for a kernel of zeros."""
    kernel_SS = routing_kernel(weights_SLE, features_SLD)
    lam = RIDGE * float(np.trace(kernel_SS)) / len(kernel_SS)
    return effective_dimension(kernel_SS, lam) if lam > 0 else float("nan")


def _centred(weights_SLE: Floats) -> Floats:
    """Weights minus their mean over samples; exactly 0 in layers where samples differ by rounding alone."""
    centred_SLE = weights_SLE - weights_SLE.mean(axis=0)
    rounding_L = len(weights_SLE) * np.finfo(np.float64).eps * np.abs(weights_SLE).max(axis=(0, 2))
    differs_L = np.abs(centred_SLE).max(axis=(0, 2)) > rounding_L
    return np.where(differs_L[None, :, None], centred_SLE, 0.0)


def _eigenvalues(kernel: Arrayish, lam: float) -> Floats:
    """Eigenvalues of a kernel, after its checks; those that rounding made negative are set to 0."""
    kernel_SS = finite(kernel, "kernel", "samples, samples")
    if kernel_SS.shape[0] != kernel_SS.shape[1] or not np.allclose(
        kernel_SS, kernel_SS.T, rtol=0, atol=1e-6 * np.abs(kernel_SS).max()
    ):
        raise ValueError(f"kernel {kernel_SS.shape} is not square and symmetric: pass what routing_kernel returns")
    if not lam > 0:
        raise ValueError(f"lam is {lam}: it must be positive")
    return np.maximum(np.linalg.eigvalsh(kernel_SS), 0.0)
