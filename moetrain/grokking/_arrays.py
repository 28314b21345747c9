"""Input checks: NumPy or torch arrays become float64 NumPy arrays; an error names the argument and the remedy."""

from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[np.float64]
Ints: TypeAlias = npt.NDArray[np.int64]
Bools: TypeAlias = npt.NDArray[np.bool_]


class TensorLike(Protocol):
    """A torch tensor, recognized by its `detach` method, so that this package does not import torch."""

    def detach(self) -> Any: ...


Arrayish: TypeAlias = npt.ArrayLike | TensorLike


def to_float64(value: Arrayish) -> Floats:
    """The values as a float64 NumPy array. Exact for every narrower dtype, so ties stay ties."""
    if hasattr(value, "detach"):
        value = value.detach().cpu().double().numpy()  # .double() because NumPy has no bfloat16
    return np.asarray(value, dtype=np.float64)


def finite(value: Arrayish, name: str, axes: str) -> Floats:
    """`value` as float64.

    Args:
        name: name of the argument, for error messages.
        axes: expected axes, comma-separated: "samples, layers, experts".

    Raises:
        ValueError: wrong number of axes, an empty array, NaN or infinite values.
    """
    array = to_float64(value)
    ndim = axes.count(",") + 1
    if array.ndim != ndim:
        raise ValueError(f"{name} has shape {array.shape}: it must be [{axes}], {ndim} axes")
    if array.size == 0:
        raise ValueError(
            f"{name} is empty, shape {array.shape} [{axes}]: skip the call when there is nothing to measure"
        )
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds NaN or infinite values: exclude the samples or readings that have them")
    return array


def routing_weights(value: Arrayish, name: str = "weights") -> Floats:
    """Sample routing weights [S, L, E] as float64.

    Raises:
        ValueError: as `finite`, and for negative values.
    """
    weights_SLE = finite(value, name, "samples, layers, experts")
    if weights_SLE.min() < 0:
        raise ValueError(f"{name} holds negative values: pass probabilities (after the softmax), not router logits")
    return weights_SLE


def check_same_shape(a: npt.NDArray[Any], b: npt.NDArray[Any], names: tuple[str, str], first_axis: int = 0) -> None:
    """Raise ValueError unless the axes of `a` and `b` agree from `first_axis` on."""
    if a.shape[first_axis:] != b.shape[first_axis:]:
        raise ValueError(
            f"{names[0]} has shape {a.shape} and {names[1]} {b.shape}: "
            f"axes from {first_axis} on must agree, so take both from the same model and samples"
        )
