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

from cnnc.backends.lower import exact, vector_math
from cnnc.backends.lower.bounds import Bounds
from cnnc.backends.lower.expr import Expr, Number, Operand, Tensor, as_index, same_type
from cnnc.backends.lower.functions import Functions
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


class Vocabulary(Functions):
    """One kernel's `te`."""

    def __init__(self) -> None:
        vector_math.register()
        self._axes: dict[Any, Any] = {}
        self._bounds = Bounds()

    # Tensors

    def compute(self, shape: Sequence[int], fn: Callable[..., Expr | Reduction], name: str) -> Tensor:
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

    # Choice

    def where(self, condition: Expr, a: Operand, b: Operand) -> Expr:
        """Give a or b, evaluating only that one: for reads that are out of bounds where not chosen.

        Where no read can be out of bounds this is `select`, which vectors need.
        """
        x, y = same_type(a, b)
        if self._bounds.are_reads_safe(x.node) and self._bounds.are_reads_safe(y.node):
            return Expr(tirx.Select(condition.node, x.node, y.node))
        return Expr(tirx.if_then_else(condition.node, x.node, y.node))

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
        return _compare("eq", tirx.EQ, a, b)

    def not_equal(self, a: Operand, b: Operand) -> Expr:
        """a != b (true for NaN)."""
        return _compare("ne", tirx.NE, a, b)

    def less(self, a: Operand, b: Operand) -> Expr:
        """a < b."""
        return _compare("lt", tirx.LT, a, b)

    def less_equal(self, a: Operand, b: Operand) -> Expr:
        """a <= b."""
        return _compare("le", tirx.LE, a, b)

    def greater(self, a: Operand, b: Operand) -> Expr:
        """a > b."""
        return _compare("gt", tirx.GT, a, b)

    def greater_equal(self, a: Operand, b: Operand) -> Expr:
        """a >= b."""
        return _compare("ge", tirx.GE, a, b)

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


def _expression(x: Operand) -> Expr:
    if not isinstance(x, Expr):
        raise VerifyError(f"{x!r} has no dtype: use te.const")
    return x


def _compare(name: str, make: Callable[[Any, Any], Any], a: Operand, b: Operand) -> Expr:
    x, y = same_type(a, b)
    return Expr(exact.binary(name, x.node, y.node) if x.dtype.is_float else make(x.node, y.node))


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
