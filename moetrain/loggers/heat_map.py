"""Matrices as images for TensorBoard, without a plotting library."""

from __future__ import annotations

import numpy as np

# Anchors of a perceptually uniform color map from dark blue over green to yellow (after viridis).
_ANCHORS = np.array([[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]], float)
_NOTHING = np.array([230, 230, 230], np.uint8)


def heat_map(values: np.ndarray, low: float | None = None, high: float | None = None, cell: int = 12) -> np.ndarray:
    """A matrix [rows, columns] as an image, uint8 [rows * cell, columns * cell, 3]; NaN is grey.

    Args:
        values: the matrix.
        low: value of the darkest color; the smallest of the matrix where None.
        high: value of the brightest color; the largest of the matrix where None.
        cell: side of a matrix element in pixels.

    Raises:
        ValueError: the array is no matrix, or empty.
    """
    if values.ndim != 2 or values.size == 0:
        raise ValueError(f"a heat map shows a matrix, got shape {values.shape}")
    known = np.isfinite(values)
    low = float(values[known].min(initial=np.inf)) if low is None else low
    high = float(values[known].max(initial=-np.inf)) if high is None else high
    span = high - low if np.isfinite(high - low) and high > low else 1.0
    floor = low if np.isfinite(low) else 0.0
    place = np.clip((np.where(known, values, 0.0) - floor) / span, 0, 1) * (len(_ANCHORS) - 1)
    below = np.minimum(place.astype(int), len(_ANCHORS) - 2)
    share = (place - below)[..., None]
    pixels = np.rint(_ANCHORS[below] * (1 - share) + _ANCHORS[below + 1] * share).astype(np.uint8)
    pixels[~known] = _NOTHING
    return pixels.repeat(cell, axis=0).repeat(cell, axis=1)
