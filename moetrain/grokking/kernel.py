"""The routing kernel, its effective dimension (paper, Theorem 4.1), and three shapes of the cloud of routing weights.

All in float64. Suffixes: S samples, L MoE layers, E experts a layer, D hidden size, F the weights of all layers.
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

    weights [S, L, E]. Without features K = 1: routing alone. features [S, L, D], mean-pooled inputs of each MoE
    layer: K_l = <x_i, x_j>, linear experts. Symmetric and positive semidefinite, in units of the features squared.
    Raises ValueError for input that is empty, not finite or of wrong shape, and for negative weights.
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
    """`d_eff = Tr(H (H + lam I)^-1)` of a kernel [S, S]: from 0 to its rank (paper, Theorem 4.1).

    lam > 0, in the units of the kernel. Raises ValueError for a kernel that is not square, symmetric and finite, and
    for lam that is not positive.
    """
    eigenvalues_S = _eigenvalues(kernel, lam)
    return float((eigenvalues_S / (eigenvalues_S + lam)).sum())


def d_eff(weights: Arrayish, features: Arrayish | None = None) -> float:
    """`effective_dimension` as it is logged: of the first 64 samples, at lam = 0.01 Tr(H) / 64, so that values compare.

    weights [S, L, E], features as `routing_kernel`. Returns a number from 0 to 64; NaN below 64 samples, where the
    value would not compare, and for a kernel of zeros. Raises ValueError as `routing_kernel`.
    """
    weights_SLE, features_SLD = _logged(weights, features)
    if len(weights_SLE) < SAMPLES:
        return float("nan")
    return _dimension(weights_SLE, features_SLD)


def d_eff_estimate(weights: Arrayish, features: Arrayish | None = None) -> Estimate:
    """`d_eff` with its interval by `jackknife`. Arguments and errors as `d_eff`."""
    weights_SLE, features_SLD = _logged(weights, features)
    if len(weights_SLE) < SAMPLES:
        return Estimate(float("nan"), float("nan"), float("nan"), len(weights_SLE), 0)
    return jackknife(
        lambda which: _dimension(weights_SLE[which], None if features_SLD is None else features_SLD[which]), SAMPLES
    )


def d_eff_by_layer(weights: Arrayish, features: Arrayish | None = None) -> Floats:
    """[L] `d_eff` of each layer's own kernel, at its own lam. Arguments and errors as `d_eff`."""
    weights_SLE, features_SLD = _logged(weights, features)
    layers = weights_SLE.shape[1]
    if len(weights_SLE) < SAMPLES:
        return np.full(layers, np.nan)
    return np.array(
        [
            _dimension(weights_SLE[:, [layer]], None if features_SLD is None else features_SLD[:, [layer]])
            for layer in range(layers)
        ]
    )


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

    kernel [S, S], targets [S]; noise: standard deviation of the labels; the bound holds with probability 1 - delta.
    The paper leaves c1 and c2 open, so only values with the same constants compare. Returns RiskBound.
    Raises ValueError as `effective_dimension`, for targets that do not fit, and for delta outside (0, 1].
    """
    if not 0 < delta <= 1:
        raise ValueError(f"delta is {delta}: a probability above 0 and up to 1")
    dimension = effective_dimension(kernel, lam)
    targets_S = finite(targets, "targets", "samples")
    kernel_SS = finite(kernel, "kernel", "samples, samples")
    if len(targets_S) != len(kernel_SS):
        raise ValueError(
            f"targets has {len(targets_S)} values for a kernel of {len(kernel_SS)} samples: pass one a sample"
        )
    samples = len(targets_S)
    solved_S = np.linalg.solve(kernel_SS + lam * np.eye(samples), targets_S)
    return RiskBound(
        bias=float(c1 * lam**2 / samples * (solved_S @ solved_S)),
        variance=float(c2 * noise**2 * (dimension + np.log(1 / delta)) / samples),
    )


def spread(weights: Arrayish) -> float:
    """Mean over layers of the variance of routing weights over samples, summed over experts: from 0 to 1.

    weights [S, L, E]. Variance with denominator S; squared units of probability. NaN for one sample.
    Raises ValueError for input that is empty, not finite, negative or of wrong shape.
    """
    weights_SLE = routing_weights(weights)
    if len(weights_SLE) < 2:
        return float("nan")
    return float(weights_SLE.var(axis=0).sum(axis=-1).mean())


def effective_rank(weights: Arrayish) -> float:
    """exp of the entropy of the normalised eigenvalues of the Gram matrix of centred weights, layers concatenated.

    weights [S, L, E]. A number of directions, from 1 to S - 1. NaN where no samples differ (one sample among them).
    Errors as `spread`.
    """
    centred_SLE = _centred(routing_weights(weights))
    rows_SF = centred_SLE.reshape(len(centred_SLE), -1)
    eigenvalues_S = np.maximum(np.linalg.eigvalsh(rows_SF @ rows_SF.T), 0.0)
    if eigenvalues_S.sum() == 0:
        return float("nan")
    shares = eigenvalues_S[eigenvalues_S > 0] / eigenvalues_S.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def layer_cka(weights: Arrayish) -> float:
    """Linear CKA of the centred routing weights of consecutive layers, mean over layers: from 0 to 1.

    `CKA(X, Y) = |X^T Y|^2 / (|X^T X| |Y^T Y|)` in Frobenius norms (Kornblith et al. 2019) for X, Y [S, E].
    weights [S, L, E]. Pairs of layers of which one does not tell the samples apart are left out of the mean; NaN where
    none is left, as for one layer or one sample. Errors as `spread`.
    """
    centred_LSE = _centred(routing_weights(weights)).transpose(1, 0, 2)
    centred_LES = centred_LSE.transpose(0, 2, 1)
    own_L = np.linalg.norm(centred_LES @ centred_LSE, axis=(1, 2))
    cross_L = np.linalg.norm(centred_LES[:-1] @ centred_LSE[1:], axis=(1, 2))
    defined_L = (own_L[:-1] > 0) & (own_L[1:] > 0)
    if not defined_L.any():
        return float("nan")
    return float((cross_L[defined_L] ** 2 / (own_L[:-1] * own_L[1:])[defined_L]).mean())


def _logged(weights: Arrayish, features: Arrayish | None) -> tuple[Floats, Floats | None]:
    """The first 64 samples, which what is logged is taken over."""
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
    """Weights minus their mean over samples; exactly 0 in layers where the difference is no more than rounding."""
    centred_SLE = weights_SLE - weights_SLE.mean(axis=0)
    rounding_L = len(weights_SLE) * np.finfo(np.float64).eps * np.abs(weights_SLE).max(axis=(0, 2))
    differs_L = np.abs(centred_SLE).max(axis=(0, 2)) > rounding_L
    return np.where(differs_L[None, :, None], centred_SLE, 0.0)


def _eigenvalues(kernel: Arrayish, lam: float) -> Floats:
    """Eigenvalues of a checked kernel, those that rounding has put below 0 set to 0."""
    kernel_SS = finite(kernel, "kernel", "samples, samples")
    if kernel_SS.shape[0] != kernel_SS.shape[1] or not np.allclose(
        kernel_SS, kernel_SS.T, rtol=0, atol=1e-6 * np.abs(kernel_SS).max()
    ):
        raise ValueError(f"kernel {kernel_SS.shape} is not square and symmetric: pass what routing_kernel returns")
    if not lam > 0:
        raise ValueError(f"lam is {lam}: it must be positive")
    return np.maximum(np.linalg.eigvalsh(kernel_SS), 0.0)
