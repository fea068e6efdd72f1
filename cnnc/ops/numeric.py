"""Element types in arithmetic: the checks of dtypes and vectors that operators share, and extreme values."""

from __future__ import annotations

from typing import Any

import numpy as np

from cnnc.errors import ShapeError
from cnnc.ir.types import DType, TensorType


def check_floats(name: str, **operands: TensorType | None) -> None:
    """Raise `ShapeError` unless all operands that are present have one and the same float dtype.

    The keywords are the operands' names in the message, the first is the one the others are held against.
    """
    present = {key: t for key, t in operands.items() if t is not None}
    first = next(iter(present))
    if not present[first].dtype.is_float:
        raise ShapeError(f"{name}: {first} must be of a float type, not {present[first]}")
    check_same_dtype(name, **present)


def check_same_dtype(name: str, **operands: TensorType | None) -> None:
    """Raise `ShapeError` unless all operands that are present have the dtype of the first."""
    present = {key: t for key, t in operands.items() if t is not None}
    first = next(iter(present))
    for key, type_ in present.items():
        if type_.dtype is not present[first].dtype:
            raise ShapeError(f"{name}: {key} is {type_.dtype} but {first} is {present[first].dtype}; cast one of them")


def check_vector(name: str, what: str, type_: TensorType | None, size: object, of: str) -> None:
    """Raise `ShapeError` unless an operand (if present) is a vector with one entry for each of `of`."""
    if type_ is not None and type_.shape != (size,):
        raise ShapeError(f"{name}: {what} must be a vector of {size}, one for each {of}, not {type_}")


def lowest(dtype: DType) -> float | int:
    """Give the smallest value of a type, what the maximum of nothing is: -inf for floats."""
    return -np.inf if dtype.is_float else int(np.iinfo(dtype.numpy).min)


def highest(dtype: DType) -> float | int:
    """Give the largest value of a type, what the minimum of nothing is: inf for floats."""
    return np.inf if dtype.is_float else int(np.iinfo(dtype.numpy).max)


def cast_to(te: Any, expr: Any, from_: DType, to: DType) -> Any:
    """Convert a tensor expression, writing nothing where the type is that already."""
    return expr if from_ is to else te.cast(expr, to)


def narrow(array: Any, like: np.ndarray) -> np.ndarray:
    """Round what was calculated in a working dtype back to the dtype of an input."""
    result: np.ndarray = np.asarray(array).astype(like.dtype, copy=False)
    return result
