"""What rules ask about constant operands."""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numpy as np

from cnnc.ir.graph import Value
from cnnc.ops.source import Constant

Array: TypeAlias = "np.ndarray[Any, Any]"


def array_of(v: Value) -> Array | None:
    """Give the (logical) array of a constant, None for any other value."""
    return v.op.value.array if isinstance(v.op, Constant) else None


def largest_of(v: Value) -> float:
    """Give the largest magnitude in a constant, not finite where any is not; NaN for any other value."""
    return v.op.value.largest if isinstance(v.op, Constant) else math.nan


def scalar_of(v: Value) -> float | None:
    """Give the number that all elements of a constant are; None where they are not, or it is no constant."""
    array = array_of(v)
    if array is None or array.size == 0:
        return None
    flat = array.reshape(-1)
    first = float(flat[0])
    return first if array.size == 1 or bool((flat == flat[0]).all()) else None


def constant_operand(v: Value) -> tuple[Value, Value] | None:
    """Split the operands of a commutative operator into (the other one, the constant)."""
    a, b = v.inputs
    if isinstance(b.op, Constant):
        return a, b
    if isinstance(a.op, Constant):
        return b, a
    return None


def per_channel(c: Value, shape: tuple[Any, ...], axis: int) -> Array | None:
    """Give a constant as one float64 for each index of an axis of `shape`; None where it differs along others.

    Also None where it would broadcast the shape to a larger one.
    """
    array = array_of(c)
    channels = shape[axis]
    if array is None or array.ndim > len(shape) or not isinstance(channels, int):
        return None
    aligned = array.reshape((1,) * (len(shape) - array.ndim) + array.shape)
    if any(size != 1 for position, size in enumerate(aligned.shape) if position != axis % len(shape)):
        return None
    if aligned.size not in (1, channels):
        return None
    return np.broadcast_to(aligned.reshape(-1).astype(np.float64), (channels,))
