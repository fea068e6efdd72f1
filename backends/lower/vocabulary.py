"""The vocabulary operators describe themselves in: what `Op.compute` is handed as `te`.

Tensors come from `compute`, scalars from reading tensors and from the functions below; see `expr` for operators.
float32 functions are vectorised (`vector_math`), 16-bit floats go through float32 and round once, float64 and
the rarer functions call libm.  A reduction stands alone as the value of a `compute`; sums of 16-bit floats run
in float32 and round at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from tvm import te as tvm_te
from tvm import tirx

from cnnc.backends.lower import vector_math
from cnnc.backends.lower.bounds import Bounds
from cnnc.backends.lower.expr import TVM_DTYPES, Expr, Number, Operand, Tensor, as_index, same_type
from cnnc.backends.lower.reducers import arg_reducer, nan_max, nan_min
from cnnc.errors import UnsupportedError, VerifyError
from cnnc.ir.types import DType, TensorType

Axes: TypeAlias = "Expr | Sequence[Expr]"


@dataclass(frozen=True)
class Reduction:
    """A reduction over axes, not yet the value of a tensor."""

    combine: Callable[..., Any]
    value: Any
    axes: tuple[Any, ...]
    dtype: DType
    """What the tensor holds; the reduction itself may run in a wider type."""
    picks_index: bool = False


class Vocabulary:
    """One kernel's `te`."""

    def __init__(self) -> None:
        vector_math.register()
        self._axes: dict[Any, Any] = {}
        self._bounds = Bounds()

    # Tensors

    def compute(self, shape: Sequence[int], fn: Callable[..., Expr | Reduction | Number], name: str) -> Tensor:
        """Describe a tensor by `fn(*index)`, an expression or a reduction."""
        found: list[Reduction] = []

        def body(*index: Any) -> Any:
            for variable, extent in zip(index, shape, strict=True):
                self._bounds.bind(variable, extent)
            value = fn(*(Expr(i) for i in index))
            if isinstance(value, Reduction):
                found.append(value)
                return value.combine(value.value, axis=list(value.axes))
            if not isinstance(value, Expr):
                raise VerifyError(f"{name}: an element is {value!r}, no expression (use te.const)")
            return value.node

        raw = tvm_te.compute(tuple(shape), body, name=name)
        if not found:
            return Tensor(raw)
        reduction = found[0]
        result = Tensor(raw[0] if reduction.picks_index else raw)
        if result.dtype is reduction.dtype:
            return result
        return self.compute(shape, lambda *i: self.cast(result[i], reduction.dtype), f"{name}_rounded")

    def reduce_axis(self, extent: int, name: str = "k") -> Expr:
        """Make an axis to reduce over, [0, extent)."""
        axis = tvm_te.reduce_axis((0, extent), name)
        self._axes[axis.var] = axis
        self._bounds.bind(axis.var, extent)
        return Expr(axis.var)

    def at(self, x: Tensor, type_: TensorType, *index: Operand) -> Expr:
        """Read a tensor at a logical index, whatever its layout."""
        position = [i if isinstance(i, Expr) else Expr.of(i, DType.I32) for i in index]
        if type_.layout is None:
            return x[position]
        # An index that came from this layout goes back to what it was, which later steps recognise.
        return x[[Expr(self._bounds.simplify(i.node)) for i in type_.layout.physical_index(position)]]

    def const(self, value: Number, dtype: DType) -> Expr:
        """Make a constant."""
        return Expr.of(value.item() if isinstance(value, np.generic) else value, dtype)

    def index(self, x: Expr) -> Expr:
        """Convert an integer to the type of indices."""
        return Expr(as_index(x))

    # Reductions

    def sum(self, x: Expr, axes: Axes) -> Reduction | Expr:
        """Add up; 16-bit floats in f32."""
        return self._reduction(x, axes, lambda a, b: a + b, 0, "sum")

    def prod(self, x: Expr, axes: Axes) -> Reduction | Expr:
        """Multiply up; 16-bit floats in f32."""
        return self._reduction(x, axes, lambda a, b: a * b, 1, "prod")

    def max(self, x: Operand, other: Operand | Axes) -> Any:
        """Give the largest over axes (NaN if any is), or the larger of two expressions."""
        axes = self._as_axes(other)
        if axes is None:
            return self.maximum(x, other)  # type: ignore[arg-type]
        x = _expression(x)
        return self._reduction(x, axes, _max_of(x.dtype), lowest(x.dtype), "max", widen=False)

    def min(self, x: Operand, other: Operand | Axes) -> Any:
        """Give the smallest over axes (NaN if any is), or the smaller of two expressions."""
        axes = self._as_axes(other)
        if axes is None:
            return self.minimum(x, other)  # type: ignore[arg-type]
        x = _expression(x)
        return self._reduction(x, axes, _min_of(x.dtype), highest(x.dtype), "min", widen=False)

    def argmax(self, x: Expr, axes: Axes, select_last: bool = False) -> Reduction:
        """Give the i64 position of the largest (NaN counts as largest) along one axis, the first of equals."""
        return self._arg_reduction(x, axes, tirx.GT, lowest(x.dtype), select_last)

    def argmin(self, x: Expr, axes: Axes, select_last: bool = False) -> Reduction:
        """Give the i64 position of the smallest (NaN counts as smallest) along one axis, the first of equals."""
        return self._arg_reduction(x, axes, tirx.LT, highest(x.dtype), select_last)

    def _as_axes(self, value: Any) -> tuple[Expr, ...] | None:
        """Give the reduction axes that `value` is, or None for an operand."""
        items = value if isinstance(value, list | tuple) else (value,)
        known = all(isinstance(i, Expr) and i.node in self._axes for i in items)
        return tuple(items) if known else None

    def _is_empty(self, axes: Axes) -> bool:
        return any(int(axis.dom.extent) == 0 for axis in self._tvm_axes(axes))

    def _tvm_axes(self, axes: Axes) -> tuple[Any, ...]:
        found = self._as_axes(axes)
        if not found:
            raise VerifyError("a reduction needs at least one axis of te.reduce_axis")
        return tuple(self._axes[a.node] for a in found)

    def _reduction(
        self, x: Expr, axes: Axes, combine: Callable[[Any, Any], Any], identity: Number, name: str, widen: bool = True
    ) -> Reduction | Expr:
        if self._is_empty(axes):
            return self.const(identity, x.dtype)
        wide = self.cast(x, DType.F32) if widen and x.dtype in (DType.F16, DType.BF16) else x
        reducer = tirx.comm_reducer(combine, lambda dtype: tirx.const(identity, dtype), name=name)
        return Reduction(reducer, wide.node, self._tvm_axes(axes), x.dtype)

    def _arg_reduction(
        self, x: Expr, axes: Axes, better: Callable[[Any, Any], Any], identity: Number, select_last: bool
    ) -> Reduction:
        if self._is_empty(axes):
            raise UnsupportedError("the position of the largest of no elements is not defined")
        (axis,) = self._tvm_axes(axes)
        reducer = arg_reducer(better, identity, x.dtype.is_float, select_last)
        return Reduction(reducer, (axis.var, x.node), (axis,), DType.I64, picks_index=True)

    # Types

    def cast(self, x: Operand, dtype: DType) -> Expr:
        """Convert; a float beyond an integer type gives any value, so guard it where it can occur."""
        if not isinstance(x, Expr):
            return self.const(x, dtype)
        if x.dtype is dtype:
            return x
        if dtype is DType.BOOL:
            return x != 0
        return Expr(tirx.Cast(TVM_DTYPES[dtype], x.node))

    def is_float(self, x: Expr) -> bool:
        """Tell whether an expression is of a float type."""
        return x.dtype.is_float

    def is_unsigned(self, x: Expr) -> bool:
        """Tell whether an expression is of an unsigned type."""
        return x.dtype is DType.U8

    # Choice

    def where(self, condition: Expr, a: Operand, b: Operand) -> Expr:
        """Give a or b, evaluating only that one: for reads that are out of bounds where not chosen.

        Where no read can be out of bounds this is `select`, which vectors need.
        """
        x, y = same_type(a, b)
        if self._bounds.are_reads_safe(x.node) and self._bounds.are_reads_safe(y.node):
            return Expr(tirx.Select(condition.node, x.node, y.node))
        return Expr(tirx.if_then_else(condition.node, x.node, y.node))

    def select(self, condition: Expr, a: Operand, b: Operand) -> Expr:
        """Give a or b, both evaluated: vector code without branches."""
        x, y = same_type(a, b)
        return Expr(tirx.Select(condition.node, x.node, y.node))

    def logical_and(self, *conditions: Expr) -> Expr:
        """All of the conditions."""
        return Expr(tirx.all(*(c.node for c in conditions)))

    def logical_or(self, *conditions: Expr) -> Expr:
        """Any of the conditions."""
        return Expr(tirx.any(*(c.node for c in conditions)))

    def logical_not(self, condition: Expr) -> Expr:
        """Not the condition."""
        return Expr(tirx.Not(condition.node))

    def logical_xor(self, a: Expr, b: Expr) -> Expr:
        """One condition, not both."""
        return Expr(tirx.NE(a.node, b.node))

    def equal(self, a: Operand, b: Operand) -> Expr:
        """a == b."""
        return _compare(tirx.EQ, a, b)

    def not_equal(self, a: Operand, b: Operand) -> Expr:
        """a != b (true for NaN)."""
        return _compare(tirx.NE, a, b)

    def less(self, a: Operand, b: Operand) -> Expr:
        """a < b."""
        return _compare(tirx.LT, a, b)

    def less_equal(self, a: Operand, b: Operand) -> Expr:
        """a <= b."""
        return _compare(tirx.LE, a, b)

    def greater(self, a: Operand, b: Operand) -> Expr:
        """a > b."""
        return _compare(tirx.GT, a, b)

    def greater_equal(self, a: Operand, b: Operand) -> Expr:
        """a >= b."""
        return _compare(tirx.GE, a, b)

    def isnan(self, x: Expr) -> Expr:
        """Whether x is NaN."""
        return Expr(tirx.isnan(x.node)) if x.dtype.is_float else self.const(False, DType.BOOL)  # x != x is folded away

    def isinf(self, x: Expr) -> Expr:
        """Whether x is infinite."""
        return self.abs(x) == math.inf if x.dtype.is_float else self.const(False, DType.BOOL)

    def maximum(self, a: Operand, b: Operand) -> Expr:
        """Give the larger of two; NaN if either is."""
        return _extreme(tirx.max, _max_of, a, b)

    def minimum(self, a: Operand, b: Operand) -> Expr:
        """Give the smaller of two; NaN if either is."""
        return _extreme(tirx.min, _min_of, a, b)

    # Integers

    def floordiv(self, a: Operand, b: Operand) -> Expr:
        """Divide integers, rounding down; the divisor must not be 0."""
        return _typed(tirx.floordiv, a, b)

    def floormod(self, a: Operand, b: Operand) -> Expr:
        """Give the remainder of `floordiv`, which has the divisor's sign."""
        return _typed(tirx.floormod, a, b)

    def truncdiv(self, a: Operand, b: Operand) -> Expr:
        """Divide integers as C does, toward zero; the divisor must not be 0."""
        return _typed(tirx.truncdiv, a, b)

    def truncmod(self, a: Operand, b: Operand) -> Expr:
        """Give the remainder of `truncdiv`, which has the dividend's sign."""
        return _typed(tirx.truncmod, a, b)

    # Elementary functions

    def abs(self, x: Expr) -> Expr:
        """Give the magnitude."""
        if x.dtype.is_float:
            return self._through_f32(x, lambda v: tirx.call_llvm_pure_intrin(_type(v), "llvm.fabs", v))
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


def lowest(dtype: DType) -> Number:
    """Give the identity of max."""
    if dtype is DType.BOOL:
        return False
    return -math.inf if dtype.is_float else int(np.iinfo(dtype.numpy).min)


def highest(dtype: DType) -> Number:
    """Give the identity of min."""
    if dtype is DType.BOOL:
        return True
    return math.inf if dtype.is_float else int(np.iinfo(dtype.numpy).max)


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


def _expression(x: Operand) -> Expr:
    if not isinstance(x, Expr):
        raise VerifyError(f"{x!r} has no dtype: use te.const")
    return x


def _constant_value(x: Expr) -> float | None:
    return float(x.node.value) if isinstance(x.node, tirx.FloatImm) else None


def _type(x: Any) -> str:
    return str(x.ty.dtype)


def _like(x: Expr, v: Any) -> Any:
    """Give x's node in the type of `v`."""
    return x.node if _type(x.node) == _type(v) else tirx.Cast(_type(v), x.node)


def _libm(name: str, *args: Any) -> Any:
    dtype = _type(args[0])
    return tirx.call_pure_extern(dtype, name + ("f" if dtype == "float32" else ""), *args)


def _compare(make: Callable[[Any, Any], Any], a: Operand, b: Operand) -> Expr:
    x, y = same_type(a, b)
    return Expr(make(x.node, y.node))


def _typed(make: Callable[[Any, Any], Any], a: Operand, b: Operand) -> Expr:
    x, y = same_type(a, b)
    if not x.dtype.is_integer:
        raise VerifyError(f"an integer division is applied to {x.dtype}")
    return Expr(make(x.node, y.node))


def _max_of(dtype: DType) -> Callable[[Any, Any], Any]:
    return nan_max if dtype.is_float else lambda a, b: tirx.max(a, b)


def _min_of(dtype: DType) -> Callable[[Any, Any], Any]:
    return nan_min if dtype.is_float else lambda a, b: tirx.min(a, b)


def _extreme(
    function: Callable[[Any, Any], Any],
    with_nan: Callable[[DType], Callable[[Any, Any], Any]],
    a: Operand,
    b: Operand,
) -> Expr:
    x, y = same_type(a, b)
    if _is_number(y):
        x, y = y, x
    # TVM's max gives the second operand where either is NaN, so a number in front needs no care.
    return Expr(function(x.node, y.node) if _is_number(x) else with_nan(x.dtype)(x.node, y.node))


def _is_number(x: Expr) -> bool:
    return isinstance(x.node, tirx.FloatImm) and not math.isnan(float(x.node.value))
