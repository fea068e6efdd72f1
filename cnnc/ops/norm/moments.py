"""Mean and variance, and other pieces that the normalisations share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cnnc.errors import ShapeError
from cnnc.ir.types import TensorType
from cnnc.ops.blocked import tensor
from cnnc.ops.broadcast import widen

Element = Callable[..., Any]
"""Writes an element of a tensor at a logical index."""


def along_channels(array: np.ndarray, rank: int) -> np.ndarray:
    """Shape a vector so that it broadcasts along the channels of N C ... ."""
    return widen(array).reshape(-1, *(1,) * (rank - 2))


def check_rank(name: str, x: TensorType) -> None:
    """Raise `ShapeError` for an input without axes N and C."""
    if x.rank < 2:
        raise ShapeError(f"{name}: needs axes N and C, not x : {x}")


def moments(
    te: Any, read: Element, rows: TensorType, extents: Sequence[int], at: Callable[..., Sequence[Any]]
) -> tuple[Element, Element]:
    """Describe mean and variance (in two passes) of each row as functions of the row's index.

    `read(*index)` gives an element in the row's dtype, `at(row, inner)` the index of an element of a row.
    """
    count = te.const(max(math.prod(extents), 1), rows.dtype)
    first = [te.reduce_axis(e, f"r{i}") for i, e in enumerate(extents)]
    total = tensor(te, rows, lambda *row: te.sum(read(*at(row, first)), first), "sum", guard=False)

    def mean(*row: Any) -> Any:
        return te.at(total, rows, *row) / count

    second = [te.reduce_axis(e, f"s{i}") for i, e in enumerate(extents)]

    def square(*row: Any) -> Any:
        distance = read(*at(row, second)) - mean(*row)
        return te.sum(distance * distance, second)

    squares = tensor(te, rows, square, "square_sum", guard=False)
    return mean, lambda *row: te.at(squares, rows, *row) / count


def standardise(x: np.ndarray, axes: tuple[int, ...], epsilon: float) -> np.ndarray:
    """Give (x - mean) / sqrt(var + epsilon) with the moments over some axes; an empty array stays empty."""
    if x.size == 0:
        return x
    distance = x - x.mean(axis=axes, keepdims=True)
    var = (distance * distance).mean(axis=axes, keepdims=True)
    return np.asarray(distance / np.sqrt(var + x.dtype.type(epsilon)))
