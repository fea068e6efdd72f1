"""Elementary functions: rounding, roots, exponentials, angles."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from cnnc.ir.types import DType
from cnnc.ops.broadcast import SIGNED
from cnnc.ops.unary.one_input import _Unary


class Neg(_Unary):
    """y = -x."""

    takes = SIGNED

    def _numpy(self, x: np.ndarray) -> Any:
        return -x

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        return -x


class Abs(_Unary):
    """y = |x|; the smallest integer, which has no positive, stays itself."""

    takes = SIGNED

    def _numpy(self, x: np.ndarray) -> Any:
        return np.abs(x)

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        return te.abs(x)


class Sign(_Unary):
    """y = 1 if x > 0, -1 if x < 0, else x (0 or NaN)."""

    takes = SIGNED

    def _numpy(self, x: np.ndarray) -> Any:
        return np.sign(x)

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        return te.select(x > 0, te.const(1, dtype), te.select(x < 0, te.const(-1, dtype), x))


class Floor(_Unary):
    """y = the largest integer <= x."""

    def _numpy(self, x: np.ndarray) -> Any:
        return np.floor(x)

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        return te.floor(x)


class Ceil(_Unary):
    """y = the smallest integer >= x."""

    def _numpy(self, x: np.ndarray) -> Any:
        return np.ceil(x)

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        return te.ceil(x)


class Round(_Unary):
    """y = the integer nearest to x, the even one of two."""

    def _numpy(self, x: np.ndarray) -> Any:
        return np.round(x)

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        return te.round(x)


class Reciprocal(_Unary):
    """y = 1 / x."""

    span = (0.25, 4.0)

    def _numpy(self, x: np.ndarray) -> Any:
        return 1 / x

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        return te.const(1, dtype) / x


class Sqrt(_Unary):
    """y = the square root of x."""

    span = (0.0, 4.0)

    def _numpy(self, x: np.ndarray) -> Any:
        return np.sqrt(x)

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        return te.sqrt(x)


class Rsqrt(_Unary):
    """y = 1 / sqrt(x)."""

    span = (0.25, 4.0)

    def _numpy(self, x: np.ndarray) -> Any:
        return 1 / np.sqrt(x)

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        return te.const(1, dtype) / te.sqrt(x)


class Exp(_Unary):
    """y = e^x."""

    def _numpy(self, x: np.ndarray) -> Any:
        return np.exp(x)

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        return te.exp(x)


class Log(_Unary):
    """y = ln x."""

    span = (0.01, 4.0)

    def _numpy(self, x: np.ndarray) -> Any:
        return np.log(x)

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        return te.log(x)


class Erf(_Unary):
    """y = 2 / sqrt(pi) * integral of e^(-t^2) from 0 to x."""

    def _numpy(self, x: np.ndarray) -> Any:
        return error_function(x)

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        return te.erf(x)


class Sin(_Unary):
    """y = sin x."""

    def _numpy(self, x: np.ndarray) -> Any:
        return np.sin(x)

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        return te.sin(x)


class Cos(_Unary):
    """y = cos x."""

    def _numpy(self, x: np.ndarray) -> Any:
        return np.cos(x)

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        return te.cos(x)


class Tan(_Unary):
    """y = tan x."""

    span = (-1.5, 1.5)

    def _numpy(self, x: np.ndarray) -> Any:
        return np.tan(x)

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        return te.tan(x)


class Asin(_Unary):
    """y = the angle in [-pi/2, pi/2] whose sine is x."""

    span = (-1.0, 1.0)

    def _numpy(self, x: np.ndarray) -> Any:
        return np.arcsin(x)

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        return te.asin(x)


class Acos(_Unary):
    """y = the angle in [0, pi] whose cosine is x."""

    span = (-1.0, 1.0)

    def _numpy(self, x: np.ndarray) -> Any:
        return np.arccos(x)

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        return te.acos(x)


class Atan(_Unary):
    """y = the angle in (-pi/2, pi/2) whose tangent is x."""

    def _numpy(self, x: np.ndarray) -> Any:
        return np.arctan(x)

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        return te.atan(x)


class Sinh(_Unary):
    """y = (e^x - e^-x) / 2."""

    def _numpy(self, x: np.ndarray) -> Any:
        return np.sinh(x)

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        return te.sinh(x)


class Cosh(_Unary):
    """y = (e^x + e^-x) / 2."""

    def _numpy(self, x: np.ndarray) -> Any:
        return np.cosh(x)

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        return te.cosh(x)


class Tanh(_Unary):
    """y = (e^x - e^-x) / (e^x + e^-x)."""

    def _numpy(self, x: np.ndarray) -> Any:
        return np.tanh(x)

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        return te.tanh(x)


class Asinh(_Unary):
    """y = the number whose sinh is x."""

    def _numpy(self, x: np.ndarray) -> Any:
        return np.arcsinh(x)

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        return te.asinh(x)


class Acosh(_Unary):
    """y = the number >= 0 whose cosh is x."""

    span = (1.0, 4.0)

    def _numpy(self, x: np.ndarray) -> Any:
        return np.arccosh(x)

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        return te.acosh(x)


class Atanh(_Unary):
    """y = the number whose tanh is x."""

    span = (-0.99, 0.99)

    def _numpy(self, x: np.ndarray) -> Any:
        return np.arctanh(x)

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        return te.atanh(x)


def error_function(x: np.ndarray) -> np.ndarray:
    """Give erf, which numpy does not have: the C library's, element by element, in f64."""
    values = map(math.erf, x.ravel().tolist())
    return np.fromiter(values, np.float64, x.size).reshape(x.shape).astype(x.dtype)
