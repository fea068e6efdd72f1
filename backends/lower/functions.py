"""Functions of one element, float by float type: the part of the vocabulary that needs no tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from tvm import tirx

from cnnc.backends.lower import vector_math
from cnnc.backends.lower.expr import TVM_DTYPES, Expr, Number, Operand, same_type
from cnnc.backends.lower.operators import register_operator
from cnnc.errors import VerifyError
from cnnc.ir.types import DType


class Functions:
    """Constants, conversions, selections and elementary functions."""

    def const(self, value: Number, dtype: DType) -> Expr:
        """Make a constant."""
        return Expr.of(value.item() if isinstance(value, np.generic) else value, dtype)

    def cast(self, x: Operand, dtype: DType) -> Expr:
        """Convert; a float beyond an integer type gives any value, so guard it where it can occur."""
        if not isinstance(x, Expr):
            return self.const(x, dtype)
        if x.dtype is dtype:
            return x
        if dtype is DType.BOOL:
            return x != 0
        return Expr(tirx.Cast(TVM_DTYPES[dtype], x.node))

    def reinterpret(self, x: Expr, dtype: DType) -> Expr:
        """Take the bits of x for a number of another type of its size."""
        return Expr(tirx.reinterpret(TVM_DTYPES[dtype], x.node))

    def is_float(self, x: Expr) -> bool:
        """Tell whether an expression is of a float type."""
        return x.dtype.is_float

    def is_unsigned(self, x: Expr) -> bool:
        """Tell whether an expression is of an unsigned type."""
        return x.dtype is DType.U8

    def select(self, condition: Expr, a: Operand, b: Operand) -> Expr:
        """Give a or b, both evaluated: vector code without branches."""
        x, y = same_type(a, b)
        return Expr(tirx.Select(condition.node, x.node, y.node))

    def isnan(self, x: Expr) -> Expr:
        """Whether x is NaN."""
        return Expr(tirx.isnan(x.node)) if x.dtype.is_float else self.const(False, DType.BOOL)  # x != x is folded away

    def isinf(self, x: Expr) -> Expr:
        """Whether x is infinite."""
        return self.abs(x) == math.inf if x.dtype.is_float else self.const(False, DType.BOOL)

    def abs(self, x: Expr) -> Expr:
        """Give the magnitude."""
        if x.dtype.is_float:
            return self._through_f32(x, _magnitude)
        return x if self.is_unsigned(x) else self.select(x < 0, -x, x)

    def sqrt(self, x: Expr) -> Expr:
        """Give the square root; NaN below zero."""
        return self._through_f32(x, tirx.sqrt)

    def rsqrt(self, x: Expr) -> Expr:
        """Give 1 / sqrt(x)."""
        return self._through_f32(x, lambda v: tirx.const(1.0, _type(v)) / tirx.sqrt(v))

    def floor(self, x: Expr) -> Expr:
        """Round down."""
        return self._through_f32(x, tirx.floor)

    def ceil(self, x: Expr) -> Expr:
        """Round up."""
        return self._through_f32(x, tirx.ceil)

    def trunc(self, x: Expr) -> Expr:
        """Round toward zero."""
        return self._through_f32(x, tirx.trunc)

    def round(self, x: Expr) -> Expr:
        """Round to nearest, halves to even."""
        return self._through_f32(x, tirx.nearbyint)

    def exp(self, x: Expr) -> Expr:
        """e**x."""
        return self._vectorised("exp", x)

    def expm1(self, x: Expr) -> Expr:
        """e**x - 1, exact near 0."""
        return self._vectorised("expm1", x)

    def log(self, x: Expr) -> Expr:
        """Natural logarithm."""
        return self._vectorised("log", x)

    def log1p(self, x: Expr) -> Expr:
        """ln(1 + x), exact near 0."""
        return self._vectorised("log1p", x)

    def tanh(self, x: Expr) -> Expr:
        """Hyperbolic tangent."""
        return self._vectorised("tanh", x)

    def erf(self, x: Expr) -> Expr:
        """Error function."""
        return self._vectorised("erf", x)

    def gelu(self, x: Expr) -> Expr:
        """x / 2 * (1 + erf(x / sqrt 2))."""
        if x.dtype is DType.F64:
            return x * 0.5 * (self.erf(x * math.sqrt(0.5)) + 1.0)
        return self._vectorised("gelu", x)

    def sigmoid(self, x: Expr) -> Expr:
        """1 / (1 + e**-x)."""
        if x.dtype is DType.F64:
            return 1.0 / (self.exp(-x) + 1.0)
        return self._vectorised("sigmoid", x)

    def pow(self, x: Expr, y: Operand) -> Expr:
        """x to the power y; small constant exponents need no libm."""
        exponent = y if isinstance(y, int | float) else _constant_value(y)
        if exponent is not None and exponent in _POWERS:
            return self._through_f32(x, lambda v: _POWERS[exponent](v))
        base, power = same_type(x, y)
        return self._through_f32(base, lambda v: _libm("pow", v, _like(power, v)))

    def fmod(self, x: Expr, y: Operand) -> Expr:
        """Give the remainder of x / y rounded toward zero, as C's fmod."""
        a, b = same_type(x, y)
        return self._through_f32(a, lambda v: _libm("fmod", v, _like(b, v)))

    def sin(self, x: Expr) -> Expr:
        """Sine."""
        return self._libm("sin", x)

    def cos(self, x: Expr) -> Expr:
        """Cosine."""
        return self._libm("cos", x)

    def tan(self, x: Expr) -> Expr:
        """Tangent."""
        return self._libm("tan", x)

    def asin(self, x: Expr) -> Expr:
        """Arc sine."""
        return self._libm("asin", x)

    def acos(self, x: Expr) -> Expr:
        """Arc cosine."""
        return self._libm("acos", x)

    def atan(self, x: Expr) -> Expr:
        """Arc tangent."""
        return self._libm("atan", x)

    def sinh(self, x: Expr) -> Expr:
        """Hyperbolic sine."""
        return self._libm("sinh", x)

    def cosh(self, x: Expr) -> Expr:
        """Hyperbolic cosine."""
        return self._libm("cosh", x)

    def asinh(self, x: Expr) -> Expr:
        """Inverse hyperbolic sine."""
        return self._libm("asinh", x)

    def acosh(self, x: Expr) -> Expr:
        """Inverse hyperbolic cosine."""
        return self._libm("acosh", x)

    def atanh(self, x: Expr) -> Expr:
        """Inverse hyperbolic tangent."""
        return self._libm("atanh", x)

    def _vectorised(self, name: str, x: Expr) -> Expr:
        if x.dtype is DType.F64:
            return self._libm(name, x)
        return self._through_f32(x, lambda v: vector_math.call(name, v))

    def _libm(self, name: str, x: Expr) -> Expr:
        return self._through_f32(x, lambda v: _libm(name, v))

    def _through_f32(self, x: Expr, function: Callable[[Any], Any]) -> Expr:
        """Apply a function of floats, to 16-bit ones in f32."""
        if not x.dtype.is_float:
            raise VerifyError(f"a function of floats is applied to {x.dtype}: use te.cast")
        if x.dtype in (DType.F32, DType.F64):
            return Expr(function(x.node))
        return self.cast(Expr(function(self.cast(x, DType.F32).node)), x.dtype)


def _nonnegative_power(x: Any, value: Any) -> Any:
    """Mend a power of roots where they differ from pow: -0.0 gives 0, -inf gives inf."""
    at_ends = tirx.Select(tirx.EQ(x, tirx.const(0.0, _type(x))), tirx.const(0.0, _type(x)), value)
    return tirx.Select(tirx.EQ(x, tirx.const(-math.inf, _type(x))), tirx.const(math.inf, _type(x)), at_ends)


_POWERS: dict[float, Callable[[Any], Any]] = {
    0.5: lambda x: _nonnegative_power(x, tirx.sqrt(x)),
    1: lambda x: x,
    2: lambda x: x * x,
    3: lambda x: x * x * x,
    -1: lambda x: tirx.const(1.0, _type(x)) / x,
    0.75: lambda x: _nonnegative_power(x, tirx.sqrt(x) * tirx.sqrt(tirx.sqrt(x))),
}


def _constant_value(x: Expr) -> float | None:
    return float(x.node.value) if isinstance(x.node, tirx.FloatImm) else None


def _type(x: Any) -> str:
    return str(x.ty.dtype)


def _like(x: Expr, v: Any) -> Any:
    """Give x's node in the type of `v`."""
    return x.node if _type(x.node) == _type(v) else tirx.Cast(_type(v), x.node)


_ABS = "cnnc_abs"
"""An instruction, and so none of the functions named `cnnc.exp` and so on, which CPUs compute several at once."""


def _magnitude(x: Any) -> Any:
    """Clear the sign, of NaN and -0.0 too, which TVM's own form (a comparison) does not."""
    _register_abs()
    return tirx.call_intrin(_type(x), _ABS, x)


@cache
def _register_abs() -> None:
    def llvm(call: Any) -> Any:
        return tirx.call_llvm_pure_intrin(_type(call), "llvm.fabs", call.args[0])

    register_operator(_ABS, 1, llvm, cuda=lambda call: _libm("fabs", call.args[0]))


def _libm(name: str, *args: Any) -> Any:
    dtype = _type(args[0])
    return tirx.call_pure_extern(dtype, name + ("f" if dtype == "float32" else ""), *args)
