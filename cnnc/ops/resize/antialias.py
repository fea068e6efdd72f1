"""Antialiased resizing as a matrix for each axis: where an axis shrinks, the filter widens with it."""

from __future__ import annotations

import math

import numpy as np

from cnnc.ir.types import TensorType, upper_bound
from cnnc.ops.resize.coordinate import exact_scale
from cnnc.ops.resize.operator import Resize


def antialias_matrix(op: Resize, axis: int, x: TensorType) -> np.ndarray:
    """Give the weights [output size, input size] of an axis, float64; each row adds up to 1.

    The filter is ONNX's: the linear or cubic kernel stretched by 1 / scale, outside pixels repeat the edge or, with
    `exclude_outside`, do not count.
    """
    size, count = upper_bound(x.shape[axis]), upper_bound(op.sizes[axis])
    scale = min(float(exact_scale(op.scales[axis])) if op.scales else count / size, 1.0)
    radius = 1 if op.mode == "linear" else 2
    first = math.floor(-radius / scale) + 1
    offsets = np.arange(first, 2 - first)
    where = op.coordinate(axis, x)
    numerator = where.at(np.arange(count))
    # The pixel at or left of the coordinate, strictly left for a whole one.
    base = (-(-numerator // where.c) - 1).astype(np.int64)
    ratio = np.asarray(numerator - base * where.c, np.float64) / where.c
    distance = np.abs(offsets - ratio[:, None]) * scale
    weights = np.clip(1 - distance, 0, None) if op.mode == "linear" else _cubic_kernel(distance, op.cubic_a)
    weights = weights / weights.sum(axis=1, keepdims=True)
    chosen = base[:, None] + offsets
    if op.exclude_outside:
        weights = np.where((chosen >= 0) & (chosen < size), weights, 0)
        weights = weights / weights.sum(axis=1, keepdims=True)
    matrix = np.zeros((count, size))
    rows = np.broadcast_to(np.arange(count)[:, None], chosen.shape)
    np.add.at(matrix, (rows, np.clip(chosen, 0, size - 1)), weights)
    return matrix


def _cubic_kernel(distance: np.ndarray, a: float) -> np.ndarray:
    """Give the cubic convolution kernel (Keys 1981, equation 4) at distances that are not negative."""
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    return np.where(distance <= 1, near, np.where(distance < 2, far, 0))
